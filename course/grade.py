"""
Grade a class: a row for each student in a CSV.

    python course/grade.py --exercise 4 5 6 submissions/*

A submission is a folder with the student's name, and in it the modules that the exercises are in; for
these three, search.py, mrm.py and data/corpus.py. It may be a whole student copy: nothing else in it is read.
The columns: the points of each exercise, their sum, what failed, seconds, what was changed elsewhere and is
left behind, why tampering is suspected, and how the tests were isolated. Students whom the table has already
get a new row; the other rows stay. Bonus points have columns of their own, and are in no sum.

For each exercise, graft.py puts the student's functions into the reference files, which have the solutions of
all other exercises, and run_tests.py runs the tests of that exercise on them. With bubblewrap (`bwrap`) that
happens in namespaces without a network, in which nothing can be read but Python and these files. Without it
the table says "not isolated": docs/teach.md says what the students' code can do then.
"""

import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from assign import EXERCISES, ROOT, blank, tests_of, write_copy
from graft import graft, left_behind, read_module
from plumbing.errors import BadInput
from plumbing.files import check_output, read_text, write_file
from plumbing.parser import Parser, number
from plumbing.start import printable, run

GRADED = [n for n, exercise in EXERCISES.items() if exercise.functions]
RUNNERS = 2                 # exercises at once
MOST_REASONS = 40           # in a cell of the table
INSIDE = "/grading"         # what the folder of a Runner is called in its namespace
# All that is left of the environment: it could lead to this repository.
KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


# ------------------------------------------------------------------------------------------------------------
# the files that an exercise is graded with

def by_file(functions):
    """["file.py:function", ...] -> {"file.py": ["function", ...]}"""
    names = {}
    for function in functions:
        file, name = function.split(":")
        names.setdefault(file, []).append(name)
    return names


