"""
What grade.py starts in a submission's copy, in a process of its own: runs the tests, says how each one went.

    stdin     a JSON object: secret, exercises, modules, seconds. It is read before any code of the
              student's runs.
    stdout    a line for each phase of each test: its signature, then [name, is it a canary, phase, outcome].
              grade.py has given an open file without a name as stdout. All that is printed goes to stderr.

Each case of a test has a *canary* beside it: a test with the same name in the same place that must fail.
Whoever makes failing tests pass, by a change of pytest, of torch.testing or of the reports, makes canaries
pass too.
"""

import hmac
import importlib
import json
import os
import random
import resource
import sys

import pytest
import torch


def assertion():
    assert len("canary") == 7


def unlike_tensors():
    torch.testing.assert_close(torch.zeros(3), torch.ones(3))


def unequal_tensors():
    assert torch.equal(torch.zeros(3), torch.ones(3)) or torch.allclose(torch.zeros(3), torch.ones(3))


def far_number():
    assert 1.0 == pytest.approx(2.0)


def nothing_raised():
    with pytest.raises(ValueError):
        pass


def canary():
    """Fails, unless something that must fail does not."""
    for must_fail in (assertion, unlike_tensors, unequal_tensors, far_number, nothing_raised):
        try:
            must_fail()
        except (AssertionError, pytest.fail.Exception):
            continue
        return
    pytest.fail("as it must")


class Witness:
    """A plugin of pytest: chooses the tests, puts a canary beside each case, says how they went."""

    def __init__(self, task, say):
        self.exercises = task["exercises"]
        self.say = say
        self.canaries = set()
        self.order = random.Random(task["secret"])

    def pytest_collection_modifyitems(self, items):
        cases = []
        for item in items:
            mark = item.get_closest_marker("exercise")
            if mark and mark.args[0] in self.exercises:
                cases.append(item)
        items.clear()
        for case in cases:
            pair = [case, pytest.Function.from_parent(case.parent, name=case.name, callobj=canary)]
            self.canaries.add(pair[1])
            items += self.order.sample(pair, 2)                         # in an order that nobody knows

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        reason = f" ({report.longrepr[2]})" if report.skipped else ""
        self.say(item.name, item in self.canaries, report.when, report.outcome + reason)
        return report

    def pytest_collectreport(self, report):
        if report.failed:
            reason = str(report.longrepr).splitlines()[-1].removeprefix("E").strip()
            self.say(report.nodeid, False, "note", reason)


def main():
    task = json.load(sys.stdin)
    results = os.dup(1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 28, 2 ** 28))   # an endless print must not fill the disk

    def say(*record):
        line = json.dumps(record).encode()
        signature = hmac.digest(task["secret"].encode(), line, "sha256").hex()
        os.write(results, signature.encode() + b" " + line + b"\n")

    for name in task["modules"]:
        try:
            importlib.import_module(name)
        except BaseException as error:                                  # sys.exit too
            say(name, False, "note", f"{name}.py cannot be imported ({type(error).__name__}: {error})")
            sys.exit(2)
    options = ["tests", "-q", "--tb=no", "--assert=plain", "--continue-on-collection-errors",
               "-p", "no:cacheprovider"]
    sys.exit(pytest.main(options, plugins=[Witness(task, say)]))


if __name__ == "__main__":
    main()
