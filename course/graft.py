"""
What is taken from a submission: the functions that an exercise names, put into the reference file.

From the syntax tree of a student's file, `graft` takes

- the arguments and bodies of the functions and methods that the exercise names;
- new functions at top level that these call, and new constants there: literals, attributes of modules,
  numbers computed from these, and lambdas (LIMIT = 4, TWO_PI = 2 * math.pi).

Everything else is left behind, and `left_behind` lists it: other code at top level, imports, decorators, new
classes and methods, changes of other functions. (Annotations too, which nobody misses.) So nothing of the
student's runs while the file is imported. A function with a door, which is a name that leads out of it and
that no exercise needs, counts as not written.
"""

import ast
import builtins
import contextlib
import copy
import functools
import importlib
import operator
import symtable
import types
import warnings

import torch

from plumbing.errors import BadInput

LARGEST = 2 ** 20                           # bytes of a file that is read
# Doors lead to files, to other modules, to the code that calls a function. So do attributes with _ in front,
# and what is imported from plumbing. A class, or what makes one, can equal all that it is compared with.
DOORS = set("""exec eval compile open input breakpoint globals locals vars getattr setattr delattr help
    license credits copyright os sys gc io builtins importlib inspect subprocess ctypes pickle signal shutil
    pathlib Path socket threading multiprocessing testing hub library load load_inline save savez
    savez_compressed savetxt dump dumps from_file fromfile tofile fromregex loadtxt genfromtxt memmap
    DataSource gi_frame gi_code cr_frame ag_frame tb_frame f_back f_code f_globals f_locals f_builtins
    format format_map operator attrgetter methodcaller update_wrapper wraps type dataclass
    NamedTuple""".split())
REFUSED = {ast.ClassDef: "a class", ast.MatchClass: "the pattern of a class", ast.AsyncFunctionDef: "async"}
SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MODULES = {"nn", "functional", "linalg", "special", "fft"}      # modules inside of others that are no doors
# What a function may name of torch itself: functions of tensors, number types, and these.
OF_TORCH = {*dir(torch._C._VariableFunctions), "tensor", "Generator", "no_grad", "inf", "nan", "pi", "finfo",
            "iinfo", "nn", *MODULES}


