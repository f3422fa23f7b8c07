"""
What is taken from a submission: the functions that an exercise names, put into the reference file.

From the syntax tree of a student's file, `graft` takes

- the arguments and bodies of the functions and methods that the exercise names;
- new functions at top level that these call, and new constants there that are literals (LIMIT = 4).

Everything else is left behind, and `left_behind` lists it: other code at top level, imports, decorators, new
classes and methods, changes of other functions. (Annotations too, which nobody misses.) So nothing of the
student's runs while the file is imported. A function with a door, which is a name that leads out of it and
that no exercise needs, counts as not written.
"""

import ast
import builtins
import copy
import symtable
import warnings

from plumbing.errors import BadInput

LARGEST = 2 ** 20                           # bytes of a file that is read
# Doors lead to files, to other modules, to the code that calls a function. So do names that begin with __.
DOORS = set("""exec eval compile open input breakpoint globals locals vars getattr setattr delattr
    os sys gc io builtins importlib inspect subprocess ctypes pickle signal shutil pathlib socket threading
    multiprocessing testing load load_inline save hub library from_file fromfile tofile loadtxt genfromtxt
    memmap gi_frame f_back f_globals f_locals f_builtins""".split())


def read_module(path):
    """The syntax tree of a student's file. Raises BadInput with one line, which says where the mistake is."""
    if not path.is_file() or path.is_symlink():                         # a link could lead to the solution
        raise BadInput(f"there is no file {path.name}")
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path.name} has more than {LARGEST} bytes")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = path.read_bytes()
            compile(content, path.name, "exec", dont_inherit=True)      # finds what the parser does not
            tree = ast.parse(content)
            ast.unparse(tree)                                           # as is done with parts of it later
            return tree
    except SyntaxError as error:
        raise BadInput(f"{path.name}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise BadInput(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None


def parts(tree):
    """{name: node} of the functions and methods of a file and, by its text, of what else stands at top level
    and in classes. Of two with one name the last counts, as in Python."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            head = ast.ClassDef(node.name, node.bases, node.keywords, [ast.Pass()], node.decorator_list)
            found[ast.unparse(head)] = ast.copy_location(head, node)
            found |= {f"{node.name}.{name}": child for name, child in parts(node).items()}
        else:
            found[node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node)] = node
    return found


def is_literal(node):
    try:
        ast.literal_eval(node)
        return True
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


class Plain(ast.NodeTransformer):
    """Takes annotations and imports out of a function. (What the file imports is there without.)"""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_Import(self, node):
        return ast.copy_location(ast.Pass(), node)

    visit_ImportFrom = visit_Import


def plain(function):
    """A copy of a function without what would run during import, but for defaults, and without imports."""
    function = Plain().visit(copy.deepcopy(function))
    function.decorator_list, function.returns = [], None
    return function


def globals_of(function):
    """The names that a function finds outside of itself: in its module, or in builtins."""
    names = set()
    tables = symtable.symtable(ast.unparse(function), "function", "exec").get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def helpers_of(student, reference):
    """{name: node} of new functions and constants at top level."""
    known = symtable.symtable(ast.unparse(reference), "reference", "exec").get_identifiers()
    helpers = {}
    for node in student.body:
        if isinstance(node, ast.FunctionDef):
            helpers[node.name] = plain(node)
        elif isinstance(node, ast.Assign) and is_literal(node.value):
            helpers[ast.unparse(node.targets[0])] = node
    known = {*known, *dir(builtins)}
    return {name: node for name, node in helpers.items() if name not in known}


def used_by(function, helpers):
    """{name: node} of the helpers that a function uses, and of those that these use."""
    used, waiting = {}, [function]
    while waiting:
        node = waiting.pop()
        names = globals_of(node) if isinstance(node, ast.FunctionDef) else set()
        new = {name: helpers[name] for name in names & helpers.keys() if name not in used}
        used |= new
        waiting += new.values()
    return used


def door(function, defaults):
    """Where a function leads out of itself, or None. defaults: those that the reference file has."""
    for node in [*function.args.defaults, *filter(None, function.args.kw_defaults)]:
        if not is_literal(node) and ast.unparse(node) not in defaults:
            return f"line {node.lineno}: a default that is computed"    # during import
    outside = globals_of(function)
    found = []
    for node in ast.walk(function):
        word = ""
        if isinstance(node, ast.Name) and node.id in outside:
            word = node.id
        elif isinstance(node, (ast.Attribute, ast.FunctionDef)):
            word = node.attr if isinstance(node, ast.Attribute) else node.name
        if word in DOORS or word.startswith("__"):
            found.append((node.lineno, word))
        root = node
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        changed = root is not node and not isinstance(node.ctx, ast.Load) and isinstance(root, ast.Name)
        if isinstance(node, ast.Global) or changed and root.id in outside:
            found.append((node.lineno, f"a change of {ast.unparse(node)[:40]}"))
    return "line {}: {}".format(*min(found)) if found else None


def graft(reference, student, names):
    """The source of a reference file with these functions as a student's syntax tree has them, the names of
    those that it lacks, and {name: the door} of those that have one. In `reference` these functions are
    blank, and such ones stay so."""
    tree = ast.parse(reference)
    helpers = helpers_of(student, tree)
    ours, theirs = parts(tree), parts(student)
    added, missing, doors = {}, [], {}
    for name in names:
        if not isinstance(theirs.get(name), ast.FunctionDef):
            missing.append(name)
            continue
        function = plain(theirs[name])
        used = used_by(function, helpers)
        defaults = [ast.unparse(node) for node in ours[name].args.defaults]
        for node in [function, *used.values()]:
            if isinstance(node, ast.FunctionDef) and name not in doors and (where := door(node, defaults)):
                doors[name] = where
        if name not in doors:
            ours[name].args, ours[name].body = function.args, function.body
            added |= used
    tree.body += added.values()
    return ast.unparse(ast.fix_missing_locations(tree)), missing, doors


def left_behind(reference, student, names):
    """What a student's file has and no exercise takes, each with its line. names: the functions of all
    exercises in this file, and those that are blank in the student copy."""
    tree = ast.parse(reference)
    helpers = helpers_of(student, tree)
    ours, theirs = parts(tree), parts(student)
    taken = set(names)
    for name in names:
        if isinstance(theirs.get(name), ast.FunctionDef):
            taken |= used_by(plain(theirs[name]), helpers).keys()
    listed = []
    for name, node in theirs.items():
        is_constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in taken
        if name in taken and isinstance(node, ast.FunctionDef):
            known = [ast.unparse(mark) for mark in getattr(ours.get(name), "decorator_list", [])]
            listed += [(mark.lineno, f"@{ast.unparse(mark)}") for mark in node.decorator_list
                       if ast.unparse(mark) not in known]
            listed += [(child.lineno, ast.unparse(child)) for child in ast.walk(node)
                       if isinstance(child, (ast.Import, ast.ImportFrom)) and ast.unparse(child) not in ours]
        elif not is_constant and (name not in ours or ast.dump(node) != ast.dump(ours[name])):
            listed.append((node.lineno, name.splitlines()[0]))
    return [f"line {line}: {text[:60]}" for line, text in sorted(listed)]
