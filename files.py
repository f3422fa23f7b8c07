"""
How every command begins and ends: options, files that are read and written, one line for what goes wrong.

Import this before torch, as all modules do. It sets GOMP_SPINCOUNT: threads that wait in a loop fill a core,
which slows a search beside another program. One that imports torch first must have it in its environment.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
from pathlib import Path
if "OMP_WAIT_POLICY" not in os.environ:                 # a user's own choice stands
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")     # turns of that loop; then the thread sleeps


def interrupt(number, frame):
    """Ctrl-C. In the middle of an import it ends the program: C++ code there would abort on an exception."""
    while frame and "importlib" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame:
        os._exit(130)
    raise KeyboardInterrupt


# Ctrl-C that nobody catches, as between two imports, leaves no traceback either.
sys.excepthook = lambda kind, *more: (os._exit(130) if kind is KeyboardInterrupt else
                                      sys.__excepthook__(kind, *more))
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):               # not in the main thread
        signal.signal(signal.SIGINT, interrupt)


class BadInput(ValueError):
    """What the user gave (a file, an option, a prompt) cannot be used. The message says what is allowed."""


def run(main):
    """Run a command. Exit status: 2 and a line for BadInput; 1 and a line for what the system refuses (disk
    full, no permission, stdout closed); 130 after Ctrl-C; 141 when the reader of stdout went away."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        sys.stdout.reconfigure(errors="replace")        # a terminal may not know every character
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BadInput as error:
        status, line = 2, error
    except (KeyboardInterrupt, BrokenPipeError) as error:
        status, line = 130 if isinstance(error, KeyboardInterrupt) else 141, ""
    except OSError as error:
        status, line = 1, f"{error.filename or 'standard output or a file'}: {error.strerror or error}"
    if line:
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    if status in (1, 141) and sys.stdout:               # Python will flush it again, which must not fail
        with contextlib.suppress(OSError):              # it may be no file of the system's
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def at_least_1(text):
    """For argparse: a whole number of at least 1."""
    if int(text) >= 1:
        return int(text)
    raise ValueError


@contextlib.contextmanager
def reading(path, expected="a readable file"):
    """Whatever goes wrong while a file is read and parsed becomes BadInput: one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from None
    except BadInput:
        raise
    except Exception as error:                          # a damaged file makes a parser raise nearly anything
        raise BadInput(f"{path}: not {expected} ({type(error).__name__}: {error})".splitlines()[0]) from None


def read_json(path):
    """The JSON object in a file. Raises BadInput."""
    with reading(path, "a JSON object"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")).items())


def read_jsonl(path):
    """(line number, object) of each line of a file of JSON objects. Raises BadInput that names the line."""
    with reading(path, "UTF-8 text"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        with reading(f"{path}, line {number}", "a JSON object"):
            yield number, dict(json.loads(line).items())


def check_output(path):
    """The temporary name for a file to be written: beside it, or beside what it is a link to. Before the
    work, this raises BadInput for a name that cannot be a file's, OSError where permission is missing."""
    partial = Path(f"{os.path.realpath(path)}.{os.getpid()}.partial")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise IsADirectoryError(0, "it is a folder or a device")
        open(partial, "ab").close()
        partial.unlink()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            raise
        said = error.strerror if partial.parent.is_dir() else f"{partial.parent} is no folder"
        raise BadInput(f"{path}: expected the name of a file, in a folder that is there ({said})") from None
    return partial


def write_file(path, content):
    """Write text or bytes under a temporary name, then rename it: what was there stays until all is there."""
    partial = check_output(path)
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, os.path.realpath(path))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
