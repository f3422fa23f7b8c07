"""A student copy lacks the chosen functions and nothing else;
its tests fail where they should, and show no solution."""

import ast
import concurrent.futures
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from safetensors.torch import load_file

import assign
from plumbing.errors import BadInput

GRADED = [n for n, exercise in assign.EXERCISES.items() if exercise.functions]


def names_of(n):
    """The tests of an exercise, those of a bonus too."""
    return {name for bonus in (False, True) for name, _, _ in assign.tests_of(n, bonus)}


def run_tests(folder, *options):
    """The outcome of each test of a student copy, by its name with its case, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests", "-rA", "-v", "--tb=no", "-p", "no:cacheprovider", *options],
        cwd=folder, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return (dict(re.findall(r"^tests/\w+\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", done.stdout, re.M)),
            done.stdout)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """For each exercise, the results of a copy that lacks it alone;
    for 0, those of one that lacks nothing."""
    folder = tmp_path_factory.mktemp("copies")
    for n in (0, *GRADED):                  # in one thread: in two at once, ast.parse of Python 3.11 may fail
        assign.write_copy(folder / str(n), [n] if n else [])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip([0, *GRADED], pool.map(lambda n: run_tests(folder / str(n))[0], [0, *GRADED])))


@pytest.mark.slow
@pytest.mark.parametrize("n", GRADED)
def test_exactly_the_tests_of_a_missing_exercise_fail(copies, n):
    """With the original body they all pass; without it they fail, and no others do:
    some of those cannot be run."""
    mine = names_of(n)
    assert mine and set(copies[0].values()) == {"PASSED"} and copies[n].keys() == copies[0].keys()
    for name, outcome in copies[n].items():
        assert (outcome == "FAILED" if name.partition("[")[0] in mine
                else outcome in ("PASSED", "SKIPPED")), name
    skipped = {name.partition("[")[0] for name, outcome in copies[n].items() if outcome == "SKIPPED"}
    assert {m for m in GRADED if skipped & names_of(m)} == {
        m for m in GRADED if n in assign.EXERCISES[m].needs}, "the handout says which are needed first"


def test_every_exercise_has_tests_a_page_and_points():
    text = assign.handout(list(assign.EXERCISES))
    for n, exercise in assign.EXERCISES.items():
        page = text.split(f"# Exercise {n}: ")[1].split("\n---\n")[0]
        assert "**Read**" in page or "**Where.**" in page
        assert 15 < len(page.splitlines()) < 80, "a page"
        assert bool(names_of(n)) == bool(exercise.functions)
        assert all(f"`{name}`" in page for name in names_of(n))
        assert exercise.functions or exercise.report
        assert f"Points: {assign.worth(n)}. Minutes: {assign.time_of(n)}." in page
        assert f"{exercise.report} points" in page if exercise.report else "by report" not in page
        assert exercise.minutes >= 30 and f"| {assign.time_of(n)} | {assign.worth(n)} |" in text
    assert len(GRADED) >= 8 and len(GRADED) < len(assign.EXERCISES) <= 12
    assert assign.worth(7) == "19, bonus 8" and "**Bonus part.**" in text


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A copy with all exercises."""
    folder = tmp_path_factory.mktemp("student") / "copy"
    status, out, err = run_script("course/assign.py", "--out", folder)
    assert (status, err) == (0, "") and "HANDOUT.md" in out
    return folder


def body_of(path, name):
    return assign.find(ast.parse(path.read_text()), name)


def test_a_copy_keeps_signatures_and_docstrings_and_shows_no_solution(student):
    names = {str(path.relative_to(student)) for path in student.rglob("*")}
    assert not any(name.startswith((".git/", ".ci")) or name == ".git" or "assign" in name for name in names)
    everything = "\n".join(ast.unparse(ast.parse(path.read_text())) for path in student.rglob("*.py"))
    for n in GRADED:
        for function in assign.EXERCISES[n].functions + assign.EXERCISES[n].shown_by:
            file, name = function.split(":")
            ours, theirs = body_of(ROOT / file, name), body_of(student / file, name)
            assert (ast.unparse(ours.args) == ast.unparse(theirs.args)
                    and ast.get_docstring(ours) == ast.get_docstring(theirs))
            assert ([ast.unparse(d) for d in ours.decorator_list]
                    == [ast.unparse(d) for d in theirs.decorator_list])
            raised = theirs.body[-1]
            assert isinstance(raised, ast.Raise)
            assert (f"exercise {n}: " if function in assign.EXERCISES[n].functions
                    else "not to be written") in ast.unparse(raised)
            assert len(theirs.body) == 1 + (ast.get_docstring(ours) is not None)
            assert ast.unparse(ours.body[-2:]) not in everything, f"the end of {name} can be read somewhere"
    for file in ("model.py", "search.py", "trie_cache.py", "mrm.py", "baselines.py", "data/corpus.py",
                 "results/dilemma.py"):                                     # and all else is as it was
        blanked = {f.split(":")[1] for e in assign.EXERCISES.values() for f in e.functions
                   if f.startswith(file)}
        source = (ROOT / file).read_text()
        for name in blanked:
            source = assign.blank(source, name, "x")
        assert re.sub(r'exercise \d+: [^"]*', "x", (student / file).read_text()) == source


