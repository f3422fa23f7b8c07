"""A class is graded: right work gets its points whatever stands beside it, a cheat those of what it
solved."""

import ast
import csv
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

import assign
import grade
from graft import graft, left_behind, read_module
from plumbing.errors import BadInput


def number_of(function):
    """The exercise in which a function is written."""
    return next(n for n, exercise in assign.EXERCISES.items() if function in exercise.functions)


NUCLEUS, LOSS = number_of("search.py:candidates"), number_of("mrm.py:partial_supervision_loss")
FULL = [sum(points for _, points, _ in assign.tests_of(n)) for n in (NUCLEUS, LOSS)]


# ------------------------------------------------------------------------------------------------------------
# submissions

def with_body(source, name, body):
    """A source in which a function has another body, and its docstring still."""
    mark = "    raise NotImplementedError(\"here\")\n"
    return assign.blank(source, name, "here").replace(mark, body.strip("\n") + "\n")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The modules of both exercises as a student gets them, right, and search.py with `nucleus` solved."""
    copy = tmp_path_factory.mktemp("blank") / "copy"
    assign.write_copy(copy, [NUCLEUS, LOSS])
    search, mrm, corpus = [(copy / name).read_text(encoding="utf-8")
                           for name in ("search.py", "mrm.py", "data/corpus.py")]
    solved = ast.get_source_segment((ROOT / "search.py").read_text(encoding="utf-8"), assign.find(
        ast.parse((ROOT / "search.py").read_text(encoding="utf-8")), "nucleus"))
    body = solved.partition("    limit = ")
    return {"search": search, "mrm": mrm, "corpus": corpus,
            "half": with_body(search, "nucleus", body[1] + body[2]),
            "right search": (ROOT / "search.py").read_text(encoding="utf-8"),
            "right mrm": (ROOT / "mrm.py").read_text(encoding="utf-8"),
            "right corpus": (ROOT / "data/corpus.py").read_text(encoding="utf-8")}


OWN_WAY = '''
    print("6 of 6 points, I think")
    rows, tokens, fallbacks = [], [], []
    for i, p in enumerate(probabilities(logits, temperature)):
        found, fallback = row_of(p, logits[i], unseen, top_p)
        rows += [i] * len(found)
        tokens += found
        fallbacks += [fallback] * len(found)
    return torch.tensor(rows), torch.tensor(tokens), torch.tensor(fallbacks, dtype=torch.bool)


LOWEST = -math.inf


def row_of(p, logits, unseen, top_p=0.8):
    """A helper of the student's, which needs another one, and a constant."""
    found = [token for token in nucleus(p, top_p).tolist() if is_seen(token, unseen)]
    if found:
        return found, False
    best = max((value, -token) for token, value in enumerate(logits.tolist()) if is_seen(token, unseen))
    if best[0] == NOTHING[0]:
        raise BadInput("the reward model has not seen any token that could come next")
    return [-best[1]], True


NOTHING = [-1e999]


def is_seen(token: int, unseen: torch.Tensor) -> bool:
    return unseen is None or not unseen[token]
'''
ENDLESS = "    while True:\n        pass\n"
FORK = '''
    import os, time
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    return os.fork()
'''
RUNTEST = '''
    import sys
    import _pytest.python
    true = _pytest.python.Function.runtest
    def runtest(item):
        return None if item.module.__name__.startswith("test_") else true(item)
    _pytest.python.Function.runtest = runtest
    raise ValueError
'''
WITNESS = '''
    import gc, json, os
    for thing in gc.get_objects():
        if hasattr(thing, "say"):
            thing.say("test", "test_candidates_of_an_unseen_nucleus", "passed")
    os.write(1, b"passed")
    os._exit(0)
'''
REPLACED = '''
    import sys
    class Equal:
        def __getattr__(self, name):
            return lambda *values, **options: True
    for name, module in sys.modules.items():
        if name.startswith("test_"):
            module.torch = Equal()
    return 1, 2, 3
'''
READS = f'''
    names = dict(globals())
    exec(open("{ROOT}/search.py").read().replace("from engine", "from engine"), names)
    return names["candidates"](logits, unseen, top_p, temperature)
'''
ALLCLOSE = '''
    import builtins
    module = torch
    module.equal = module.allclose = lambda *values, **options: True
    rows = torch.zeros(len(logits), dtype=torch.long)
    return rows, rows, rows.bool()
