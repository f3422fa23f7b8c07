"""
Grade a class: a row for each student in a CSV.

    python course/grade.py --exercises 4 5 6 submissions/*

A submission is a folder with the student's name, and in it the modules that the exercises are in; for
these three, submissions/NAME/search.py and submissions/NAME/mrm.py. It may be a whole student copy:
nothing else in it is read. The columns: the points of each exercise, their sum, what failed, and why
tampering is suspected (empty if it is not). Points are 0 where it is.

Each submission is graded in a fresh student copy (assign.py), which takes those modules from it and
nothing else, by a process of its own (run_tests.py). After --time_limit seconds of computing, or ten times
as many by the clock, that process and its group are ended; tests that passed before count. Points come
from signed lines in a file without a name, never from what is printed. Tampering is suspected when

- a *canary* passes: beside each case of a test there is one with the same name that must fail;
- a line of results is not signed, comes twice, or is about a test that does not exist;
- a file of the copy was changed while the tests ran;
- something was printed that looks like points.

This finds cheap cheats, not all. The students' code runs in the process of the tests. Whoever has read
run_tests.py can find its secret in memory, or return objects that are equal to everything. The code can
also read and change what your account can: the solutions in this repository, other submissions, this
program. So grade in a container without a network and with limits of memory and disk, read what was
handed in, and give points for what students can explain.
"""

import contextlib
import csv
import hmac
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from assign import EXERCISES, MODULES, tests_of, write_copy
from plumbing.errors import BadInput
from plumbing.parser import Parser, number
from plumbing.files import check_output, write_file
from plumbing.start import printable, run

GRADED = [n for n, exercise in EXERCISES.items() if exercise.functions]
PASSED = [["setup", "passed"], ["call", "passed"], ["teardown", "passed"]]
CANARY = [["setup", "passed"], ["call", "failed"], ["teardown", "passed"]]
WAIT = 10               # times the limit of computing time: so long may a process run by the clock


