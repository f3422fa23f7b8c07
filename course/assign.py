"""
Write a student copy of this repository, in which chosen functions are left to be written.

    python course/assign.py --out DIR                    all exercises
    python course/assign.py --out DIR --exercise 1 4     some of them
    python course/assign.py --out DIR --week 1 2 --week 3 --week 4 5 6
    python -m pytest tests --exercise 4                 in the copy: grade one, or several

The copy has the modules with those bodies replaced by NotImplementedError("exercise N: ..."), signature and
docstring kept; HANDOUT.md, a page for each exercise; the tests that check exercises, without those that would
show a solution; and what is needed to run it. Bodies are found in the syntax tree, so the code needs no
markers. An exercise's points are those of its tests, which carry the mark exercise(N, points=P). Those of
tests with bonus=True too are beside them; a report's are graded by the teacher.

A copy with some exercises holds the solutions of all others. With --week once for each week, the copies are
DIR/week1, DIR/week2 and so on, and the exercises of all weeks are open in each: students take along what they
wrote before. grade.py grades a class.

DIR lies outside this repository, or where git ignores it: its files would be taken for the repository's.
"""

import ast
import functools
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plumbing.start import run  # noqa: E402

from graft import DOORS  # noqa: E402
from plumbing.errors import BadInput  # noqa: E402
from plumbing.parser import Parser  # noqa: E402

# All that a copy has, but for the tests of exercises, pytest.ini and HANDOUT.md.
# Nothing else is copied: no history, no file of the lecturer's.
MODULES = "model trie_cache engine mrm search baselines saffron train_mrm sample eval"
COPIED = [f"{name}.py" for name in MODULES.split()] + [
    "plumbing/*.py", "plumbing/page.html", "README.md", "LICENSE", "CITATION.cff", "requirements.txt",
    ".gitignore", "docs/*", "results/*.py", "results/*.json", "results/*.png", "data/*.py",
    "data/*/prepare.py", "data/*/readme.md", "data/safety_labels/*.txt",
    "data/prompts/*.jsonl", "data/smollm2/guard.safetensors", "data/smollm2/judge.safetensors",
    "data/smollm2/mrm.safetensors", "course/graft.py",
    "tests/conftest.py", "tests/golden/*", "tests/golden/*/*"]
LECTURERS = ["docs/teach.md"]       # it says how grading can be fooled
TESTS = [f"tests/test_{name}.py" for name in "model trie_cache mrm saffron searches costs".split()]
PYTEST_INI = """[pytest]
testpaths = tests
# a test that takes so many seconds prints at which line it is: an endless loop shows itself
faulthandler_timeout = 30
# what failed, and where, without the functions above it
addopts = --tb=short
# what is to be written: after a run, those are named that grading would not take
exercise_functions =
"""


@dataclass
class Exercise:
    title: str
    level: str
    minutes: int                                        # of a student's work; of an open-ended one, at least
    computing: int = 0                                  # minutes besides, in which a laptop computes
    # to be written: "file.py:function", "file.py:Class.function"
    functions: list = field(default_factory=list)
    shown_by: list = field(default_factory=list)        # others that would show how; they are blanked too
    needs: list = field(default_factory=list)           # exercises without which some of its tests cannot run
    report: int = 0                                     # points of its report


EXERCISES = {
    1: Exercise("rotary embedding", "easy", 60,
                functions=["model.py:rotary_frequencies", "model.py:rotate"]),
    2: Exercise("grouped-query attention under a tree mask", "easy", 45,
                functions=["trie_cache.py:TrieCache.attend"], shown_by=["results/bench.py:CopyCache.attend"]),
    3: Exercise("trie lookup and slots", "medium", 150,
                functions=["trie_cache.py:TrieCache.insert", "trie_cache.py:TrieCache.take_slot",
                           "trie_cache.py:TrieCache.mask", "trie_cache.py:TrieCache.prune"], needs=[1, 2]),
    4: Exercise("nucleus candidates", "medium", 90,
                functions=["search.py:nucleus", "search.py:candidates"],
                shown_by=["saffron.py:nucleus", "saffron.py:saffron_frontiers"]),
    5: Exercise("partial supervision, the loss and its batch", "medium", 90,
                functions=["mrm.py:partial_supervision_loss", "mrm.py:MRM.child_rewards",
                           "data/corpus.py:collate", "data/corpus.py:Batch.supervised"], needs=[1]),
    6: Exercise("what M knows", "easy", 75, computing=5,
                functions=["mrm.py:unseen_tokens", "mrm.py:MRM.conservative_rewards"], needs=[1], report=5),
    7: Exercise("the saffron step", "hard", 180, functions=["search.py:saffron", "search.py:best"],
                shown_by=["saffron.py:saffron_frontiers"], needs=[1, 2, 3, 4, 5]),
    8: Exercise("reward-balanced search", "hard", 120,
                functions=["baselines.py:rebase", "baselines.py:shares"], needs=[1, 2, 3, 4]),
    9: Exercise("a better rule for unseen tokens", "research, open-ended", 1200, computing=120, report=20),
    10: Exercise("a search of your own", "research, open-ended", 1200, computing=120, report=20),
    11: Exercise("the dilemma, and over-optimization", "medium", 150, computing=45,
                 functions=["results/dilemma.py:predicted_cost", "results/dilemma.py:predicted_flops"],
                 needs=[1, 2, 3, 4, 5, 7, 8], report=10),
    12: Exercise("the search's own states", "medium", 90, computing=40, report=12),
}


