import gzip
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SMOLLM2 = ROOT / "data" / "smollm2"
sys.path[:0] = [str(ROOT), str(ROOT / "course")]

import plumbing.start                           # noqa: E402, F401: before torch
import torch                                    # noqa: E402

try:
    from baselines import SEARCHES
    from engine import Options
    from mrm import Guard
    from plumbing.adapters import load_adapter
    from plumbing.checkpoint import load_llama
    from plumbing.released import load_released_mrm
    from plumbing.tokenizer import Template
    from plumbing.vocabulary import BYTE_OF
except SystemExit as end:                       # pytest would end too, and say nothing
    raise ImportError("0 points: a module ends the program while it is imported (sys.exit)") from end


# ------------------------------------------------------------------------------------------------------------
# exercises: tests marked exercise(N, points=P), graded by `python -m pytest tests --exercise N`. Those marked
# bonus=True too are counted apart.

def pytest_addoption(parser):
    parser.addoption("--exercise", nargs="+", action="extend", metavar="N",
                     help="run the tests of these exercises and count their points")
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addini("exercise_functions", "in a student copy: what is to be written", type="linelist")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")
    config.left_out = 0                                 # how many slow tests were not run
    config.addinivalue_line("markers", "exercise(N, points, bonus): checks exercise N, "
                            "and is worth so many points if all of it passes")
    config.grades = {}          # (exercise, bonus or not, test function) -> (points, [outcome of each case])
    words = config.getoption("--exercise") or []
    config.exercises = sorted({int(word) for word in words if word.isdecimal()})
    paths = [word for word in words if not word.isdecimal()]
    if words and not config.exercises or not all(Path(path.partition("::")[0]).exists() for path in paths):
        raise pytest.UsageError(f"--exercise {' '.join(words)}: expected numbers of exercises")
    if paths:                                           # --exercise 4 5 tests
        config.args = paths


def exercise_of(item):
    """The number of the exercise that a test checks, or None."""
    marker = item.get_closest_marker("exercise")
    return marker and marker.args[0]