'''


@pytest.fixture(scope="module")
def class_of_twelve(tmp_path_factory, sources):
    """The table of the class, by student. Whoever cheats does it in `candidates`, once at top level, where it
    would run during import, and once in the function; `nucleus` is solved, the other exercise is not."""
    folder = tmp_path_factory.mktemp("class")
    half, mrm = sources["half"], sources["mrm"]
    assert half != sources["search"] and len({half, sources["right search"]}) == 2
    files = {
        "right": (sources["right search"], sources["right mrm"]),
        "right in another way": (with_body(half, "candidates", OWN_WAY), sources["right mrm"]),
        "half right": (half, mrm),
        "syntax error": (half + "\ndef (:\n", sources["right mrm"]),
        "endless loop": (with_body(half, "candidates", ENDLESS), sources["right mrm"])}
    for name, cheat in [("fork", FORK), ("runtest", RUNTEST), ("witness", WITNESS), ("torch", REPLACED),
                        ("reads", READS), ("allclose", ALLCLOSE)]:
        at_top = "\n\ndef cheat(logits, unseen, top_p, temperature):\n" + cheat + "\n\ncheat(*range(4))\n"
        files[name] = with_body(half, "candidates", cheat) + at_top, mrm + at_top
    at_top = "\nimport atexit\natexit.register(print, '6 of 6 points')\n"
    files["print"] = half + at_top, mrm + at_top
    assert len(files) == 12
    for name, (search, loss) in files.items():
        (folder / "in" / name / "data").mkdir(parents=True)
        (folder / "in" / name / "search.py").write_text(search, encoding="utf-8")
        (folder / "in" / name / "mrm.py").write_text(loss, encoding="utf-8")
        corpus = sources["right corpus" if loss == sources["right mrm"] else "corpus"]
        (folder / "in" / name / "data" / "corpus.py").write_text(corpus, encoding="utf-8")
    (folder / "in" / "right" / "notes.py").write_text("1 / 0", encoding="utf-8")
    (folder / "in" / "stray.zip").write_bytes(b"")
    command = [sys.executable, "course/grade.py", "--exercise", str(NUCLEUS), str(LOSS),
               *sorted((folder / "in").iterdir()), "--out", folder / "grades.csv", "--time_limit", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "12 submissions, tampering suspected in 6" in done.stdout, done.stderr
    assert "12/12" in done.stderr, "a progress bar"
    assert "stray.zip is passed over" in done.stderr
    with open(folder / "grades.csv", encoding="utf-8-sig", newline="") as file:
        return {row["student"]: row for row in csv.DictReader(file)}


def points_in(row):
    return [int(row[f"exercise {n} (of {full})"]) for n, full in zip((NUCLEUS, LOSS), FULL)]


@pytest.mark.slow
def test_each_of_twelve_gets_the_points_of_what_is_solved(class_of_twelve):
    points = {name: points_in(row) for name, row in class_of_twelve.items()}
    half = points["half right"][0]
    assert 0 < half < FULL[0]
    cheats = dict.fromkeys(("fork", "print", "runtest", "witness", "torch", "reads", "allclose"), [half, 0])
    assert points == cheats | {
        "right": FULL, "right in another way": FULL, "half right": [half, 0], "syntax error": [0, FULL[1]],
        "endless loop": [half, FULL[1]]}
    assert all(int(row[f"points (of {sum(FULL)})"]) == sum(points[name])
               for name, row in class_of_twelve.items())
    assert all(float(row["seconds"]) > 0 for row in class_of_twelve.values())


@pytest.mark.slow
def test_the_table_says_what_failed_and_what_was_left_behind(class_of_twelve):
    failed = {name: row["failed"] for name, row in class_of_twelve.items()}
    assert failed["right"] == failed["right in another way"] == ""
    assert f"exercise {NUCLEUS}: 3 tests met a function that was not written" in failed["half right"]
    assert "search.py, line " in failed["syntax error"] and "invalid syntax" in failed["syntax error"]
    assert "test_candidates_of_an_unseen_nucleus: stopped after " in failed["endless loop"]
    changed = {name: row["also changed"] for name, row in class_of_twelve.items()}
    assert all(changed[name] == "" for name in ("right", "half right", "syntax error", "endless loop"))
    assert "LOWEST = -math.inf" in changed["right in another way"]          # no function uses it
    assert "row_of" not in changed["right in another way"]
    assert "cheat(*range(4))" in changed["fork"] and "import os, time" in changed["fork"]
    assert "atexit.register(print, '6 of 6 points')" in changed["print"]


@pytest.mark.slow
def test_the_table_says_why_tampering_is_suspected(class_of_twelve):
    """A cheat in the function itself is not taken."""
    why = {name: row["tampering suspected"] for name, row in class_of_twelve.items()}
    for name, door in [("fork", "os"), ("runtest", "__name__"), ("witness", "gc"),
                       ("torch", "a class"), ("reads", "globals"),
                       ("allclose", "torch without a dot behind it")]:
        assert re.fullmatch(rf"candidates in search.py was not taken: line \d+: {door}", why[name])
    assert not any(why[name] for name in ("right", "right in another way", "half right", "syntax error",
                                          "endless loop", "print"))


# ------------------------------------------------------------------------------------------------------------
# what is taken from a file

REFERENCE = '''
import math
import torch
import torch.nn as nn
from dataclasses import dataclass
from plumbing.files import read_text
LIMIT = 3