@contextlib.contextmanager
def reading_code(name):
    """Turns what Python raises for a file that is wrong, or too large for it, into BadInput with one line."""
    try:
        yield
    except BadInput:                                                    # it is one line already
        raise
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise BadInput(f"{name}{line}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError, OverflowError, OSError) as error:
        raise BadInput(f"{name} cannot be read ({type(error).__name__}: {error})") from None


def read_module(folder, file):
    """The syntax tree of a student's file: folder/file or, where uploads are flat, folder and its last name.
    Raises BadInput with one line, which says where the mistake is."""
    with reading_code(file), warnings.catch_warnings(action="ignore"):
        path = folder / file
        if not path.exists():
            path = folder / path.name
        if not path.is_file() or path.resolve() != folder.resolve() / path.relative_to(folder):
            raise BadInput(f"there is no file {file}")                  # a link could lead to the solution
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{file} has more than {LARGEST} bytes")
        content = path.read_bytes()
        compile(content, path.name, "exec", dont_inherit=True)          # finds what the parser does not
        tree = ast.parse(content)
        ast.unparse(tree)                                               # as is done with parts of it later
        return tree


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


@functools.cache
def imports_of(source):
    """What a reference file imports: {name: module} of modules, and the names that come from plumbing."""
    modules, doors = {}, set()
    for node in ast.parse(source).body:
        for alias in getattr(node, "names", []):
            name = alias.asname or alias.name
            if isinstance(node, ast.Import):
                modules[name] = importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                thing = getattr(importlib.import_module(node.module), alias.name)
                if isinstance(thing, types.ModuleType):
                    modules[name] = thing
                elif node.module.startswith("plumbing.") and node.module != "plumbing.errors":
                    doors.add(name)
    return modules, doors


def thing_at(node, modules):
    """What `torch.nn.functional.relu` stands for, if it begins with a module and is there; else None."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    above = thing_at(node.value, modules) if isinstance(node, ast.Attribute) else None
    try:
        return None if above is None else getattr(above, node.attr, None)
    except Exception:                                   # torch makes some attributes when they are asked for
        return None


def is_literal(node):
    """Whether an expression is a literal, float("inf") included."""
    try:
        ast.literal_eval(node)
        return True
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.unparse(node).lower() in ("float('inf')", "float('-inf')", "float('nan')")


def number_of(node, modules, numbers):
    """The value of a number made of numbers, of those of modules (math.pi) and of `numbers` ({name: value}).
    No powers: a large one takes forever. Raises ValueError or ArithmeticError."""
    value = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.Name):
        value = numbers.get(node.id)
    elif isinstance(node, ast.Attribute) and not door(node, modules):
        value = thing_at(node, modules)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -number_of(node.operand, modules, numbers)
    elif isinstance(node, ast.BinOp) and type(node.op) in SUMS:
        value = SUMS[type(node.op)](*(number_of(side, modules, numbers) for side in (node.left, node.right)))
    if type(value) not in (int, float):
        raise ValueError("no number")
    return value


def is_plain(node, modules, numbers):
    """Whether an expression may be computed during import: a literal, an attribute of a module, a number."""
    if is_literal(node):
        return True
    if isinstance(node, ast.Attribute):
        return thing_at(node, modules) is not None and not door(node, modules)
    try:
        number_of(node, modules, numbers)
        return True
    except (ValueError, ArithmeticError):
        return False


class Plain(ast.NodeTransformer):
    """Takes out of a function the annotations of its arguments, and imports: modules that the reference file
    imports are there without."""

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


def globals_of(node):
    """The names that a function, a lambda or a constant finds outside of itself: in its module, or in
    builtins."""
    module = symtable.symtable(ast.unparse(node), "part of a module", "exec")
    names = {symbol.get_name() for symbol in module.get_symbols() if not symbol.is_assigned()}      # defaults
    tables = module.get_children()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def targets_of(node):
    """The names that an assignment at top level gives values to: a and b of `a = b = 1` and of `a, b = 1, 2`.
    None for other shapes, and for what is no assignment."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = []
    for target in targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            if len(target.elts) != len(node.value.elts):
                return []
            names += target.elts
        else:
            names.append(target)
    return [name.id for name in names] if all(isinstance(name, ast.Name) for name in names) else []


def helpers_of(student, reference):
    """{name: node} of new functions and constants at top level, and {name: value} of constants that are
    numbers. reference: the source of the file."""
    known = symtable.symtable(reference, "reference", "exec").get_identifiers()
    known = {*known, *dir(builtins)}
    modules, _ = imports_of(reference)
    helpers, numbers = {}, {}
    for node in student.body:
        if isinstance(node, ast.FunctionDef) and node.name not in known:
            helpers[node.name] = plain(node)
        if isinstance(node, ast.AnnAssign) and node.value:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        names = targets_of(node)
        if not isinstance(node, ast.Assign) or not names or known & {*names}:
            continue
        if isinstance(node.value, ast.Lambda) or is_plain(node.value, modules, numbers):
            helpers |= dict.fromkeys(names, node)
            with contextlib.suppress(ValueError, ArithmeticError):
                numbers[names[0]] = number_of(node.value, modules, numbers)
    return helpers, numbers


def used_by(function, helpers):
    """{name: node} of the helpers that a function uses, and of those that these use."""
    used, waiting = {}, [function]
    while waiting:
        new = {name: helpers[name] for name in globals_of(waiting.pop()) & helpers.keys() if name not in used}
        used |= new
        waiting += new.values()
    return used


def computed_default(node, modules, numbers, allowed):
    """Where a function, or the lambda of a constant, has a default that would have to be computed during
    import, or None. allowed: the texts of some that need not."""
    arguments = getattr(node if isinstance(node, ast.FunctionDef) else node.value, "args", None)
    if isinstance(arguments, ast.arguments):
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            if not is_plain(default, modules, numbers) and ast.unparse(default) not in allowed:
                return f"line {default.lineno}: a default that is computed"
    return None


def door(part, modules, doors=frozenset(), own=frozenset()):
    """Where a function, or another part of a file, leads out of itself, or None. doors: names of the file
    that are doors too. own: the names of the student's constants that it may change."""
    outside = globals_of(part)
    modules = {name: modules[name] for name in outside & modules.keys()}        # others are names of its own
    before_a_dot = {id(node.value) for node in ast.walk(part) if isinstance(node, ast.Attribute)}
    found = []
    for node in ast.walk(part):
        word = door_of(node, outside, modules) or change_of(node, outside - own)
        if isinstance(node, ast.Name) and node.id in outside & doors:
            word = node.id
        if isinstance(thing_at(node, modules), types.ModuleType) and id(node) not in before_a_dot:
            word = word or f"{ast.unparse(node)} without a dot behind it"       # an alias could be anything
        if word:
            found.append((node.lineno, word))
    return "line {}: {}".format(*min(found)) if found else None


def door_of(node, outside, modules):
    """What a node of the syntax tree leads to, or None. outside: the names that are global in it."""
    if type(node) in REFUSED:
        return REFUSED[type(node)]
    if isinstance(node, ast.FunctionDef) and node.name.startswith("__"):
        return node.name
    if isinstance(node, ast.Name) and node.id in outside and (node.id in DOORS or node.id.startswith("__")):
        return node.id
    if isinstance(node, ast.Attribute):
        is_of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
        if node.attr in DOORS or node.attr.startswith("__" if is_of_self else "_"):
            return node.attr
        above = thing_at(node.value, modules)
        thing = thing_at(node, modules)
        is_named = above is torch and node.attr not in OF_TORCH and not isinstance(thing, torch.dtype)
        if is_named or above is torch.nn and node.attr not in MODULES:
            return ast.unparse(node)
        if isinstance(thing, types.ModuleType) and node.attr not in MODULES:
            return ast.unparse(node)
    return None


def change_of(node, names):
    """Which of these global names, or of the things that they stand for, a node changes, or None."""
    root = node
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    is_store = root is not node and not isinstance(node.ctx, ast.Load)
    if is_store and isinstance(root, ast.Name) and root.id in names:
        return f"a change of {ast.unparse(node)[:40]}"
    if isinstance(node, ast.Global) and names & {*node.names}:
        return f"a change of {ast.unparse(node)[:40]}"
    return None


def graft(reference, student, names):
    """The source of a reference file with these functions as a student's syntax tree has them, {name: why} of
    those that are not there or were not taken, and {name: the door} of those that have one. In `reference`
    these functions are blank, and such ones stay so. Raises BadInput."""
    with reading_code("a function"):
        tree = ast.parse(reference)
        modules, from_plumbing = imports_of(reference)
        helpers, numbers = helpers_of(student, reference)
        constants = {name: node.value for name, node in helpers.items() if isinstance(node, ast.Assign)}
        own = {name for name, value in constants.items() if is_literal(value)}
        ours, theirs = parts(tree), parts(student)
        added, missing, doors = {}, {}, {}
        for name in names:
            if not isinstance(theirs.get(name), ast.FunctionDef):
                missing[name] = "it is not there"
                continue
            function = plain(theirs[name])
            used = used_by(function, helpers)
            allowed = {*constants, *map(ast.unparse, ours[name].args.defaults)}
            for node in [function, *used.values()]:
                if why := computed_default(node, modules, numbers, allowed):
                    missing.setdefault(name, why)
                if where := door(node, modules, from_plumbing, own):
                    doors.setdefault(name, where)
            if name not in missing and name not in doors:
                ours[name].args, ours[name].body = function.args, function.body
                added |= used
        # In the student's order. Constants stand above the functions, whose defaults they may be.
        imports = [i for i, node in enumerate(tree.body) if isinstance(node, (ast.Import, ast.ImportFrom))]
        place = imports[-1] + 1 if imports else 0
        new = sorted({id(node): node for node in added.values()}.values(), key=lambda node: node.lineno)
        tree.body[place:place] = [node for node in new if isinstance(node, ast.Assign)]
        tree.body += [node for node in new if not isinstance(node, ast.Assign)]
        return ast.unparse(ast.fix_missing_locations(tree)), missing, doors


def refused(source, names):
    """{name: why} of those functions of a student's file that `graft` would not take as they stand. It needs
    no reference, so students can ask. Raises BadInput."""
    tree = ast.parse(source)
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kept) or getattr(node, "name", None) in names]
    _, missing, doors = graft(ast.unparse(tree), ast.parse(source), names)
    return missing | doors