def pytest_collection_modifyitems(config, items):
    wanted = set(config.exercises)
    named = any("::" in argument for argument in config.args)           # a test that is named is wanted
    if not config.getoption("--slow") and not named and not wanted:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.left_out = len(slow)
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if wanted:
        numbers = sorted({exercise_of(item) for item in items} - {None})
        if missing := sorted(wanted - set(numbers)):
            raise pytest.UsageError(f"no test checks exercise {' and '.join(map(str, missing))}: "
                                    f"those of {', '.join(map(str, numbers))} are there; "
                                    "others are graded by a report alone")
        config.hook.pytest_deselected(items=[item for item in items if exercise_of(item) not in wanted])
        items[:] = [item for item in items if exercise_of(item) in wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that comes to what another exercise has left open is skipped, not failed."""
    report = yield
    error, mine = call.excinfo and call.excinfo.value, exercise_of(item)
    if isinstance(error, NotImplementedError) and (missing := re.match(r"exercise (\d+)", str(error))):
        if int(missing[1]) != mine:
            report.outcome, report.longrepr = "skipped", (
                str(item.path), item.location[1], f"needs exercise {missing[1]}")
    if mine is not None and (report.when == "call" or report.outcome != "passed"):
        given = item.get_closest_marker("exercise").kwargs
        key = mine, given.get("bonus", False), item.originalname
        note = f" ({report.longrepr[2]})" if report.outcome == "skipped" else ""
        item.config.grades.setdefault(key, (given["points"], []))[1].append(report.outcome + note)
    return report


def pytest_keyboard_interrupt(excinfo):
    """After Ctrl-C, the line of this repository at which the program was: mostly that of an endless loop."""
    lines = [entry for entry in excinfo.traceback
             if Path(entry.path).is_relative_to(ROOT) and "site-packages" not in Path(entry.path).parts]
    if lines:
        path = Path(lines[-1].path).relative_to(ROOT)
        print(f"\ninterrupted at {path}, line {lines[-1].lineno + 1}, in {lines[-1].name}")


def pytest_unconfigure(config):
    """The last thing printed: the points, or how many tests were left out."""
    if config.left_out:
        print(f"{config.left_out} slow tests were left out; python -m pytest --slow runs all")
    if config.exercises and config.grades:
        if functions := config.getini("exercise_functions"):            # in a student copy
            print_refused(functions, config.exercises)
        print_points(config.exercises, config.grades)


def print_refused(functions, numbers):
    """What grading would not take as it stands. functions: "4 search.py:nucleus" and so on."""
    from graft import refused
    names = {}
    for number, function in (line.split(" ", 1) for line in functions):
        if int(number) in numbers:
            file, name = function.split(":")
            names.setdefault(file, []).append(name)
    for file in names:
        for name, why in refused((ROOT / file).read_text(encoding="utf-8"), names[file]).items():
            print(f"\ngrading would not take {name} in {file}: {why} (HANDOUT.md says what is taken)")


def print_points(numbers, grades):
    """The points of each test, of each exercise, and (the last line) of all. Bonus points are beside them."""
    all_earned = all_possible = 0
    for number in numbers:
        print(f"\nexercise {number}")
        for is_bonus in (False, True):
            mine = [(name, *grade) for (n, bonus, name), grade in grades.items()
                    if n == number and bonus == is_bonus]
            earned = possible = 0
            for name, points, outcomes in mine:
                worst = next((outcome for outcome in outcomes if outcome != "passed"), "passed")
                got = points if worst == "passed" else 0
                earned += got
                possible += points
                cases = (f" ({outcomes.count(worst)} of {len(outcomes)} cases)"
                         if got < points and len(outcomes) > 1 else "")
                print(f"  {got} of {points}{' (bonus)' * is_bonus}  {name}: {worst}{cases}")
            if is_bonus and mine:
                print(f"  bonus: {earned} of {possible}")
            if not is_bonus:
                all_earned += earned
                all_possible += possible
                if len(numbers) > 1:
                    print(f"  {earned} of {possible} in all")
    needed = sorted({int(n) for n in re.findall(r"needs exercise (\d+)", str(grades))})
    if needed:
        print(f"first write exercise {' and '.join(map(str, needed))}: without it, tests above are skipped")
    print(f"{all_earned} of {all_possible} points")


@pytest.fixture(scope="session")
def golden_search():
    """The search of the paper's authors, run on the two tiny models: prompts, frontiers, outputs."""
    return json.loads((GOLDEN / "search.json").read_text())


@pytest.fixture(scope="session")
def tiny_policy(golden_search):
    llama = load_llama(GOLDEN / "tiny_policy", torch.float64)
    llama.template = Template(golden_search["policy_prefix"], golden_search["policy_infix"])
    return llama


@pytest.fixture(scope="session")
def tiny_guard():
    return load_llama(GOLDEN / "tiny_guard", torch.float64)


@pytest.fixture(scope="session")
def tiny_mrm(tiny_guard, golden_search):
    template = Template(golden_search["mrm_prefix"], golden_search["mrm_infix"])
    return load_released_mrm(GOLDEN / "tiny_mrm", tiny_guard, template)


@pytest.fixture(scope="session")
def tiny_scalar_guard(tiny_guard, golden_search):
    guard = Guard(tiny_guard, Template(golden_search["mrm_prefix"], golden_search["mrm_infix"]))
    torch.manual_seed(0)
    torch.nn.init.normal_(guard.head.weight)
    return guard


@pytest.fixture(scope="session")
def smollm2_folder():
    """The default weights, made on the first run and kept."""
    if not (SMOLLM2 / "model.safetensors").exists():
        subprocess.run([sys.executable, SMOLLM2 / "prepare.py"], check=True)
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    return load_llama(smollm2_folder)


@pytest.fixture(scope="session")
def guard(smollm2):
    return load_adapter(SMOLLM2 / "guard.safetensors", smollm2, "guard")


@pytest.fixture(scope="session")
def mrm(smollm2):
    return load_adapter(SMOLLM2 / "mrm.safetensors", smollm2, "mrm")


@pytest.fixture(scope="session")
def public_data():
    """The folder with the publishers' data sets, named by SAFFRON_DATA."""
    folder = os.environ.get("SAFFRON_DATA")
    if not folder:
        pytest.skip("SAFFRON_DATA does not name a folder with the public data sets")
    return Path(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory, public_data):
    """Name to a folder with the real tokenizer files of Qwen3 and Llama 3."""
    folders = {}
    for name in ("qwen3", "llama3"):
        folders[name] = tmp_path_factory.mktemp(name)
        for path in (public_data / "tokenizers" / name).glob("*.gz"):
            (folders[name] / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return folders


def spelled(tokenizer, tokens):
    """The text of tokens, that of control tokens included."""
    names = {i: text for text, i in tokenizer.added.items()}
    return "".join(names.get(token) or tokenizer.decode([token]) for token in tokens)


def write_tokenizer(folder, byte_ids, control, pattern=r"\S+|\s+", bos=""):
    """A tokenizer of single bytes in a folder: byte_ids[b] is the id of byte b; control: text to id."""
    letters = {b: letter for letter, b in BYTE_OF.items()}
    write_json(folder / "tokenizer.json", {
        "added_tokens": [{"id": i, "content": text, "special": True} for text, i in control.items()],
        "normalizer": None, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
        "model": {"type": "BPE", "merges": [], "vocab": {letters[b]: i for b, i in byte_ids.items()}}})
    write_json(folder / "tokenizer_config.json",
               {"bos_token": bos, "chat_template": bos + "{{ messages[0].content }}\n"})


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def run_script(script, *args, stdin=""):
    """Run one of the repository's scripts from its first line, as `python script args` in its folder would,
    but in this process, which has imported torch already: (exit status, stdout, stderr)."""
    text = lambda content=b"": io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    out, err, status = text(), text(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in (("argv", [str(script), *map(str, args)]), ("stdin", text(stdin.encode())),
                            ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, value)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            status = (end.code if isinstance(end.code, int) else 0 if end.code is None
                      else print(end.code, file=err) or 1)
        for stream in (out, err):
            stream.flush()
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def torchrun(script, *args):
    """Start a script in two processes of its own, as the command line torchrun does: a subprocess.Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               script, *args]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, encoding="utf-8")


def in_two_processes(script, *args):
    """The same to its end: (exit status, stdout, stderr)."""
    process = torchrun(script, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def reward_model_of(method, mrm, guard):
    return {None: None, "guard": guard, "mrm": mrm}[SEARCHES[method][1]]


def paper(**options):
    """The Options of a search, by default with the paper's ranking."""
    return Options(**{"beta": 0.0} | options)
