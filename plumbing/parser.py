"""
The command line: argparse with errors of one line, help with titles, and numbers in a range.
"""

import argparse
import contextlib
import os
from pathlib import Path

from plumbing.start import printable

ROOT = Path(__file__).resolve().parents[1]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """argparse's own two, but it says no default that is empty, and paths relative to this repository."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", {}):
            return action.help
        default = str(action.default).replace(f"{ROOT}{os.sep}", "")
        return super()._get_help_string(action).replace("%(default)s", default)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. `group` gives an add_argument whose options stand under a title."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def group(self, title):
        return self.add_argument_group(title).add_argument

    def error(self, message):
        if message.endswith("expected one argument"):
            message += ", and one that begins with - is written as in --prompt=-x"
        line = f"{self.prog}: {message} (--help lists all options)".replace("\n", " ")
        self.exit(2, f"{printable(line)}\n")


def number(low, high=2 ** 31, kind=int):
    """For argparse: a number from `low` to `high`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {'a whole' if kind is int else 'a'} number "
                                         f"from {low:.10g} to {high:.10g}")
    return parse
