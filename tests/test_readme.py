"""What README and docs name is there, their links lead somewhere, their commands parse,
and their examples run."""

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from unittest import mock

import assign
import pytest
from conftest import ROOT

from baselines import SEARCHES
from plumbing.tokenizer import Prompt

README = "README.md"
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
READMES = sorted(path.relative_to(ROOT).as_posix()
                 for path in [*ROOT.glob("data/*/readme.md"), ROOT / "tests" / "readme.md"])
PAGES = [README, *DOCS, *READMES]
COURSE = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("course/*.md"))
FILE = re.compile(r"\.(py|md|jsonl?|html|png|txt|safetensors|csv|jinja|gz|log)$")
ROOTS = {"prompt", "policy", "result"}      # what examples call their variables


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def section(name, title):
    return text_of(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


def lookup(name):
    """What "module.name.name" is."""
    names = name.split(".")
    folder = [names.pop(0)] if names[0] in ("data", "results", "plumbing") else []
    thing = importlib.import_module(".".join([*folder, names.pop(0)]))
    for part in names:
        thing = getattr(thing, part)
    return thing


def rows(text, columns):
    """The cells of the tables in a text that have so many columns, without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith("|")]
    tables = [row for row in cells
              if len(row) == columns and not all(re.fullmatch("-+", cell) for cell in row)]
    return tables[1:]


def unfenced(text):
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def prose(text):
    """The lines of a page that are neither code, nor a table, nor a picture."""
    return [line for line in unfenced(text).splitlines() if not re.match(r"    |\||!\[|$", line)]


def code(text):
    """The code blocks of a page: fenced ones, then those indented after a blank line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    indented = re.findall(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+", unfenced(text))
    return fenced + [re.sub(r"^    ", "", block, flags=re.M) for block in indented]


# ------------------------------------------------------------------------------------------------------------
# sizes

def test_pages_are_short():
    content = text_of(README)
    assert len(content.splitlines()) <= 150 and len(content.encode()) <= 12_000
    for name in DOCS:
        assert len(text_of(name).splitlines()) <= 200, name
    for name in PAGES + COURSE:
        assert [line for line in prose(text_of(name)) if len(line) > 120] == [], name


@pytest.mark.parametrize("name", PAGES)
def test_long_pages_have_a_table_of_contents(name):
    text = text_of(name)
    if len(text.splitlines()) > 100:
        head = text.split("\n## ")[0]
        for title in re.findall(r"^## (.*)", text, re.M):
            assert f"](#{anchor(title)})" in head, title


# ------------------------------------------------------------------------------------------------------------
# names and links

def anchor(title):
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text_of(name)):
        path, _, fragment = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert fragment in map(anchor, headings), link


@pytest.mark.parametrize("name", [README, *DOCS])
def test_names_in_backticks_are_there(name):
    """`module.name` can be imported, and a `file.py` stands somewhere."""
    files = {path.relative_to(ROOT).as_posix() for pattern in ("*", "*/*", "*/*/*")
             for path in ROOT.glob(pattern)}
    for dotted in re.findall(r"`(\w+(?:[./]\w+)*\.\w+)(?:\([^`]*\))?`", unfenced(text_of(name))):
        if FILE.search(dotted):
            assert not dotted.endswith((".py", ".md")) or any(file.endswith(dotted) for file in files), dotted
        elif dotted.split(".")[0] not in ROOTS:
            lookup(dotted)


def test_files_that_the_pages_name_are_there():
    """Python files and pages, in backticks or not: with a folder from the root or beside the page,
    without one anywhere."""
    files = {path.name for pattern in ("*", "*/*", "*/*/*") for path in ROOT.glob(pattern)}
    files |= {"my_search.py", "my_guard.py", "HANDOUT.md", "table.md"}       # what is written
    for name in PAGES:
        for path in re.findall(r"(?<![\w/*])[\w./]+\.(?:py|md)\b", text_of(name)):
            beside = (ROOT / path).exists() or ((ROOT / name).parent / path).exists()
            assert (beside if "/" in path and not path.startswith("data/NAME")
                    else path.split("/")[-1] in files), (name, path)


def test_every_name_of_the_walk_is_called():
    names = re.findall(r"`(\w+(?:\.\w+)+)`", text_of("docs/reading.md"))
    assert len(names) > 50
    for name in names:
        assert callable(lookup(name)), name


def test_each_equation_has_a_function_and_a_test():
    table = rows(section("docs/reading.md", "The paper, piece by piece"), 3)
    assert len(table) >= 20
    for what, function, test in table:
        function, test = function.strip("`"), test.strip("`")
        assert callable(lookup(function)) and not function.startswith("test"), what
        assert (re.fullmatch(r"test_\w+\.test_\w+", test)
                and lookup(test).__module__ == test.split(".")[0]), what


def test_every_file_is_in_the_map():
    seen = []
    for files, minutes, question in rows(section(README, "Files"), 3):
        seen += files.split(", ")
        assert int(minutes) > 0 and "?" in question
    assert (len(set(seen)) == len(seen)
            and {path.name for path in ROOT.glob("*.py")} - set(seen) == {
                "attack.py", "baselines.py", "eval.py"})
    lines = sum(len(text_of(name).splitlines()) for name in seen)
    assert lines <= 2000 and "The reading path is at most 2,000 lines" in text_of(README)


def test_the_readme_counts_all_lines():
    files = [path for pattern in ("*.py", "plumbing/*.py", "data/*.py", "data/*/*.py",
                                  "results/*.py", "course/*.py")
             for path in ROOT.glob(pattern)]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    said = int(re.search(r"All of it is ([\d,]+) lines", text_of(README))[1].replace(",", ""))
    assert abs(lines - said) <= 100


def test_every_search_is_described():
    described = {row[0] for row in rows(section(README, "Searches"), 3)}
    assert described == set(SEARCHES)


def test_the_exercises_are_listed_with_their_points():
    table = rows(section("docs/teach.md", "The exercises"), 5)
    assert [(int(n), title) for n, title, *_ in table] == [(n, e.title) for n, e in assign.EXERCISES.items()]
    for n, _, level, minutes, points in table:
        assert level == assign.EXERCISES[int(n)].level
        assert (minutes, points) == (assign.time_of(int(n)), assign.worth(int(n)))


def test_teachers_are_told_which_files_a_submission_has():
    files = {}
    for n, exercise in assign.EXERCISES.items():
        for function in exercise.functions:
            files.setdefault(function.split(":")[0], set()).add(str(n))
    table = rows(section("docs/teach.md", "Grade"), 2)
    assert {file: set(numbers.split(", ")) for file, numbers in table} == files


def test_the_citation_is_that_of_the_paper():
    text, bibtex = text_of("CITATION.cff"), section("docs/paper.md", "How to cite the paper")
    assert text.startswith("cff-version: 1.2.0\n")
    for name in ("Qiu", "Li", "Wei", "He", "Tong"):
        assert (f"family-names: {name}\n" in text and f"{name}, " in bibtex
                and name in section(README, "Citation and licence"))
    assert ("2506.06444" in text and "2506.06444" in bibtex
            and "2506.06444" in section(README, "Citation and licence"))


# ------------------------------------------------------------------------------------------------------------
# commands and examples

def commands(text):
    """Each command of a page that runs Python, as words: those of code blocks, and those in backticks that
    begin with python or torchrun. NAME="..." stands for what it was set to;
    lines that end in a backslash go on."""
    lines = [line for block in code(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:(?:python|torchrun) |\w+(?:/\w+)*\.py --)[^`]+)`",
                        re.sub(r"\s*\n\s*", " ", unfenced(text)))
    names = {}
    for line in lines:
        if setting := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
            names[setting[1]] = re.sub(r"\$(\w+)", lambda m: names[m[1]], setting[2])
            continue
        line = re.sub(r"\$(\w+)", lambda m: names.get(m[1], m[0]), line)
        if not re.search(r"\bpython |^torchrun |^\w+(/\w+)*\.py ", line) or line.startswith(
                ("def ", "from ", "import ")):
            continue
        words, command = shlex.shlex(line, posix=True, punctuation_chars="&|;"), []
        words.whitespace_split, words.commenters = True, "#"
        for word in [*words, "&&"]:
            if word in ("&&", "|", ";"):
                if command and command[0] in ("python", "torchrun") or command and command[0].endswith(".py"):
                    yield command
                command = []
            elif command or not re.fullmatch(r"\w+=.*", word):
                command.append(word)


class Found(Exception):
    """Carries the parser of a script."""


@cache
def parser_of(script):
    """The argument parser of a script, which is run up to where it parses; None if it has none."""
    def stop(self, *_, **__):
        raise Found(self)
    if "parse_args" not in text_of(script):
        return None
    with (mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
          mock.patch.object(sys, "argv", [script])):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except Found as found:
            return found.args[0]


def script_and_options(command):
    """Of a command line: the script, as a path from the root, and what follows it."""
    if command[0].endswith(".py"):
        return command[0], command[1:]
    words = command[1:]
    if command[0] == "torchrun":
        assert words[0] == "--nproc_per_node" and words[1].isdecimal(), command
        words = words[2:]
    return words[0], words[1:]


@pytest.mark.parametrize("name", PAGES + COURSE)
def test_commands_parse(name, capsys):
    for command in commands(text_of(name)):
        script, options = script_and_options(command)
        if script == "-m":
            known = ([], ["--slow"], ["--slow", "-m", "slow"], ["tests", "--exercise", "4", "5"],
                     ["tests", "--exercise", "N", "M"])
            assert options[0] == "venv" or options[0] == "pytest" and options[1:] in known, command
            continue
        if script == "my_search.py":
            continue
        assert (ROOT / script).is_file(), command
        parser = parser_of(script)
        if parser is None:
            assert not options, command
            continue
        required = [action for action in parser._actions if action.required]
        whole = command[0] in ("python", "torchrun")                # else only options are shown
        for action in required:
            action.required = whole
        try:
            argparse.ArgumentParser.parse_args(parser, options)
        except SystemExit as end:
            assert end.code == 0 and "--help" in options, (command, capsys.readouterr().err)
        finally:
            for action in required:
                action.required = True


def test_there_are_commands():
    """The test above finds what it should."""
    found = [" ".join(command) for name in PAGES for command in commands(text_of(name))]
    assert len(found) > 60
    for part in ("python sample.py --safety saffron", "python -m pytest",
                 "--hide_prefill --beta 0 --out out/hidden", "--html tree.html",
                 "--weights {\"hh_rlhf\": 0.5}", "train_mrm.py --siblings 0"):
        assert any(part in command for command in found), part


@pytest.mark.parametrize("name", PAGES)
def test_options_in_the_prose_exist(name):
    scripts = [path.relative_to(ROOT).as_posix()
               for pattern in ("*.py", "data/*/prepare.py", "course/*.py", "results/*.py")
               for path in ROOT.glob(pattern)]
    parsers = [parser for parser in map(parser_of, scripts) if parser]
    known = ({option for parser in parsers for option in parser._option_string_actions}
             | {"--exercise"})
    for option in re.findall(r"`(--\w+)", text_of(name)):
        assert option in known, option


@pytest.mark.slow
def test_the_example_of_a_search_works_as_written(smollm2_folder, tmp_path):
    """It is short, and from its own file it is one of sample.py's searches."""
    text = section("docs/fork.md", "Your own search")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(statements) <= 20
    (tmp_path / "my_search.py").write_text(code, encoding="utf-8")
    command = re.search(r"python my_search.py.*", text)[0].split()[1:]
    assert command[:2] == ["my_search.py", "--safety"]
    done = subprocess.run([sys.executable, *command, "--max_new_tokens", "4"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--- none" in done.stdout and "--- careful, width 3" in done.stdout
    assert '"name":"careful"' in (tmp_path / "tree.html").read_text(encoding="utf-8")


def test_the_examples_in_python_work(smollm2_folder, monkeypatch, capsys, tmp_path):
    """The search from Python, and then the guard of one's own, as docs/fork.md has them;
    with shorter replies."""
    from baselines import rebase
    monkeypatch.chdir(ROOT)
    shorter = lambda text: re.sub(r"width=4", "width=2, max_new_tokens=3", text)
    names = {"rebase": rebase, "Path": Path}
    first, = code(section("docs/fork.md", "Your own prompt"))[:1]
    exec(shorter(first), names)
    assert "Stats(" in capsys.readouterr().out and names["result"].tokens
    file, call, lines = code(section("docs/fork.md", "Your own guard"))
    (tmp_path / "my_guard.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    exec(file + shorter(call) + "def load_guard(path, llama):\n" + textwrap.indent(lines, "    "), names)
    guard = names["load_guard"]("my_guard.py", names["policy"])
    assert (list(guard.score(Prompt([]), [guard.tokenizer.encode(text) for text in ("a lock", "a key")]))
            == [-1.0, 1.0])


def test_the_words_of_a_reply_are_those_that_are_printed():
    """What the README shows of sample.py begins as it prints it."""
    import sample
    shown = "\n".join(code(section(README, "What you see")))
    assert f"prompt:  {sample.PROMPT}\nprefill: {sample.PREFILL}\n" in shown
    assert "--- none ---" in shown and "--- saffron, width 4 ---" in shown and f"[{sample.PREFILL}]" in shown