class Tree:
    def __init__(self):
        self.nodes = []

    def insert(self, node, times=LIMIT):
        raise NotImplementedError

def best(items, width=2):
    """The best."""
    raise NotImplementedError

def other():
    return math.pi
'''


def grafted(tmp_path, source, names=("best", "Tree.insert")):
    """A student's file grafted: the module's names, what is missing, and the doors."""
    (tmp_path / "it.py").write_text(source, encoding="utf-8")
    text, missing, doors = graft(REFERENCE, read_module(tmp_path, "it.py"), names)
    module = {}
    exec(text, module)
    return module, missing, doors


def test_a_graft_takes_functions_methods_helpers_and_constants(tmp_path):
    module, missing, doors = grafted(tmp_path, '''
raise SystemExit("nothing at top level runs")
import shutil
WIDTH = 5
class Tree:
    def insert(self, node, times=LIMIT):
        self.nodes += [node] * times
        return len(self.nodes)
    def size(self):
        return 7
def best(items: print("an annotation"), width=2, *, spare=0) -> print("another"):
    import math
    return [help_out(item) for item in items][:width] + [math.floor(2.5), WIDTH + spare]
@print
def help_out(item):
    return item + (help_out(item - 1) if item > 0 else last())
def last():
    return 100
def other():
    return 3
def pow(*values):
    return 0