def test_unmarked_tests_are_left_out(student):
    text = "".join(path.read_text() for path in student.glob("tests/test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)", text, re.M))
    assert tests == {name for n in GRADED for name in names_of(n)}
    assert "plain_saffron_step" not in text


@pytest.mark.slow
def test_grading_prints_points_and_what_else_is_needed(student):
    outcomes, out = run_tests(student, "--exercise", "7")
    total = sum(points for _, points, _ in assign.tests_of(7))
    assert out.rstrip().splitlines()[-1] == f"0 of {total} points"
    assert "first write exercise 1: " in run_tests(student, "--exercise", "5")[1]
    assert set(outcomes) and all(o in ("FAILED", "SKIPPED") for o in outcomes.values())
    assert {name.partition("[")[0] for name in outcomes} == names_of(7) and "bonus: 0 of 8" in out


@pytest.mark.slow
def test_several_exercises_are_graded_at_once(student):
    """As assign.py takes several; before or after the folder of the tests."""
    total = sum(points for n in (2, 4) for _, points, _ in assign.tests_of(n))
    for options in (["--exercise", "2", "4"], ["--exercise", "2", "--exercise", "4"]):
        outcomes, out = run_tests(student, *options)
        assert {name.partition("[")[0] for name in outcomes} == names_of(2) | names_of(4)
        assert out.rstrip().splitlines()[-1] == f"0 of {total} points" and "0 of 5 in all" in out
    command = [sys.executable, "-m", "pytest", "--exercise", "2", "4", "tests/test_saffron.py", "-q"]
    done = subprocess.run(command, cwd=student, capture_output=True, text=True)
    assert "no test checks exercise 2" in done.stdout + done.stderr


@pytest.mark.slow
def test_an_endless_loop_shows_its_line(tmp_path):
    """After the time limit of pytest.ini, and after Ctrl-C."""
    copy = tmp_path / "copy"
    assign.write_copy(copy, [4])
    source = (copy / "search.py").read_text(encoding="utf-8")
    body = """    while True:
        logits.sum()
"""
    source = re.sub(r'    raise NotImplementedError\("exercise 4: [^"]*"\)\n', body, source)
    (copy / "search.py").write_text(source, encoding="utf-8")
    line = max(i for i, text in enumerate(source.splitlines(), 1) if text == "        logits.sum()")
    name = "test_candidates_of_an_unseen_nucleus"
    ini = (copy / "pytest.ini").read_text(encoding="utf-8")
    assert "faulthandler_timeout = 30" in ini
    (copy / "pytest.ini").write_text(ini.replace("30", "3"), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", f"tests/test_saffron.py::{name}"], cwd=copy, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,                      # a shell's background jobs ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    shown = ""
    while "search.py" not in shown:
        shown += process.stderr.readline()
        assert process.poll() is None, shown
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=900)
    assert re.search(r'search.py", line \d+ in candidates', shown), shown
    found = re.search(r"interrupted at search.py, line (\d+), in candidates", out)
    assert found and int(found[1]) - line in (-1, 0), out


@pytest.mark.slow
def test_the_program_of_exercise_6_works_as_written(smollm2_folder, monkeypatch, capsys):
    """With one prompt, and fewer tokens."""
    monkeypatch.chdir(ROOT)
    program = re.search(r"```python\n(.*?)```", assign.text_of(6), re.S)[1]
    assert "[:20]" in program and "max_new_tokens=32" in program
    exec(program.replace("[:20]", "[7:8]").replace("max_new_tokens=32", "max_new_tokens=6"), {})
    out = capsys.readouterr().out
    masked, free = out.split("\n0 tokens are forbidden\n")
    assert masked.startswith(f"\n{committed_mask().sum()} tokens are forbidden\nM ")
    assert "unseen" not in masked
    assert free.startswith("M ") and masked.count("mean R ") == free.count("mean R ") == 1


def committed_mask():
    return load_file(ROOT / "data/smollm2/mrm.safetensors")["unseen"]


def test_the_numbers_of_unseen_tokens_are_those_of_the_committed_mask():
    unseen = int(committed_mask().sum())
    assert f"{unseen:,} of 49,152 tokens are unseen" in " ".join(assign.text_of(6).split())
    assert f"of 49,152 tokens, {49152 - unseen:,} may be said" in " ".join(assign.text_of(9).split())