def common_files():
    """{path: content} of what all exercises need: the Python files of a student copy, solved, and tests."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        write_copy(copy, [])
        return {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*")
                if path.is_file() and (path.suffix == ".py" or copy / "tests" in path.parents)}


def grafted_files(n, trees, common):
    """The files to grade exercise n with, and sentences on functions that are not there or cannot be taken,
    and on those that have a door. trees: {file: syntax tree of the student's}. Raises BadInput."""
    exercise = EXERCISES[n]
    files, missing, refused = dict(common), [], []
    for file, names in by_file(exercise.functions + exercise.shown_by).items():     # no solution is in reach
        for name in names:
            source = blank(files[file].decode("utf-8"), name, f"exercise {n}: {exercise.title}")
            files[file] = source.encode("utf-8")
    for file, names in by_file(exercise.functions).items():
        if file in trees:
            source, absent, doors = graft(files[file].decode("utf-8"), trees[file], names)
            files[file] = source.encode("utf-8")
            missing += [f"{name} in {file} was not taken: {why}" for name, why in absent.items()]
            refused += [f"{name} in {file} was not taken: {where}" for name, where in doors.items()]
    return files, missing, refused


# ------------------------------------------------------------------------------------------------------------
# processes

def packages():
    """The folders that torch and others are installed in."""
    return [path for path in sys.path if path.endswith("-packages")]


def sandbox(folder):
    """The start of a command line: what follows runs in namespaces of its own, can read Python and what that
    needs of the system, and can write to `folder` alone."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent",
               "--new-session", "--cap-drop", "ALL"]
    readable = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/sys/devices/system/cpu",
                sys.base_prefix, os.path.realpath(sys.base_prefix)]
    for path in readable:
        command += ["--ro-bind-try", path, path]
    if any(ROOT.is_relative_to(path) for path in readable):
        command += ["--tmpfs", str(ROOT)]                               # hides this repository
    for path in [sys.prefix, *packages()]:
        command += ["--ro-bind-try", path, path]
    return command + ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--bind", folder, INSIDE,
                      "--remount-ro", "/", "--chdir", INSIDE]


def has_sandbox():
    """Whether bubblewrap is installed and works: in many containers it may not."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FileNotFoundError):
        command = [*sandbox(folder), sys.executable, "-c", ""]
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


class Runner:
    """A process of run_tests.py in an empty folder. Neither its folder, nor its command line, nor its
    environment leads to this repository or to submissions."""

    def __init__(self, isolated):
        self.isolated = isolated
        self.start()

    def start(self):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        folder = self.folder.name
        shutil.copyfile(Path(__file__).with_name("run_tests.py"), Path(folder, "run_tests.py"))
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        environment["HOME"] = environment["TMPDIR"] = INSIDE if self.isolated else folder
        environment |= {"PYTHONPATH": os.pathsep.join(packages()), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                        "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*(sandbox(folder) if self.isolated else []), sys.executable, "-B", "run_tests.py"], cwd=folder,
            env=environment, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)

    def run(self, n, files, seconds):
        """{test: outcome} of the tests of exercise n or, where they do not run at all, {"": why}."""
        if self.process.poll() is not None:                             # an exercise before has ended it
            self.close()
            self.start()
        with contextlib.suppress(BrokenPipeError):
            pickle.dump({"exercise": n, "seconds": seconds, "files": files}, self.process.stdin)
            self.process.stdin.flush()
        outcomes, why, kind = {}, "their process ended", ""
        while kind != "end":
            line = self.process.stdout.readline()
            if not line:
                self.process.wait()
                break
            kind, *values = json.loads(line)
            if kind == "tests":
                outcomes = dict.fromkeys(values[0], why)
            elif kind == "test":
                outcomes[values[0]] = values[1]
            elif kind == "broken":
                why = values[0]
        return outcomes or {"": why}

    def close(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


class Runners:
    """Runners that work at the same time."""

    def __init__(self, isolated):
        self.isolated = isolated
        self.all = [Runner(isolated) for _ in range(RUNNERS)]
        self.pool = ThreadPoolExecutor(RUNNERS)

    def run(self, files, seconds):
        """{exercise: {test: outcome}}. files: {exercise: its files}."""
        outcomes = {}
        waiting = iter(list(files))

        def work(runner):
            for n in waiting:                                           # each exercise is taken once
                outcomes[n] = runner.run(n, files[n], seconds)

        list(self.pool.map(work, self.all))
        return outcomes

    def close(self):
        """End them, also in the middle of their work."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for runner in self.all:
            runner.close()


# ------------------------------------------------------------------------------------------------------------
# the table

def grade(folder, numbers, seconds, common, runners):
    """The row of a submission."""
    start = time.monotonic()
    trees, files, failed, changed, suspicions = {}, {}, [], [], []
    every = by_file(f for exercise in EXERCISES.values() for f in exercise.functions + exercise.shown_by)
    for file in by_file(f for n in numbers for f in EXERCISES[n].functions):
        try:
            tree = read_module(folder, file)
            behind = left_behind(common[file].decode("utf-8"), tree, every[file])
            changed += [f"{file}, {what}" for what in behind]
            trees[file] = tree
        except BadInput as error:
            failed.append(str(error))
    for n in reversed(numbers):                                         # the last ones take longest
        try:
            files[n], missing, refused = grafted_files(n, trees, common)
            failed += missing
            suspicions += refused
        except BadInput as error:
            failed.append(f"exercise {n}: {error}")
            files[n], *_ = grafted_files(n, {}, common)
    outcomes = runners.run(files, seconds)
    points, extra = [], []
    for n in numbers:
        if "" in outcomes[n]:
            failed.append(f"exercise {n}: its tests do not run: {outcomes[n]['']}")
        for bonus, column in ((False, points), (True, extra)):
            if tests_of(n, bonus):
                earned, why, replaced = earned_by(n, outcomes[n], bonus)
                column.append(earned)
                failed += [f"bonus, {reason}" if bonus else reason for reason in why]
                suspicions += replaced
    return [cell(folder.resolve().name), *points, sum(points), *extra, sentence(failed),
            f"{time.monotonic() - start:.1f}", sentence(changed), sentence(suspicions),
            "bubblewrap" if runners.isolated else "not isolated"]


def earned_by(n, outcomes, bonus):
    """The points of an exercise, or its bonus points; sentences on tests that failed; those on tampering."""
    earned, failed, replaced, blank_ones = 0, [], [], 0
    for test, points, _ in tests_of(n, bonus):
        outcome = outcomes.get(test, "no result")
        if outcome == "passed":
            earned += points
        elif f"NotImplementedError: exercise {n}" in outcome:
            blank_ones += 1
        else:
            failed.append(f"{test}: {outcome}")
        if outcome == "tampered":
            replaced.append(f"{test}: what it is checked with was changed while it ran")
    if blank_ones:
        s = "s" * (blank_ones > 1)
        failed.append(f"exercise {n}: {blank_ones} test{s} met a function that was not written, or not taken")
    return earned, failed, replaced


def sentence(reasons):
    """For a cell of the table: each reason once, in one line, and not too many. (Some are texts of the
    student's.)"""
    lines = list(dict.fromkeys(printable(" ".join(str(reason).split()))[:200] for reason in reasons))
    if len(lines) > MOST_REASONS:
        lines[MOST_REASONS:] = [f"and {len(lines) - MOST_REASONS} more"]
    return cell("; ".join(lines))


def cell(text):
    """A text for the table. A spreadsheet would take one that begins so for a formula."""
    text = text.encode("utf-8", "replace").decode("utf-8")              # a name may hold bytes that are none
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def header_of(numbers):
    possible = [sum(points for _, points, _ in tests_of(n)) for n in numbers]
    bonus = {n: sum(points for _, points, _ in tests_of(n, bonus=True)) for n in numbers}
    return ["student", *(f"exercise {n} (of {most})" for n, most in zip(numbers, possible)),
            f"points (of {sum(possible)})", *(f"bonus {n} (of {most})" for n, most in bonus.items() if most),
            "failed", "seconds", "also changed", "tampering suspected", "isolation"]


def read_table(path, header):
    """{student: row} of a table that is there already. Raises BadInput where its columns are others."""
    if not path.exists():
        return {}
    rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    if rows[:1] != [header] or any(len(row) != len(header) for row in rows):
        raise BadInput(f"{path}: its columns are not those of these exercises; name another table with --out")
    return {row[0]: row for row in rows[1:]}


def write_table(path, header, rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows.values()])
    write_file(path, "\ufeff" + text.getvalue())                        # by this mark Excel knows UTF-8


# ------------------------------------------------------------------------------------------------------------
# the command

def submissions_among(paths):
    """The folders among these paths. A file is named and passed over. Raises BadInput."""
    folders = {}
    for path in paths:
        name = path.resolve().name
        if path.is_file():
            print(printable(f"grade.py: {path} is passed over: it is not a folder"), file=sys.stderr)
        elif not path.is_dir():
            raise BadInput(f"{path}: there is no such folder")
        elif path.is_symlink():
            raise BadInput(f"{path}: is a symbolic link; expected a folder")
        elif name in folders:
            raise BadInput(f"{path}: there are two submissions of this name")
        else:
            folders[name] = path
    if not folders:
        raise BadInput("expected a folder for each student, for example submissions/*")
    return list(folders.values())


def parse_arguments():
    parser = Parser(description="Grade a class: a row for each student in a CSV.")
    parser.add_argument("--exercise", nargs="+", required=True, metavar="N", dest="exercises",
                        help=f"exercises to grade, of {', '.join(map(str, GRADED))}")
    parser.add_argument("--out", type=Path, default=Path("grades.csv"), metavar="FILE",
                        help="the table, a CSV; rows of other students in it stay")
    parser.add_argument("--time_limit", type=number(1, 86400), default=60, metavar="S",
                        help="seconds of computing for each exercise of a submission")
    parser.add_argument("submissions", nargs="*", metavar="DIR",
                        help="a folder with the modules for each student, named after the student")
    args = parser.parse_args()
    count = next((i for i, word in enumerate(args.exercises) if not word.isdecimal()), len(args.exercises))
    numbers = args.exercises[:count]
    folders = args.exercises[count:] + args.submissions                 # --exercise 4 5 DIR
    args.submissions = [Path(folder) for folder in folders]
    args.exercises = sorted({int(n) for n in numbers})
    if not args.exercises or not set(args.exercises) <= set(GRADED):
        parser.error(f"--exercise {' '.join(numbers)}: expected some of {', '.join(map(str, GRADED))}")
    return args


def main():
    args = parse_arguments()
    if os.name == "nt":
        raise BadInput("grading needs Linux or macOS: use a container")
    folders = submissions_among(args.submissions)
    check_output(args.out)
    header = header_of(args.exercises)
    rows = read_table(args.out, header)
    isolated = has_sandbox()
    if not isolated:
        print("grade.py: not isolated: bubblewrap (bwrap) does not run here", file=sys.stderr)
    common = common_files()
    runners = Runners(isolated)
    suspected = 0
    try:
        first = args.exercises[0]
        outcomes = runners.run({first: common}, args.time_limit)[first]
        if set(outcomes.values()) != {"passed"}:
            raise BadInput(f"right solutions do not pass the tests of exercise {first} here: {outcomes}")
        for folder in tqdm(folders, unit="submission", file=sys.stderr):
            row = grade(folder, args.exercises, args.time_limit, common, runners)
            suspected += bool(row[-2])
            rows[row[0]] = row
            write_table(args.out, header, rows)                         # what is graded stays
    finally:
        runners.close()
    print(f"wrote {args.out}: {len(folders)} submissions, tampering suspected in {suspected}")


if __name__ == "__main__":
    run(main)