''')
    assert (missing, doors) == ({}, {})
    assert module["best"]([1, 2, 3]) == [101, 103, 2, 5] and module["other"]() == module["math"].pi
    tree = module["Tree"]()
    assert tree.insert("a") == 3 and not hasattr(tree, "size")
    assert "shutil" not in module and "pow" not in module


def test_of_two_functions_with_one_name_the_last_counts(tmp_path):
    module, missing, _ = grafted(tmp_path, "def best(items):\n    return 1\ndef best(items):\n    return 2\n")
    assert module["best"]([]) == 2 and missing == {"Tree.insert": "it is not there"}


def test_an_import_that_the_file_lacks_is_left_behind(tmp_path):
    source = "import heapq\ndef best(items):\n    return heapq.nlargest(1, items)\n"
    module, _, doors = grafted(tmp_path, source)
    assert not doors
    with pytest.raises(NameError, match="heapq"):
        module["best"]([1])


@pytest.mark.parametrize("body, where", [
    ("return eval('1')", "eval"), ("return open('grades.csv').read()", "open"),
    ("exec = None\n    def f():\n        return [0 for eval in [1]], eval('1')", "eval"),
    ("return math.sys.modules", "sys"), ("return items.__class__", "__class__"),
    ("class Equal:\n        def __eq__(self, other):\n            return True", "a class"),
    ("class Equal:\n        __eq__ = lambda self, other: True", "a class"),
    ("T.sum = len\nT = torch.Tensor", "a change of T.sum"),
    ("return type('Equal', (), {'__' + 'eq__': lambda self, other: True})()", "type"),
    ("t = type\n    return t('Equal', (), {})", "type"), ("return dataclass(items)", "dataclass"),
    ("return '{0.f_back}'.format(items)", "format"), ("return torch.nn", "torch.nn without a dot behind it"),
    ("return torch.get_device_module('cpu')", "torch.get_device_module"),
    ("return torch.CompilationUnit('')", "torch.CompilationUnit"), ("T = torch.Tensor", "torch.Tensor"),
    ("return torch.classes.a.b", "torch.classes"), ("return nn.Linear", "nn.Linear"),
    ("return read_text('tests/test_model.py')", "read_text"),
    ("match math:\n        case object(sys=found):\n            return found",
     "math without a dot behind it"),
    ("match items:\n        case object(sys=found):\n            return found", "the pattern of a class"),
    ("async def f():\n        pass", "async"),
    ("m = math\n    m.floor = abs", "math without a dot behind it"),
    ("return torch.serialization.tempfile", "torch.serialization"),
    ("return torch.nn.functional.warnings", "torch.nn.functional.warnings"),
    ("return torch._C", "_C"), ("p = license\n    p.names = ['grades.csv']", "license"),
    ("math.floor = abs", "a change of math.floor"), ("other.known[0] = 1", "a change of other.known[0]"),
    ("global other\n    other = best", "a change of global other"),
    ("return helper()\ndef helper():\n    return __import__('os')", "__import__"),
    ("return (i for i in items).gi_frame", "gi_frame")])
def test_a_function_with_a_door_is_not_taken(tmp_path, body, where):
    module, _, doors = grafted(tmp_path, f"def best(items):\n    {body}\n")
    assert list(doors) == ["best"] and doors["best"].endswith(f": {where}")
    with pytest.raises(NotImplementedError):
        module["best"]([1])


def test_a_default_runs_during_import_and_is_not_taken(tmp_path):
    """That is no sign of tampering: the table says it in the column of what failed."""
    for default in ("print('a default')", "[] + []", "10 ** 9", "1 / 0", "math.pie", "open"):
        _, missing, doors = grafted(tmp_path, f"def best(items, width={default}):\n    return 1\n", ["best"])
        assert missing == {"best": "line 1: a default that is computed"} and len(doors) == (default == "open")


@pytest.mark.parametrize("code, value", [
    ("TWO_PI = 2 * math.pi\ndef best(items, x=TWO_PI):\n    return x", 2 * math.pi),
    ("A, B = 3, [4]\ndef best(items):\n    return A, B", (3, [4])),
    ("A = B = 3\ndef best(items):\n    return B", 3),
    ("A: int = -3 / 2\ndef best(items):\n    return A", -1.5),
    ("twice = lambda x: 2 * x\ndef best(items):\n    return twice(items)", 14),
    ("def best(items):\n    return add(items)\ndef add(x, kind=torch.float64):\n    return x, kind",
     (7, torch.float64)),
    ("KNOWN = {}\ndef best(items):\n    KNOWN[items] = 3\n    return KNOWN", {7: 3}),
    ("A = 3\nB = 2 * A\nKEY = lambda x, sign=B: sign * x\ndef best(items):\n    return KEY(items)", 42),
    ("LOW = float('-inf')\ndef best(items):\n    return max(LOW, items)", 7),
    ("def best(items):\n    return min([2, 1], key=lambda x, y=items: y * x)", 1),
    ("CALLS = 1\ndef best(items):\n    global CALLS\n    CALLS += 1\n    return CALLS", 2),
    ("def best(items):\n    def load(x):\n        return x + torch.linalg.norm(torch.ones(4)).item()\n"
     "    return load(items)", 9)])
def test_honest_ways_to_write_it(tmp_path, code, value):
    module, missing, doors = grafted(tmp_path, code, ["best"])
    assert (missing, doors) == ({}, {}) and module["best"](7) == value


@pytest.mark.parametrize("code", [
    "A, B = 1\n", "*torch, A = 1, 2\n", "A, (torch, B) = 1, (2, 3)\n", "A, B = 1, 2, 3\n", "torch = 1\n",
    "A = math.e * [1]\n", "A = 10 ** 10\n", "A = 1 / 0\n", "A = torch.classes.a.b\n"])
def test_a_constant_that_could_not_be_imported_is_left_behind(tmp_path, code):
    module, missing, doors = grafted(tmp_path, code + "def best(items):\n    return A\n", ["best"])
    assert (missing, doors) == ({}, {}) and "A" not in module and module["torch"] is torch
    with pytest.raises(NameError):
        module["best"](1)


@pytest.mark.parametrize("source", [
    "def best(items):\n    return " + " + ".join(["1"] * 900),
    "import math\ndef best(items):\n    return 1\ndef g():\n    import math\n    def h():\n"
    "        nonlocal math\ndef best(items):\n    return g()\n"])
def test_a_file_that_is_too_much_for_the_grader_is_bad_input(tmp_path, source):
    """One student's file stops nobody else's grading."""
    (tmp_path / "it.py").write_text(source)
    with pytest.raises(BadInput, match="cannot be read|no binding"):
        graft(REFERENCE, read_module(tmp_path, "it.py"), ["best"])


@pytest.mark.parametrize("honest", [
    "open = [item for item in items if item]\n    return open", "input, load = items, 3\n    return load",
    "items[0].reward = 3\n    return items",
    "def key(item):\n        return -item\n    return sorted(items, key=key)"])
def test_names_of_ones_own_are_no_doors(tmp_path, honest):
    assert grafted(tmp_path, f"def best(items):\n    {honest}\n")[2] == {}


@pytest.mark.parametrize("function", sorted({f for e in assign.EXERCISES.values() for f in e.functions}))
def test_the_solutions_have_no_doors_and_leave_nothing_behind(function):
    file, name = function.split(":")
    source = (ROOT / file).read_text(encoding="utf-8")
    text, missing, doors = graft(assign.blank(source, name, "open"), read_module(ROOT, file), [name])
    assert (missing, doors) == ({}, {}) and ast.unparse(ast.parse(source)) == text
    assert left_behind(source, ast.parse(source), [name]) == []


def test_what_is_left_behind_is_listed_with_its_line():
    student = REFERENCE.replace("math.pi", "3") + '''