@pytest.mark.slow
def test_students_see_what_grading_would_not_take(tmp_path):
    """A function that passes its tests, but with a name that is refused, and a helper that is not."""
    copy = tmp_path / "copy"
    assign.write_copy(copy, [4])
    source = (ROOT / "search.py").read_text(encoding="utf-8")
    source = source.replace("    limit = top_p if top_p < 1 else math.inf", "    limit = limit_of(top_p)")
    source = source.replace("    rows, tokens, fallbacks = [], [], []\n",
                            "    getattr(logits, 'shape')\n    rows, tokens, fallbacks = [], [], []\n")
    (copy / "search.py").write_text(
        source + "\n\nMOST = 2 * math.pi\ndef limit_of(x, most=MOST):\n    return x if x < 1 else math.inf\n")
    _, shown = run_tests(copy, "--exercise", "4")
    assert re.findall(r"grading would not take (.*) \(", shown) == [
        f"candidates in search.py: line {source[:source.index('getattr')].count(chr(10)) + 1}: getattr"]
    assert shown.rstrip().endswith("7 of 7 points")


def test_a_copy_has_no_page_for_the_lecturer(student):
    """Nothing in it says how grading works, or how it can be fooled."""
    for path in student.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert "grade.py" not in text and "canary" not in text, path
    assert not (student / "docs" / "teach.md").exists()
    assert [path.name for path in (student / "course").iterdir()] == ["graft.py"]
    assert (student / "docs" / "train.md").exists() and "faulthandler" in (student / "pytest.ini").read_text()


@pytest.mark.slow
def test_a_module_that_ends_the_program_is_0_points(tmp_path):
    """pytest alone would end without a word, and with status 0."""
    assign.write_copy(tmp_path / "copy", [4])
    (tmp_path / "copy" / "search.py").write_text("import sys; sys.exit(0)")
    done = subprocess.run([sys.executable, "-m", "pytest", "tests", "--exercise", "4"], cwd=tmp_path / "copy",
                          capture_output=True, text=True)
    assert done.returncode != 0 and "0 points: a module ends the program" in done.stdout + done.stderr


def test_weeks_leave_each_other_open(tmp_path):
    """A copy for each week, and no week's copy shows the solution of another one's exercise."""
    status, out, err = run_script("course/assign.py", "--out", tmp_path / "weeks",
                                  "--week", "1", "--week", "4", "5")
    assert (status, err) == (0, "") and "inside are the solutions of exercises 2, 3, 6, 7, 8, 11" in out
    for week, mine, others in (("week1", [1], "exercises 4, 5"), ("week2", [4, 5], "exercise 1")):
        text = (tmp_path / "weeks" / week / "HANDOUT.md").read_text(encoding="utf-8")
        assert (re.findall(r"# Exercise (\d+)", text) == list(map(str, mine))
                and f"from other weeks: {others}." in text)
        for n in (1, 4, 5):
            for file, name in (function.split(":") for function in assign.EXERCISES[n].functions):
                assert isinstance(body_of(tmp_path / "weeks" / week / file, name).body[-1], ast.Raise)
    assert "First write exercise 1:" in text
    assert "| 5. partial supervision, the loss and its batch | medium | 90 | 12 | 1 |" in text


def test_a_copy_with_some_exercises_says_what_it_shows(tmp_path):
    status, out, err = run_script("course/assign.py", "--out", tmp_path / "copy", "--exercise", "4", "5", "6")
    assert (status, err) == (0, "") and "inside are the solutions of exercises 1, 2, 3, 7, 8, 11" in out
    assert ("| 5. partial supervision, the loss and its batch | medium | 90 | 12 | none |"
            in (tmp_path / "copy" / "HANDOUT.md").read_text(encoding="utf-8"))


def test_an_empty_folder_may_be_filled(tmp_path, monkeypatch):
    """Also the one that one stands in."""
    monkeypatch.chdir(tmp_path)
    assign.write_copy(".", [6])
    assert (tmp_path / "HANDOUT.md").is_file() and (tmp_path / "tests" / "conftest.py").is_file()
    assert not any(path.name.startswith("tmp") for path in tmp_path.iterdir())


def test_a_folder_that_git_ignores_may_be_inside(tmp_path, monkeypatch):
    """Such as out/. Where there is no git, none is."""
    assign.check_place(ROOT / "out" / "week3")
    assign.check_place(tmp_path / "week3")
    monkeypatch.setattr(assign.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match="lies inside this repository"):
        assign.check_place(ROOT / "out" / "week3")


@pytest.mark.parametrize("options, said", [
    (["--out", "tests"], "something already"), (["--out", "LICENSE"], "something already"), ([], "--out"),
    (["--out", "no-such/copy"], "there is no folder"), (["--out", "no-such"], "lies inside this repository"),
    (["--out", "course/no-such", "--week", "1"], "lies inside this repository"),
    (["--out", "no-such", "--exercise", "99"], "99"),
    (["--out", "tests", "--week", "1"], "something already"),
    (["--out", "no-such", "--week", "1", "--exercise", "2"], "not allowed with")])
def test_bad_input(options, said):
    status, out, err = run_script("course/assign.py", *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (ROOT / "no-such").exists() and not list(ROOT.glob("*.partial"))
