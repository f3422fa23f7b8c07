"""
How every command begins and ends: options, files that are read and written, one line for what goes wrong.

Import this before torch, as all modules do. It sets GOMP_SPINCOUNT: threads that wait in a loop fill a core,
which slows a search beside another program. If your program imports torch first, set that variable yourself.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import signal
import sys
import unicodedata
from pathlib import Path
if "OMP_WAIT_POLICY" not in os.environ:                 # a user's own choice stands
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")     # turns of that loop; then the thread sleeps


class BadInput(ValueError):
    """What the user gave (a file, an option, a prompt) cannot be used. The message says what is allowed."""


def interrupt(number, frame):
    """Ctrl-C. In the middle of an import it ends the program: C++ code there would abort on an exception."""
    while frame and "importlib" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame:
        os._exit(130)
    raise KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):               # not in the main thread
        signal.signal(signal.SIGINT, interrupt)
# Ctrl-C that nobody catches, as between two imports, leaves no traceback either.
sys.excepthook = lambda kind, *more: (os._exit(130) if kind is KeyboardInterrupt else
                                      sys.__excepthook__(kind, *more))


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
        status, line = 2, printable(str(error).replace("\n", " "))
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


def printable(text):
    """The text without characters that a terminal would obey (control characters, and those that turn the
    direction of writing): a model or a file may hold any."""
    obeyed = lambda c: (unicodedata.category(c) == "Cc" and c not in "\n\t" or
                        unicodedata.bidirectional(c) in "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split())
    return "".join("\ufffd" if obeyed(c) else c for c in text)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each option's default; paths in this repository are relative to it."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", {}):
            return action.help
        return super()._get_help_string(action).replace("%(default)s", (
            str(action.default).replace(f"{Path(__file__).resolve().parent}{os.sep}", "")))


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line. `group` gives an add_argument whose options stand under a title."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def group(self, title):
        return self.add_argument_group(title).add_argument

    def error(self, message):
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


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def field(raw, name, kind=int, low=-math.inf, high=math.inf, default=...):
    """A field of a JSON object, of a type (int is a float too, a bool is neither) and in a range. Raises
    BadInput. default: what stands for one that is absent or null."""
    value = raw.get(name)
    if value is None and default is ...:
        raise BadInput(f"the field {name} is missing")
    return default if value is None else check(value, name, kind, low, high)


def check(value, name, kind=int, low=-math.inf, high=math.inf):
    """The value, if it has the type and the range. Raises BadInput."""
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits or kind in (int, float) and not low <= value <= high:
        within = f" of at least {low:.10g} and at most {high:.10g}" if kind in (int, float) else ""
        raise BadInput(f"{name} = {json.dumps(value)[:40]} must be {KINDS[kind]}{within}")
    return kind(value)


def check_keys(raw, known):
    """Refuse settings that this code would ignore. known: {key: its allowed values, or None for all}. Raises
    BadInput for another value, and for a key that is not known, unless it is null, false (or 0) or empty."""
    for key, value in raw.items():
        allowed = known.get(key, [None, False, "", [], {}])
        if allowed is not None and value not in allowed:
            raise BadInput(f"{key} = {json.dumps(value)[:80]} is not supported, only "
                           f"{' or '.join(map(json.dumps, allowed[:4]))}")


@contextlib.contextmanager
def reading(path, expected="a readable file"):
    """Whatever goes wrong while a file is read and parsed becomes BadInput: one line that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:          # a damaged file makes a parser raise nearly anything; Rust panics
        said = f"not {expected} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if isinstance(error, BadInput):
            said = str(error)
        elif isinstance(error, FileNotFoundError):
            said = "no such file"
        elif isinstance(error, OSError):
            said = f"cannot be read ({error.strerror or error})"
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                said = "is a Git LFS pointer, not the file itself; run: git lfs pull"
        raise BadInput(said if said.startswith(str(path)) else f"{path}: {said}") from None


def read_json(path):
    """The JSON object in a file. Raises BadInput."""
    with reading(path, "a JSON object"):
        return dict(json.loads(read_text(path)).items())


def read_text(path):
    """The text of a file. Raises BadInput."""
    with reading(path, "UTF-8 text"):
        return Path(path).read_bytes().decode("utf-8-sig")


def read_lines(path):
    """[(number, line)] of the lines of a text that are not blank. Only \\n, or \\r\\n, ends a line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(i, line.removesuffix("\r")) for i, line in lines if line.strip()]


def read_jsonl(path):
    """(line number, object) of each line of a file of JSON objects. Raises BadInput that names the line."""
    for i, line in read_lines(path):
        with reading(f"{path}, line {i}", "a JSON object of valid Unicode"):
            row = dict(json.loads(line).items())
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()   # fails on half an emoji
            yield i, row


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process alone. The system gives it back, however the process ends. Raises
    BadInput when another one holds it."""
    windows = os.name == "nt"
    handle = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT) if windows else os.open(folder, os.O_RDONLY)
    try:
        try:
            if windows:
                import msvcrt
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{folder}: another run is at work there; wait, or take another folder") from None
        yield
    finally:
        os.close(handle)


def check_output(path):
    """The temporary name for a file to be written: beside it, or beside what it is a link to. Call it before
    the work begins. Raises BadInput for a name that cannot be a file's, OSError without permission."""
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
