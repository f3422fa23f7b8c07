"""
Runs the tests of exercises. grade.py starts it in an empty folder: nothing leads from it to the repository.

    stdin     pickled tasks, one after the other: {exercise, seconds, files: {path: content}}
    stdout    lines of JSON: ["tests", names], then ["test", name, outcome] of each; ["broken", reason] where
              they do not run; ["end"] when all processes of the exercise have ended

This process imports what all exercises need, and nothing of the course. For each exercise it forks a process,
which imports the modules and collects the tests. That one forks a process for each test, and only these run
functions of the student's: a test that loops, ends its process or replaces something in it costs itself
alone. All that it leaves running is ended before the next one begins.
"""

import builtins
import ctypes
import gc
import json
import os
import pickle
import resource
import select
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy                                # noqa: F401: what the modules import is imported here, once
import pytest
import safetensors.torch                    # noqa: F401
import torch
import torch._dynamo                        # noqa: F401: torch imports it with the first model
from _pytest.runner import runtestprotocol

WAIT = 4                                    # so many times its limit may an exercise take by the clock
PARENT_DEATH_SIGNAL, DUMPABLE, SUBREAPER = 1, 4, 36                     # of Linux: see prctl(2)
LIBRARIES = ("pytest", "_pytest", "torch.testing")


def prctl(option, value):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_descendants():
    """End all processes that came from this one. Those whose parent has ended are children of the subreaper,
    also if they have made a session of their own."""
    while True:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except (OSError, IndexError):                               # it has ended by itself
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def bindings(folder):
    """What the names stand for that decide whether a test passes, and the code behind them: those of
    builtins, torch, pytest and the modules in the folder, and those of their classes. Compared before and
    after a test."""
    spaces = [builtins, torch, torch.Tensor]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.startswith(LIBRARIES) or file.startswith(f"{folder}{os.sep}"):
            spaces.append(module)
            spaces += [value for value in vars(module).values() if isinstance(value, type)]
    found = {}
    for space in spaces:
        for name, value in list(vars(space).items()):
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                found[id(space), name] = value
                found[id(space), name, "code"] = getattr(value, "__code__", None)
    return found


def weights(case):
    """The parameters of language models among a test's arguments, copied. Right solutions change none."""
    llamas = [llama for value in getattr(case, "funcargs", {}).values() if isinstance(value, torch.nn.Module)
              for llama in value.modules() if type(llama).__name__ == "Llama"]
    return [(p, p.detach().clone()) for llama in llamas for p in llama.parameters()]


def outcome_of(reports):
    """"passed", or how the first phase went that did not pass, and why."""
    for report in reports:
        if report.passed:
            continue
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = ""
        if report.skipped:
            reason = report.longrepr[2]
        elif crash:
            reason = f"{crash.message} (line {crash.lineno} of {Path(crash.path).name})"
        return f"{report.outcome}: {textwrap.shorten(str(reason), 160, placeholder=' ...')}"
    return "passed"


class OneByOne:
    """A plugin of pytest: each test, with all of its cases, in a process of its own."""

    def __init__(self, folder, files, seconds, say):
        self.folder = folder
        self.files = files
        self.seconds = seconds
        self.clock = WAIT * seconds
        self.say = say

    def pytest_collectreport(self, report):
        if report.failed:
            self.say("broken", str(report.longrepr).splitlines()[-1].removeprefix("E").strip())

    def pytest_runtestloop(self, session):
        tests = {}
        for case in session.items:
            tests.setdefault(case.originalname, []).append(case)
        self.say("tests", list(tests))
        gc.freeze()                                                     # forks share more memory then
        self.before = bindings(self.folder)
        for name, cases in tests.items():
            self.say("test", name, self.run(cases))
        return True                                                     # pytest has nothing more to do

    def run(self, cases):
        """The outcome of a test. It may take half of the time that the exercise has left, in computing and by
        the clock: an endless loop, or a long sleep, leaves some for the others."""
        limit = max(1, int(self.seconds / 2))
        by_clock = max(1, int(self.clock / 2))
        word = os.urandom(8).hex().encode()                             # with it a verdict begins
        reader, writer = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
                self.run_here(cases, writer, word)
            finally:                                                    # after KeyboardInterrupt too
                os._exit(0)
        os.close(writer)
        said = None
        if select.select([reader], [], [], by_clock)[0]:
            said = os.read(reader, 4096)
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        end_descendants()
        self.seconds -= usage.ru_utime + usage.ru_stime
        self.clock -= time.monotonic() - started
        if self.restored():
            return "tampered"
        if said is None:
            return f"stopped after {by_clock} s: it waits, or is too slow"
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return f"stopped after {limit} s of computing: it does not end, or is too slow"
        if not said:
            return "its process ended"
        return said.removeprefix(word).decode(errors="replace") if said.startswith(word) else "tampered"

    def restored(self):
        """Whether the test had changed files that later ones read. Now they are as before."""
        for name, content in self.files.items():
            path = Path(self.folder, name)
            if not path.is_file() or path.read_bytes() != content:
                write_files(self.folder, self.files)
                return True
        return False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.weights = weights(item)

    def run_here(self, cases, writer, word):
        """In the process of a test: the only place where the student's code runs."""
        prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        os.setsid()
        os.closerange(3, writer)                                        # nobody else can be written to
        os.closerange(writer + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        outcomes = []
        tampered = False
        self.weights = []
        for case, following in zip(cases, [*cases[1:], None]):
            outcomes.append(outcome_of(runtestprotocol(case, log=False, nextitem=following)))
            tampered |= not all(torch.equal(now, before) for now, before in self.weights)
        outcome = next((outcome for outcome in outcomes if outcome != "passed"), "passed")
        if outcome != "passed" and len(cases) > 1:
            outcome += f" ({len(cases) - outcomes.count('passed')} of {len(cases)} cases)"
        after = bindings(self.folder)
        tampered |= any(after.get(name) is not value for name, value in self.before.items())
        tampered |= torch._C._len_torch_function_stack() > 0            # a mode changes what torch does
        os.write(writer, word + (b"tampered" if tampered else outcome.encode(errors="replace")))


def write_files(folder, files):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run_exercise(task, folder, results):
    """In the process of an exercise."""
    prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    prctl(SUBREAPER, 1)
    os.chdir(folder)

    def say(*record):
        os.write(results, json.dumps(record).encode() + b"\n")

    options = ["tests", f"--exercise={task['exercise']}", "-q", "-s", "--tb=short", "--assert=plain",
               "-p", "no:cacheprovider"]
    status = pytest.main(options, plugins=[OneByOne(folder, task["files"], task["seconds"], say)])
    if status != 0:
        say("broken", f"pytest ended with {int(status)}")
    os._exit(0)


def main():
    prctl(SUBREAPER, 1)
    prctl(DUMPABLE, 0)                                                  # its memory and files are its own
    here = Path.cwd()
    results = os.dup(1)
    for stream in (1, 2):                                               # what is printed is not read
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 28, 2 ** 28))       # for an endless file
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        folder = tempfile.mkdtemp(dir=here)
        write_files(folder, task["files"])
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            run_exercise(task, folder, results)
        os.waitpid(child, 0)
        end_descendants()
        for path in here.iterdir():                                     # the next exercise finds nothing here
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.write(results, b'["end"]\n')


if __name__ == "__main__":
    main()
