"""
How every command begins and ends. Commands import this before torch:

    from plumbing.start import run
    ...
    if __name__ == "__main__":
        run(main)

It sets GOMP_SPINCOUNT, which torch's threads read when torch is imported: threads that wait in a loop fill a
core, which slows a search beside another program. If your own program imports torch first, set that variable
yourself.
"""

import contextlib
import errno
import os
import sys
import traceback
import unicodedata
from pathlib import Path

from plumbing.errors import BadInput

if "OMP_WAIT_POLICY" not in os.environ:                 # a user's own choice stands
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")     # turns of that loop; then the thread sleeps

ROOT = Path(__file__).resolve().parents[1]
SEARCHES = "saffron model trie_cache engine mrm search baselines".split()       # they open no file

TURNS_TEXT = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()      # Unicode's classes of such characters


def run(main):
    """Run a command. Exit status: 2 and a line for BadInput; 1 and a line for what the system refuses (disk
    full, no permission, stdout closed); 130 after Ctrl-C; 141 when the reader of stdout went away. All else
    is a traceback. So is an error about a file that a model or a search opens: they read no files, so it is a
    mistake in the code."""
    line = ""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.reconfigure(errors="replace")        # a terminal may not know every character
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BadInput as error:
        status = 2
        line = printable(str(error).replace("\n", " "))
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except OSError as error:
        if is_of_a_search(error):
            raise
        status = 1
        line = f"{error.filename or 'standard output or a file'}: {error.strerror or error}"
    if line:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if status in (1, 141) and sys.stdout:               # Python will flush it again, which must not fail
        with contextlib.suppress(OSError):              # it may be no file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def is_of_a_search(error):
    """Whether an error is about a file that a model or a search has opened: the last line of this repository
    that it went through is one of theirs."""
    last = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename).resolve()
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            last = path
    return error.filename is not None and last in [ROOT / f"{name}.py" for name in SEARCHES]


def printable(text):
    """The text without characters that a terminal would obey (control characters, and those that turn the
    direction of writing): a model or a file may hold any."""
    return "".join("\ufffd" if is_obeyed(character) else character for character in text)


def is_obeyed(character):
    """Whether a terminal would do something else with a character than show it."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in TURNS_TEXT
