"""
Files that are read and written. What is wrong with one that is read becomes one line; one that is written is
there whole or not at all.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
from pathlib import Path

from plumbing.errors import BadInput

KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def read_field(raw, name, kind=int, low=-math.inf, high=math.inf, default=...):
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
def parsing(what, expected):
    """Whatever goes wrong while something is parsed becomes BadInput: one line that names it. Wrap the
    parsing alone: a mistake in other code must stay a traceback."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, NameError):
        raise
    except BaseException as error:          # a damaged file makes a parser raise nearly anything; Rust panics
        said = f"not {expected} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if isinstance(error, BadInput):
            said = str(error)
        elif isinstance(error, FileNotFoundError):
            said = "no such file"
        elif isinstance(error, OSError):
            said = f"cannot be read ({error.strerror or error})"
        raise BadInput(said if said.startswith(str(what)) else f"{what}: {said}") from None


@contextlib.contextmanager
def reading(path, expected="a readable file"):
    """As `parsing`, for a file. One that git left as a pointer is named as such."""
    try:
        with parsing(path, expected):
            yield
    except BadInput:
        start = b""
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
            start = file.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise BadInput(f"{path}: is a Git LFS pointer, not the file itself; run: git lfs pull") from None
        raise


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
        with parsing(f"{path}, line {i}", "a JSON object of valid Unicode"):
            row = dict(json.loads(line).items())
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()   # fails on half an emoji
            yield i, row


def content_hash(path):
    """12 hex digits of what is in a file, or of all files of a folder that a model is read from."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".pt"))
    digest = hashlib.sha256()
    for one in files:
        if path.is_dir():
            digest.update(one.name.encode())
        with open(one, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process alone. The system gives it back, however the process ends. Raises
    BadInput when another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
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
