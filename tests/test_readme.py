"""What the README names is there, what it counts is counted right, and its example of a search works."""

import importlib
import os
import re
import subprocess
import sys

import assign
from conftest import ROOT

from search import SEARCHES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def lookup(name):
    """What "module.name.name" is."""
    names = name.split(".")
    folder = [names.pop(0)] if names[0] in ("data", "results") else []
    thing = importlib.import_module(".".join([*folder, names.pop(0)]))
    for part in names:
        thing = getattr(thing, part)
    return thing


def rows(text, columns):
    """The cells of the tables in a text that have so many columns, without their heads."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    tables = [row for row in cells if len(row) == columns and not all(re.fullmatch("-+", cell) for cell in row)]
    return tables[1:]


def test_every_name_of_the_reading_order_is_there():
    names = re.findall(r"`(\w+(?:\.\w+)+)`", section("Reading order"))
    assert len(names) > 50
    for name in names:
        assert callable(lookup(name)), name


def test_each_equation_has_a_function_and_a_test():
    table = rows(section("Reading order"), 3)
    assert len(table) >= 20
    for what, function, test in table:
        function, test = function.strip("`"), test.strip("`")
        assert callable(lookup(function)) and not function.startswith("test"), what
        assert re.fullmatch(r"test_\w+\.test_\w+", test) and lookup(test).__module__ == test.split(".")[0], what


def test_line_counts_are_about_right():
    """Within a tenth, so that a fork need not count after each change."""
    lines = lambda name: len((ROOT / name).read_text(encoding="utf-8").splitlines())
    table, seen = rows(section("Reading order"), 5), []
    for _, files, counts, minutes, question in table:
        for file, count in zip(files.split(", "), counts.split(", "), strict=True):
            assert abs(lines(file) - int(count)) <= lines(file) / 10, file
            seen.append(file)
        assert int(minutes) > 0 and question.endswith("?")
    modules = [path.name for path in ROOT.glob("*.py")]
    assert sorted(seen) == sorted([*modules, "page.html"])


def test_every_search_is_described():
    described = {row[0] for row in rows(section("The idea"), 3)}
    assert described == set(SEARCHES)


def test_the_exercises_are_listed_with_their_points():
    table = rows(section("Teach with it"), 4)
    assert [(int(n), title) for n, title, *_ in table] == [(n, e.title) for n, e in assign.EXERCISES.items()]
    for n, _, level, points in table:
        assert level == assign.EXERCISES[int(n)].level
        assert points == (str(sum(points for _, points, _ in assign.tests_of(int(n)))) if points.isdecimal() else "by report")


def test_the_example_of_a_search_works_as_written(smollm2_folder, tmp_path):
    """It is short, and from its own file it is one of sample.py's searches."""
    code = re.search(r"```python\n(.*?)```", section("Fork it"), re.S)[1]
    statements = [line for line in code.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(statements) <= 20
    (tmp_path / "my_search.py").write_text(code, encoding="utf-8")
    command = re.search(r"python my_search.py.*", section("Fork it"))[0].split()[1:]
    assert command[:2] == ["my_search.py", "--safety"]
    done = subprocess.run([sys.executable, *command, "--max_new_tokens", "4"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--- none" in done.stdout and "--- careful, width 3" in done.stdout
    assert '"name":"careful"' in (tmp_path / "tree.html").read_text(encoding="utf-8")


def test_files_that_are_linked_are_there():
    for name in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_the_citation_is_that_of_the_paper():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert text.startswith("cff-version: 1.2.0\n")
    for name in ("Qiu", "Li", "Wei", "He", "Tong"):
        assert f"family-names: {name}\n" in text and f"{name}, " in section("How to cite")
    assert "2506.06444" in text and "2506.06444" in section("How to cite")