# ------------------------------------------------------------------------------------------------------------
# source code without some of its parts

def find(tree, name):
    """The function of a syntax tree that is called so, "f" or "Class.f"."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def blank(source, name, message):
    """The source, with that function's body replaced by raise NotImplementedError(message);
    its docstring stays."""
    node = find(ast.parse(source), name)
    lines = source.splitlines(keepends=True)
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    first = docstring.end_lineno if docstring else node.body[0].lineno - 1
    indent = " " * node.body[0].col_offset
    return "".join(lines[:first] + [f'{indent}raise NotImplementedError("{message}")\n']
                   + lines[node.end_lineno:])


def points_of(test):
    """(exercise, points, whether these are a bonus) that a test function is marked with, or None."""
    for mark in test.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.exercise":
            given = {keyword.arg: keyword.value.value for keyword in mark.keywords}
            return mark.args[0].value, given["points"], given.get("bonus", False)
    return None


@functools.cache
def marked_tests():
    """(exercise, whether its points are a bonus, name, points, docstring in one line) of all tests that check
    exercises."""
    found = []
    for path in TESTS:
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and points_of(node):
                number, points, bonus = points_of(node)
                text = " ".join((ast.get_docstring(node) or "").split())
                found.append((number, bonus, node.name, points, text))
    return found


def tests_of(number, bonus=False):
    """[(name, points, docstring)] of the tests that check an exercise; with bonus, of those that are worth
    bonus points, which the others are not."""
    return [test[2:] for test in marked_tests() if test[:2] == (number, bonus)]


def worth(number):
    """An exercise's points, in words: "19, bonus 8", "5 + 5 by report"."""
    points, bonus = (sum(points for _, points, _ in tests_of(number, kind)) for kind in (False, True))
    report = EXERCISES[number].report
    parts = [str(points)] * (points > 0) + [f"{report} by report"] * (report > 0)
    return " + ".join(parts) + (f", bonus {bonus}" if bonus else "")


def time_of(number):
    """An exercise's minutes, in words: those of work, and those in which a laptop computes."""
    exercise = EXERCISES[number]
    return f"{exercise.minutes}" + (f" + {exercise.computing}" if exercise.computing else "")


def is_test(node):
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def exercise_tests(source):
    """The source of a test module with nothing left but the tests that check exercises,
    and what these use."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    kept = [node for node in tree.body if not (is_test(node) and not points_of(node))]
    while True:
        words = {word for node in kept for child in ast.walk(node) for word in (
            getattr(child, "id", None), getattr(child, "arg", None), getattr(child, "attr", None))}
        unused = [node for node in kept if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                  and not is_test(node) and node.name not in words]
        if not unused:
            break
        kept = [node for node in kept if node not in unused]
    dropped = set()
    for node in tree.body:
        if node not in kept:
            start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            dropped |= set(range(start, node.end_lineno + 1))
    text = "".join(line for number, line in enumerate(lines, 1) if number not in dropped)
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text.rstrip() + "\n"


# ------------------------------------------------------------------------------------------------------------
# the copy

def text_of(number):
    """The handout's text of an exercise; of 0, how to work."""
    text = (ROOT / "course" / f"{number:02d}.md").read_text(encoding="utf-8")
    return text.replace("DOORS", textwrap.fill(", ".join(sorted(DOORS)), 118, subsequent_indent="  "))


def listed(numbers):
    """[4] -> "exercise 4", [4, 5] -> "exercises 4, 5"."""
    return f"exercise{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))}"


def handout(numbers, other_weeks=()):
    """HANDOUT.md: how to work, and a page for each exercise. other_weeks: exercises that are open too."""
    needed = {n: [m for m in EXERCISES[n].needs if m in {*numbers, *other_weeks}] for n in numbers}
    pages = [text_of(0) + """
| exercise | level | minutes | points | needs first |
|---|---|---|---|---|
""" + "".join(f"| {n}. {EXERCISES[n].title} | {EXERCISES[n].level} | {time_of(n)} | {worth(n)} | "
              f"{', '.join(map(str, needed[n])) or 'none'} |\n" for n in numbers)]
    if other_weeks:
        pages[0] += (f"\nOpen in this copy too, from other weeks: {listed(other_weeks)}. "
                     "Take along the files that you wrote.\n")
    for n in numbers:
        exercise = EXERCISES[n]
        page = (f"# Exercise {n}: {exercise.title}\n\nLevel: {exercise.level}. Points: {worth(n)}. "
                f"Minutes: {time_of(n)}.")
        if exercise.functions:
            names = ", ".join("`{1}` in {0}".format(*function.split(":")) for function in exercise.functions)
            page += f" To write: {names}."
        if exercise.shown_by:
            names = ", ".join("`{1}` in {0}".format(*function.split(":")) for function in exercise.shown_by)
            page += f" (Blank in this copy too, since it would show how, but not to be written: {names}.)"
        if needed[n]:
            page += f" First write {listed(needed[n])}: until then, tests of this one are skipped."
        page += "\n" + text_of(n) + "\n"
        for title, bonus in (("What the tests check", False), ("What the bonus tests check", True)):
            tests = tests_of(n, bonus)
            if tests:
                page += f"\n**{title}**\n\n" + "".join(
                    f"- {points} point{'s' * (points > 1)}: `{name}`{'. ' + text if text else ''}\n"
                    for name, points, text in tests)
        pages.append(page)
    return "\n---\n\n".join(pages)