def left_behind(reference, student, names):
    """What a student's file has and no exercise takes, each with its line. names: the functions of all
    exercises in this file, and those that are blank in the student copy. Raises BadInput."""
    with reading_code("a function"):
        helpers, _ = helpers_of(student, reference)
        ours, theirs = parts(ast.parse(reference)), parts(student)
        taken = set(names)
        for name in names:
            if isinstance(theirs.get(name), ast.FunctionDef):
                taken |= used_by(plain(theirs[name]), helpers).keys()
        listed = []
        for name, node in theirs.items():
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_taken_constant = name not in names and taken & {*targets_of(node)}
            if name in taken and isinstance(node, ast.FunctionDef):
                known = [ast.unparse(mark) for mark in getattr(ours.get(name), "decorator_list", [])]
                listed += [(mark.lineno, f"@{ast.unparse(mark)}") for mark in node.decorator_list
                           if ast.unparse(mark) not in known]
                imports = [child for child in ast.walk(node)
                           if isinstance(child, (ast.Import, ast.ImportFrom))]
                listed += [(child.lineno, ast.unparse(child)) for child in imports
                           if ast.unparse(child) not in ours]
            elif not is_text and not is_taken_constant and (
                    name not in ours or ast.dump(node) != ast.dump(ours[name])):
                listed.append((node.lineno, name.splitlines()[0]))
        return [f"line {line}: {text[:60]}" for line, text in sorted(listed)]