def state(path):
    """When a file or folder was changed last, or None if it is gone. The system notes that;
    nobody can set it."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ino, path.lstat().st_ctime_ns


def run_tests(folder, numbers, limit):
    """Run the tests of these exercises in a fresh copy with a folder's modules; None: with nothing solved.
    Returns {(test with its case, is it a canary): [[phase, outcome], ...]}, what else went wrong, and why
    tampering is suspected."""
    files = {function.split(":")[0] for n in numbers for function in EXERCISES[n].functions}
    modules = [name for name in MODULES.split() if f"{name}.py" in files]   # in the order of their imports
    task = {"secret": secrets.token_hex(16), "exercises": numbers, "modules": modules, "seconds": limit}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PWD"))}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    notes = []
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
          tempfile.TemporaryFile() as results, tempfile.TemporaryFile() as printed):
        copy = Path(temporary) / "copy"
        write_copy(copy, numbers)
        shutil.copyfile(Path(__file__).with_name("run_tests.py"), copy / "run_tests.py")
        for path in [folder / f"{name}.py" for name in modules] if folder else []:
            if path.is_file() and not path.is_symlink():                # a link could lead to the solution
                shutil.copyfile(path, copy / path.name)
            else:
                notes.append(f"there is no file {path.name}")
        before = {path: state(path) for path in copy.rglob("*")}
        process = subprocess.Popen(
            [sys.executable, "-B", "run_tests.py"], cwd=copy, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=results, stderr=printed)
        try:
            process.communicate(json.dumps(task).encode(), WAIT * limit)
            if process.returncode < 0:
                notes.append(f"stopped after {limit} s of computing"
                             if process.returncode == -signal.SIGXCPU else
                             f"ended by signal {-process.returncode}")
        except subprocess.TimeoutExpired:
            notes.append(f"stopped after {WAIT * limit} s")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        changed = sorted(str(path.relative_to(copy)) for path in before if before[path] != state(path))
        suspicions = [f"{name} was changed" for name in changed[:3]]
        results.seek(0)
        printed.seek(0)
        if re.search(rb"\d of \d+ points", printed.read()):
            suspicions.append("points were printed")
        seen = {}
        foreign = False
        for line in results:
            signature, _, record = line.rstrip(b"\n").partition(b" ")
            true = hmac.digest(task["secret"].encode(), record, "sha256").hex().encode()
            try:
                if not hmac.compare_digest(signature, true):
                    raise ValueError
                name, canary, phase, outcome = json.loads(record)
                if phase == "note":
                    notes.append(outcome)
                else:
                    seen.setdefault((name, canary), []).append([phase, outcome])
            except (ValueError, TypeError, RecursionError):
                foreign = True
        if foreign:
            suspicions.append("results were written that are not signed")
    return seen, notes, suspicions


def grade(folder, numbers, cases, limit):
    """The row of a submission. cases: the names of all tests with their cases."""
    seen, failed, suspicions = run_tests(folder, numbers, limit)
    for (name, canary), phases in seen.items():
        if name not in cases or len(phases) > len(PASSED):
            suspicions.append("results come twice, or of a test that is not there")
        elif canary and phases != CANARY[:len(phases)]:
            suspicions.append("tests that must fail have passed")
    right = [case for case in cases if seen.get((case, False)) == PASSED and seen.get((case, True)) == CANARY]
    earned = dict.fromkeys(numbers, 0)
    for n in numbers:
        for test, points, _ in tests_of(n):
            mine = [case for case in cases if case.partition("[")[0] == test]
            wrong = [case for case in mine if case not in right]
            if mine and not wrong:
                earned[n] += 0 if suspicions else points
                continue
            outcomes = [outcome for case in wrong for _, outcome in seen.get((case, False), [])]
            worst = next((outcome for outcome in outcomes if outcome != "passed"), "no result that counts")
            many = f" ({len(wrong)} of {len(mine)} cases)" if len(mine) > 1 else ""
            failed.append(f"{test}: {worst}{many}")
    points = list(earned.values())
    return [cell(folder.resolve().name), *points, sum(points), sentence(failed), sentence(suspicions)]


def sentence(reasons):
    """For a cell of the table: each reason once, in one line. (Some are texts of the student's.)"""
    lines = [printable(" ".join(str(reason).split()))[:200] for reason in reasons]
    return cell("; ".join(dict.fromkeys(lines)))


def cell(text):
    """A text for the table: a spreadsheet would take one that begins so for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def parse_arguments():
    parser = Parser(description="Grade a class: a row for each student in a CSV.")
    parser.add_argument("--exercises", nargs="+", required=True, metavar="N",
                        help="exercises to grade, 1 to 8")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), metavar="FILE",
                        help="the table, a CSV")
    parser.add_argument("--time_limit", type=number(1, 86400), default=60, metavar="S",
                        help="CPU seconds for a submission")
    parser.add_argument("submissions", nargs="*", metavar="DIR",
                        help="a folder with the modules for each student, named after the student")
    args = parser.parse_args()
    count = next((i for i, word in enumerate(args.exercises) if not word.isdecimal()), len(args.exercises))
    numbers = args.exercises[:count]
    folders = args.exercises[count:] + args.submissions # --exercises 4 5 DIR
    args.exercises = sorted({int(n) for n in numbers})
    if not args.exercises or not set(args.exercises) <= set(GRADED):
        parser.error(f"--exercises {' '.join(numbers)}: expected some of {', '.join(map(str, GRADED))}")
    args.submissions = [Path(folder) for folder in folders]
    if not folders:
        parser.error("expected folders of submissions, for example submissions/*")
    return args


def main():
    args = parse_arguments()
    if os.name == "nt":
        raise BadInput("grading needs Linux or macOS: use a container")
    names = [folder.resolve().name for folder in args.submissions]
    for folder, name in zip(args.submissions, names):
        if not folder.is_dir():
            raise BadInput(f"{folder}: expected a folder, one for each student")
        if names.count(name) > 1:
            raise BadInput(f"{folder}: there are two submissions of this name")
    check_output(args.out)
    seen, notes, _ = run_tests(None, args.exercises, args.time_limit)   # which tests are there?
    cases = [name for name, canary in seen if not canary]
    if notes or not cases:
        raise BadInput(f"the tests do not run here: {'; '.join(notes) or 'there are no results'}")
    possible = [sum(points for _, points, _ in tests_of(n)) for n in args.exercises]
    table = [["student", *(f"exercise {n} (of {most})" for n, most in zip(args.exercises, possible)),
              f"points (of {sum(possible)})", "failed", "tampering suspected"]]
    for folder in tqdm(args.submissions, unit="submission", file=sys.stderr):
        table.append(grade(folder, args.exercises, cases, args.time_limit))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        write_file(args.out, text.getvalue())                   # what is graded stays, whatever happens
    suspected = sum(bool(row[-1]) for row in table[1:])
    print(f"wrote {args.out}: {len(names)} submissions, tampering suspected in {suspected}")


if __name__ == "__main__":
    run(main)