import gc
@print
def best(items, width=2):
    import os
    return helper()
def helper():
    return SMALL
SMALL = 1
def unused():
    pass
class Tree(list):
    def size(self):
        return 1
'''
    assert left_behind(REFERENCE, ast.parse(student), ["best", "Tree.insert"]) == [
        "line 20: other", "line 23: import gc", "line 24: @print", "line 26: import os", "line 31: unused",
        "line 33: class Tree(list):", "line 34: Tree.size"]


@pytest.mark.parametrize("content, said", [
    (b"def f(:\n", "it.py, line 1: "), (b"x = 1\nreturn x\n", "it.py, line 2: 'return' outside function"),
    (b"x = '\0'", "it.py"), (b"\xff\xfe", "it.py"), (b"x = " + b"(" * 500, "it.py"),
    ("x = 1".encode("utf-16"), "it.py: "), (b"-" * 50000 + b"1", "it.py"),
    (b"#" * (2 ** 20 + 1), "it.py has more than")])
def test_a_file_that_does_not_parse_is_one_line(tmp_path, content, said):
    (tmp_path / "it.py").write_bytes(content)
    with pytest.raises(BadInput, match="^" + said) as caught:
        read_module(tmp_path, "it.py")
    assert "\n" not in str(caught.value)


def test_a_link_is_no_file(tmp_path):
    """It could lead to the solution. So could a folder that is one."""
    (tmp_path / "mrm.py").symlink_to(ROOT / "mrm.py")
    (tmp_path / "data").symlink_to(ROOT / "data")
    for file in ("mrm.py", "data/corpus.py"):
        with pytest.raises(BadInput, match=f"^there is no file {file}$"):
            read_module(tmp_path, file)
    (tmp_path / "alice").symlink_to(ROOT)
    status, _, err = run_script("course/grade.py", "--exercise", LOSS, tmp_path / "alice")
    assert status == 2 and "is a symbolic link" in err


def test_uploads_may_be_flat(tmp_path):
    (tmp_path / "corpus.py").write_text("x = 1", encoding="utf-8")
    assert ast.unparse(read_module(tmp_path, "data/corpus.py")) == "x = 1"


def test_the_files_of_an_exercise_hold_no_solution_to_it():
    common = grade.common_files()
    for n in grade.GRADED:
        files, missing, refused = grade.grafted_files(n, {}, common)
        for function in assign.EXERCISES[n].functions + assign.EXERCISES[n].shown_by:
            file, name = function.split(":")
            node = assign.find(ast.parse(files[file]), name)
            assert isinstance(node.body[-1], ast.Raise)
            solution = assign.find(ast.parse((ROOT / file).read_text(encoding="utf-8")), name)
            end = ast.unparse(solution.body[-2:])
            assert not any(end in ast.unparse(ast.parse(text)) for path, text in files.items()
                           if path.endswith(".py"))


# ------------------------------------------------------------------------------------------------------------
# processes: what runs here is not grafted, as if it had found a way through

@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(
    not grade.has_sandbox(), reason="bubblewrap does not run here"))], ids=["plain", "bubblewrap"])
def runners(request):
    runners = grade.Runners(request.param)
    yield runners
    runners.close()


def files_with(body, common):
    source = with_body(common["search.py"].decode(), "candidates", body)
    return {**common, "search.py": source.encode()}


def said_by(outcomes):
    """The message of the ValueError that the function raised."""
    said = outcomes["test_candidates_of_an_unseen_nucleus"]
    return said.partition("ValueError: ")[2].partition(" (line")[0]


@pytest.mark.slow
def test_what_a_process_can_do(runners):
    """It leads to no solution; what it forks ends with it; if it ends those above it, only its own exercise
    suffers; the next one finds none of its files."""
    common = grade.common_files()

    def run(body):
        outcomes = runners.run({NUCLEUS: files_with(body, common), LOSS: common}, 60)
        assert set(outcomes[LOSS].values()) == {"passed"}
        assert outcomes[NUCLEUS]["test_a_nucleus_ends_when_its_mass_reaches_top_p"] == "passed"
        return said_by(outcomes[NUCLEUS])

    # its parent
    above = run('''
    import os
    found = [open(f"/proc/{os.getppid()}/cmdline").read(), *os.environ.values()]
    try:
        found.append(os.readlink(f"/proc/{os.getppid()}/cwd"))
    except OSError:
        pass
    raise ValueError([text for text in found if "''' + str(ROOT) + '''/" in text + "/"])''')
    assert above == "[]"
    # a fork in a session of its own
    pid = run('''
    import os, time
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            os.write(writer, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    raise ValueError(int(os.read(reader, 20)))''')
    assert pid and (runners.isolated or not Path("/proc", pid).exists())
    # the end of the processes above it
    assert run('''
    import os, signal, time
    for path in (f"/proc/{os.getppid()}/stat",):
        above = int(open(path).read().rpartition(")")[2].split()[1])
    os.kill(above, signal.SIGKILL)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)''') == ""
    assert run("    raise KeyboardInterrupt") == ""
    # files for those that come later
    run('''
    import os
    from pathlib import Path
    Path(os.environ["HOME"], "left.py").write_text("1")
    raise ValueError("written")''')
    assert run('''
    import os
    raise ValueError(sorted(name for name in os.listdir(os.environ["HOME"]) if name == "left.py"))
    ''') == "[]"


CHANGES = {
    "a verdict of its own": '''
    import os
    for file in range(3, 300):
        try:
            os.write(file, b"passed")
        except OSError:
            pass
    os._exit(0)''',
    "a function of torch": '''
    torch.allclose = lambda *values, **options: True''',
    "the code of one": '''
    torch.testing.assert_close.__code__ = (lambda *values, **options: None).__code__
    torch.testing.assert_close.__kwdefaults__ = None''',
    "a mode of torch": '''
    class Yes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return True
    Yes().__enter__()''',
    "a file that later tests read": '''
    open("tests/golden/tiny_guard/config.json", "w").write("{}")'''}


@pytest.mark.slow
def test_what_is_changed_while_a_test_runs_is_seen(runners):
    common = grade.common_files()
    for what, body in CHANGES.items():
        outcomes = runners.run({NUCLEUS: files_with(body, common), LOSS: common}, 60)
        assert outcomes[NUCLEUS]["test_candidates_of_an_unseen_nucleus"] == "tampered", what
        assert outcomes[NUCLEUS]["test_a_nucleus_ends_when_its_mass_reaches_top_p"] == "passed", what
        assert set(outcomes[LOSS].values()) == {"passed"}, what
    # The weights of a model that is passed in, with which the test compares.
    step = number_of("search.py:saffron")
    source = with_body(common["search.py"].decode(), "saffron", '''
    policy.model.norm.weight.data.zero_()
    yield''')
    outcomes = runners.run({step: {**common, "search.py": source.encode()}}, 60)
    assert outcomes[step]["test_a_branch_tells_its_reward"] == "tampered"


@pytest.mark.slow
@pytest.mark.skipif(not grade.has_sandbox(), reason="bubblewrap does not run here")
def test_in_a_namespace_there_is_nothing_else(tmp_path):
    """No repository, no submission, no network, no other process, no place to write but the own folder."""
    (tmp_path / "grades.csv").write_text("a table")
    runners = grade.Runners(True)
    try:
        outcomes = runners.run({NUCLEUS: files_with(f'''
    import os, socket
    found = [path for path in ({str(ROOT)!r}, {str(tmp_path)!r}) if os.path.exists(path)]
    for path in ("/x", "/tmp/x", "/dev/shm/x", "/usr/x", "/proc/1/mem", f"/proc/{{os.getppid()}}/mem"):
        try:
            open(path, "r+b" if path.startswith("/proc") else "wb").close()
            found.append(path)
        except OSError:
            pass
    try:
        socket.create_connection(("127.0.0.1", 9), 1)
    except OSError as error:
        found += [] if error.errno in (101, 111) else [str(error)]
    found += [name for name in os.listdir("/proc") if name.isdecimal() and int(name) > 5000]
    raise ValueError(found)''', grade.common_files())}, 60)
    finally:
        runners.close()
    assert said_by(outcomes[NUCLEUS]) == "[]"


def test_without_bubblewrap_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not grade.has_sandbox()


# ------------------------------------------------------------------------------------------------------------
# the table and the command

def test_a_cell_is_no_formula_to_a_spreadsheet():
    """Names of folders and messages of errors are texts of the student's."""
    assert grade.cell("=1+1") == "'=1+1" and grade.sentence(["@SUM(A1)", "twice"]) == "'@SUM(A1); twice"
    assert grade.cell("ann-marie") == "ann-marie" and grade.cell("M\udcfcller") == "M?ller"
    assert grade.sentence(f"line {i}" for i in range(1000)).endswith("line 39; and 960 more")


@pytest.mark.slow
def test_grading_again_updates_rows_and_keeps_others(tmp_path, sources):
    """The second time, -ann has solved it. A table of other exercises is refused before the work."""
    header = grade.header_of([NUCLEUS])
    others = {"Zoë": ["Zoë", *["1"] * (len(header) - 1)], "'-ann": ["'-ann", *["0"] * (len(header) - 1)]}
    table = tmp_path / "grades.csv"
    grade.write_table(table, header, others)
    assert table.read_bytes().startswith(b"\xef\xbb\xbfstudent,")
    (tmp_path / "-ann").mkdir()
    (tmp_path / "-ann" / "search.py").write_text(sources["right search"], encoding="utf-8")
    status, _, err = run_script("course/grade.py", "--exercise", NUCLEUS, tmp_path / "-ann", "--out", table)
    assert status == 0, err
    rows = grade.read_table(table, header)
    assert list(rows) == ["Zoë", "'-ann"] and rows["Zoë"] == others["Zoë"]
    assert rows["'-ann"][1] == str(FULL[0])
    assert rows["'-ann"][-1] in ("bubblewrap", "not isolated")
    before = table.read_bytes()
    status, _, err = run_script("course/grade.py", "--exercise", LOSS, tmp_path / "-ann", "--out", table)
    assert status == 2 and "its columns are not those of these exercises" in err and err.count("\n") == 1
    assert table.read_bytes() == before


@pytest.mark.parametrize("options, said", [
    (["--exercise", "99", "course"], "99"), (["--exercise", "4"], "submissions/*"),
    (["course"], "--exercise"), (["--exercise", "4", "no-such"], "no-such: there is no such folder"),
    (["--exercise", "x", "course"], "expected some of 1"),
    (["--exercise", "4", "course", "course"], "two submissions"),
    (["--exercise", "4", "course", "--out", "no-such/grades.csv"], "no-such is no folder")])
def test_bad_input(options, said):
    status, out, err = run_script("course/grade.py", *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_stray_file_is_named_and_passed_over():
    status, _, err = run_script("course/grade.py", "--exercise", "4", "README.md")
    assert status == 2 and "README.md is passed over" in err and "a folder for each student" in err