def check_place(out):
    """Raises BadInput for a folder inside this repository, unless git ignores it: the tests would take its
    files for the repository's."""
    if out.resolve().is_relative_to(ROOT) and not git_ignores(out.resolve()):
        raise BadInput(f"--out {out}: lies inside this repository, whose tests it would break; expected a "
                       f"folder elsewhere, such as {ROOT.parent / out.name}, or one in out/")


def git_ignores(path):
    """Whether git ignores a path inside this repository; it does not where there is no git."""
    if not shutil.which("git"):
        return False
    asked = subprocess.run(["git", "-C", ROOT, "check-ignore", "--quiet", path], capture_output=True)
    return asked.returncode == 0


def check_free(out):
    """Raises BadInput when there is something at `out` already, or no folder for it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {out}: something already exists there; expected a new name or an empty folder")
    if not out.resolve().parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.resolve().parent}")


def write_copy(out, numbers, other_weeks=()):
    """Write a student copy with these exercises, and those of other weeks open too. Raises BadInput when
    there is something at `out` already."""
    out = Path(out)
    check_free(out)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent) as folder:
        copy = Path(folder) / "copy"
        for pattern in COPIED:
            for path in filter(Path.is_file, ROOT.glob(pattern)):
                if path.relative_to(ROOT).as_posix() in LECTURERS:
                    continue
                (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy / path.relative_to(ROOT))
        for path in TESTS:
            (copy / path).write_text(exercise_tests((ROOT / path).read_text(encoding="utf-8")),
                                     encoding="utf-8")
        for n in (*numbers, *other_weeks):
            for function in EXERCISES[n].functions + EXERCISES[n].shown_by:
                file, name = function.split(":")
                note = "" if function in EXERCISES[n].functions else " (not to be written)"
                source = (copy / file).read_text(encoding="utf-8")
                (copy / file).write_text(blank(source, name, f"exercise {n}: {EXERCISES[n].title}{note}"),
                                         encoding="utf-8", newline="\n")
        open_ones = [f"    {n} {function}" for n in sorted({*numbers, *other_weeks})
                     for function in EXERCISES[n].functions]
        (copy / "pytest.ini").write_text("\n".join([PYTEST_INI.rstrip(), *open_ones, ""]), encoding="utf-8",
                                         newline="\n")
        (copy / "HANDOUT.md").write_text(handout(numbers, other_weeks), encoding="utf-8", newline="\n")
        for path in copy.iterdir():                     # all is written by now, and has only to be renamed
            out.mkdir(exist_ok=True)
            path.rename(out / path.name)


def main():
    parser = Parser(description="Write a student copy of this repository.")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--exercise", type=int, nargs="+", choices=list(EXERCISES), default=list(EXERCISES),
                       metavar="N", help=f"exercises to leave open, 1 to {len(EXERCISES)}")
    which.add_argument("--week", type=int, nargs="+", choices=list(EXERCISES), action="append", metavar="N",
                       help="the exercises of a week, once for each week: one copy a week, "
                       "none with a solution to any week")
    args = parser.parse_args()
    check_free(Path(args.out))
    check_place(Path(args.out))
    of_weeks = [n for week in args.week or [args.exercise] for n in sorted(set(week))]
    open_ones = sorted(set(of_weeks))
    if len(open_ones) < len(of_weeks):
        parser.error("--week: an exercise is in two weeks")
    if args.week:
        Path(args.out).mkdir(exist_ok=True)
    for i, week in enumerate(args.week or [args.exercise], 1):
        numbers = sorted(set(week))
        out = Path(args.out, f"week{i}") if args.week else args.out
        write_copy(out, numbers, [n for n in open_ones if n not in numbers])
        print(f"wrote {out} with {listed(numbers)}: begin with HANDOUT.md there")
    solved = [n for n, exercise in EXERCISES.items() if exercise.functions and n not in open_ones]
    if solved:
        print(f"inside are the solutions of {listed(solved)}: "
              "name the later weeks in the same command too, and those are left out")


if __name__ == "__main__":
    run(main)
