"""A class is graded: right work gets points, an endless loop stops nobody else, cheap cheats are found."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

import assign
import grade

EXIT = "\nimport atexit\natexit.register(print, '6 of 6 points')\n"
RUNTEST = "\nimport _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n"
REPORT = """
import _pytest.reports
true = _pytest.reports.TestReport.from_item_and_call.__func__
def from_item_and_call(cls, item, call):
    report = true(cls, item, call)
    report.outcome, report.longrepr = "passed", None
    return report
_pytest.reports.TestReport.from_item_and_call = classmethod(from_item_and_call)
"""


MASK = "test_conservative_rewards_forbid_unseen_tokens_only"            # the one test of exercise 6


def hand_in(folder, search, mrm):
    folder.mkdir(parents=True)
    (folder / "search.py").write_text(search, encoding="utf-8")
    (folder / "mrm.py").write_text(mrm, encoding="utf-8")


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """search.py and mrm.py: solved, and as a student gets them."""
    copy = tmp_path_factory.mktemp("blank") / "copy"
    assign.write_copy(copy, [4, 6])
    return {kind: [(folder / name).read_text(encoding="utf-8") for name in ("search.py", "mrm.py")]
            for kind, folder in (("solved", ROOT), ("blank", copy))}


@pytest.mark.slow
def test_a_class_of_six(tmp_path, modules):
    """Right, half right, endless, and three cheats who have solved nothing."""
    (search, mrm), (open_search, open_mrm) = modules["solved"], modules["blank"]
    rounded = search.replace("limit = top_p if top_p < 1 else math.inf", "limit = top_p")
    endless = search.replace('    rows, tokens, fallbacks = [], [], []\n', "    while True:\n        pass\n")
    assert len({search, rounded, endless}) == 3
    hand_in(tmp_path / "class" / "right", search, mrm)
    hand_in(tmp_path / "class" / "half_right", rounded, open_mrm)
    hand_in(tmp_path / "class" / "endless", endless, mrm)
    for name, cheat in (("cheat_exit", EXIT), ("cheat_runtest", RUNTEST), ("cheat_report", REPORT)):
        hand_in(tmp_path / "class" / name, open_search + cheat, open_mrm)
    submissions = sorted((tmp_path / "class").iterdir())
    command = [sys.executable, "course/grade.py", "--exercises", "4", "6", *submissions,
               "--out", tmp_path / "grades.csv", "--time_limit", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "6 submissions, tampering suspected in 3" in done.stdout, done.stderr
    assert "6/6" in done.stderr, "a progress bar"
    with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    points = {name: [int(row["exercise 4 (of 6)"]), int(row["exercise 6 (of 2)"])]
              for name, row in rows.items()}
    assert points == {"right": [6, 2], "half_right": [5, 0], "endless": [1, 2],
                      "cheat_exit": [0, 0], "cheat_runtest": [0, 0], "cheat_report": [0, 0]}
    assert all(int(row["points (of 8)"]) == sum(points[name]) for name, row in rows.items())
    failed = {name: row["failed"] for name, row in rows.items()}
    assert failed["right"] == "" and f"{MASK}: failed" in failed["half_right"]
    assert "test_with_top_p_1_a_nucleus_is_all_that_is_possible: failed" in failed["half_right"]
    assert "stopped after 10" in failed["endless"]
    assert "test_candidates_of_an_unseen_nucleus: no result that counts" in failed["endless"]
    why = {name: row["tampering suspected"] for name, row in rows.items()}
    assert not any(why[name] for name in ("right", "half_right", "endless"))
    assert why["cheat_exit"] == "points were printed"
    assert why["cheat_runtest"] == why["cheat_report"] == "tests that must fail have passed"


@pytest.mark.slow
def test_other_cheats(tmp_path, modules):
    """Comparisons that find nothing, a test that is changed, results written to all files that are open."""
    hand_in(tmp_path / "cheat", "", modules["blank"][1] + f'''
import os
from pathlib import Path
torch.testing.assert_close = lambda *values, **options: None
Path("tests/test_mrm.py").write_text(Path("tests/test_mrm.py").read_text() + "# as it was")
for number in range(3, 20):
    try:
        os.write(number, b'0 ["{MASK}", false, "call", "passed"]\\n')
    except OSError:
        pass
''')
    _, points, total, failed, why = grade.grade(tmp_path / "cheat", [6], [MASK], 30)
    assert points == total == 0 and failed
    assert why.split("; ") == ["tests/test_mrm.py was changed", "results were written that are not signed",
                               "tests that must fail have passed"]


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "import os; os._exit(0)", "1 / 0"])
def test_a_module_that_ends_the_program_gets_no_points(tmp_path, end):
    hand_in(tmp_path / "ends", "", end)
    _, points, total, failed, why = grade.grade(tmp_path / "ends", [6], [MASK], 30)
    assert (points, total, why) == (0, 0, "") and f"{MASK}: no result that counts" in failed
    assert ("mrm.py cannot be imported" in failed) == ("_exit" not in end)


@pytest.mark.slow
def test_nothing_handed_in_is_no_points(tmp_path):
    """A link does not count: it could lead to the solution."""
    (tmp_path / "mrm.py").symlink_to(ROOT / "mrm.py")
    _, points, total, failed, why = grade.grade(tmp_path, [6], [MASK], 30)
    assert (points, total, why) == (0, 0, "") and "there is no file mrm.py" in failed


def test_a_cell_is_no_formula_to_a_spreadsheet():
    """Names of folders and messages of errors are texts of the student's."""
    assert grade.cell("=1+1") == "'=1+1" and grade.sentence(["@SUM(A1)", "twice"]) == "'@SUM(A1); twice"
    assert grade.cell("ann-marie") == "ann-marie"


@pytest.mark.parametrize("options, said", [
    (["--exercises", "9", "course"], "9"), (["--exercises", "4"], "submissions/*"),
    (["course"], "--exercises"),
    (["--exercises", "4", "README.md"], "README.md: expected a folder"),
    (["--exercises", "x", "course"], "expected some of 1"),
    (["--exercises", "4", "course", "course"], "two submissions"),
    (["--exercises", "4", "course", "--out", "no-such/grades.csv"], "no-such is no folder")])
def test_bad_input(options, said):
    status, out, err = run_script("course/grade.py", *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
