"""A command ends in one way, whatever goes wrong, and what is written is there as a whole or not at all."""

import ast
import errno
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

from plumbing.errors import BadInput
from plumbing.files import check_output, parsing, reading, write_file

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from plumbing.errors import BadInput
from plumbing.start import run
from plumbing.files import write_file
def main():
    {body}
run(main)
"""


def end_of(body, stdout=subprocess.PIPE, shell=""):
    """(status, lines on stderr) of a command that does this."""
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT), body=body)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("body, shell, status, said", [
    ("print('done')", "", 0, None),
    ("raise BadInput('no such thing')", "", 2, "-c: no such thing"),
    ("raise KeyboardInterrupt", "", 130, None),
    ("print('x' * 100000)", "> /dev/full", 1, "No space left on device"),
    ("print('x')", "> /dev/full", 1, "No space left on device"),
    ("print('x')", ">&-", 1, "closed"),
    ("open('/proc/no/such/file', 'w')", "", 1, "/proc/no/such/file"),
])
def test_every_end_is_one_line_at_most(body, shell, status, said):
    code, lines = end_of(body, shell=shell)
    assert code == status and len(lines) == (said is not None), lines
    assert said is None or said in lines[0]


@pytest.mark.parametrize("call", [
    "open('no-such.txt')", "__import__('pathlib').Path('no-such.txt').read_text()"])
def test_a_file_that_a_search_opens_is_a_traceback(call):
    """No model and no search reads a file: one that tries to has a mistake in it."""
    code, lines = end_of(f"""import baselines
    exec(compile("def shares(rewards, count): {call}", baselines.__file__, "exec"), vars(baselines))
    baselines.shares([], 1)""")
    assert code == 1 and lines[0].startswith("Traceback") and "no-such.txt" in lines[-1]
    assert any("baselines.py" in line and "in shares" in line for line in lines)


def test_a_reader_that_went_away():
    code, lines = end_of("[print('x' * 1000) for _ in range(10000)]", shell="| head -1 > /dev/null; exit 0")
    assert lines == []
    command = [sys.executable, "-c",
               SCRIPT.format(root=str(ROOT), body="[print('x' * 1000) for _ in range(10000)]")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_file_is_written_whole_with_the_users_permissions(tmp_path):
    path, umask = tmp_path / "a.txt", os.umask(0o027)
    try:
        write_file(path, "new")
        write_file(tmp_path / "b.bin", b"\0")
    finally:
        os.umask(umask)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "b.bin"}


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("name, said", [
    (".", "folder or a device"), ("no/such/a", "no folder"), ("a" * 300, "too long"),
    ("file/a", "no folder")])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, name, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=said):
        check_output(tmp_path / name)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_device_is_not_replaced():
    with pytest.raises(BadInput, match="device"):
        check_output("/dev/null")
    status, _, error = run_script("sample.py", "--html", "/dev/null")
    assert status == 2 and error.count("\n") == 1 and not os.path.isfile("/dev/null")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_file(tmp_path / "a", "new")
    assert error.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_whatever_a_parser_raises_is_one_line():
    for error in (ValueError("a\nb"), KeyError("k"), RecursionError(), MemoryError("m"), TypeError("t")):
        with pytest.raises(BadInput, match="^f: not a thing") as found, reading("f", "a thing"):
            raise error
        assert "\n" not in str(found.value)


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    """`parsing` may be given any name, such as standard input: a file that is called so does not matter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "standard input").write_text("version https://git-lfs")
    with (pytest.raises(BadInput, match="^standard input: not UTF-8 text"),
          parsing("standard input", "UTF-8 text")):
        b"\xff".decode()


def test_a_mistake_in_a_name_is_no_wrong_file():
    with pytest.raises(NameError), reading("f", "a thing"):
        no_such_name                                                    # noqa: B018, F821


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_do_not_spin_unless_the_user_says_so(given):
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    code = "import plumbing.start, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    assert done.stdout.strip() == ("3000" if not given else given.get("GOMP_SPINCOUNT", "None"))


def test_importing_the_core_changes_nothing():
    """No signal handler, no excepthook, no environment variable."""
    code = """
import os, signal, sys
import torch, numpy
before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), \
sys.excepthook, list(sys.path)
import saffron, model, trie_cache, engine, mrm, search, baselines
after = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), \
sys.excepthook, list(sys.path)
print(before == after, sorted(name for name in sys.modules if name.startswith("plumbing.")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split(maxsplit=1) == ["True", "['plumbing.errors']\n"], done.stderr


CORE = ["saffron", "model", "trie_cache", "engine", "mrm", "search", "baselines"]
COMMANDS = ["sample", "train_mrm", "eval"]


def imports(path):
    """The modules that a file of ours imports where it is imported itself: not in `main`,
    nor where it is a script."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for child in ast.walk(node) if not isinstance(node, (ast.If, ast.FunctionDef)) else []:
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from ([f"plumbing.{a.name}" for a in child.names]
                            if child.module == "plumbing" else [child.module])


def test_who_may_import_whom():
    """The core imports itself, torch, numpy, the standard library and plumbing.errors; plumbing, data and
    results never a command, and nothing itself by way of others."""
    graph = {path.stem: set(imports(path)) for path in ROOT.glob("*.py")}
    graph |= {f"plumbing.{path.stem}": set(imports(path)) for path in (ROOT / "plumbing").glob("*.py")}
    graph |= {str(path.relative_to(ROOT))[:-3].replace("/", "."): set(imports(path))
              for folder in ("data", "results", "course") for path in (ROOT / folder).rglob("*.py")}
    for name in CORE:
        others = {module for module in graph[name] if module.split(".")[0] not in sys.stdlib_module_names}
        assert others <= {*CORE, "torch", "torch.nn", "torch.nn.functional", "numpy", "plumbing.errors"}, name
    assert not graph["plumbing.errors"]
    for name, modules in graph.items():
        assert not modules & set(COMMANDS), f"{name} imports a command"

    def below(name, path=()):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        for module in graph.get(name, ()):
            below(module, (*path, name))
    for name in graph:
        below(name)
