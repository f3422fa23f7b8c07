"""The plain reference of bench.py is the same search,
and the table says what the searches' own counts say."""

import json

import pytest
from conftest import paper, run_script

import saffron
from results.bench import CopyCache
from plumbing.tokenizer import Prompt
from search import saffron as search


@pytest.mark.parametrize("width, top_p, least", [(1, 0.8, 12), (4, 0.9, 12), (6, 1.0, 2)])
def test_reference_finds_the_same_reply(tiny_policy, tiny_mrm, width, top_p, least):
    """In float64; with least = 2, sequences end on the way."""
    prompt, caches = Prompt([5, 6, 7], [8]), (CopyCache(tiny_policy), CopyCache(tiny_mrm.llama))
    result = search(tiny_policy, tiny_mrm, prompt,
                    paper(width=width, max_new_tokens=12, min_new_tokens=least, top_p=top_p))
    frontiers = saffron.saffron_frontiers(tiny_policy, tiny_mrm, prompt, width, 12, least, top_p, read=caches)
    assert frontiers[-1][0].tokens == result.tokens
    if least == 12:                     # all are read at once: the copies of the last step are all there is
        assert sum(cache.peak_bytes for cache in caches) == result.stats.unshared_kv_bytes


@pytest.mark.slow
def test_table_and_json(smollm2_folder, tmp_path):
    status, out, err = run_script("results/bench.py", "--prompt_length", "40", "--width", "2",
                                  "--out", tmp_path / "b.json")
    assert status == 0, err
    lines, report = out.splitlines(), json.loads((tmp_path / "b.json").read_text())
    row, = report["rows"]
    assert lines[0] == report["machine"] and lines[2].split()[:3] == ["width", "prompt", "new"]
    assert (row["width"], row["prompt"], row["new"]) == (2, 40, 32)
    assert row["computed"] < 2 * (40 + 2 * 32) + 10 and 0 < row["of limit"] < 1.2
    assert row["KV MB"] < row["copies MB"] and row["ratio"] == row["seconds"] / row["copies"]


@pytest.mark.slow
def test_prompts_search_with(smollm2_folder):
    status, out, err = run_script("results/bench.py", "--prompts", "2")
    assert status == 0, err
    alone, together, ratio = (float(word) for word in out.split() if "." in word)
    assert ratio == pytest.approx(together / alone, abs=0.02) and 0 < ratio


@pytest.mark.parametrize("options, said", [
    (["--prompts", "0"], "prompts"), (["--width", "0"], "width"), (["--plot", "x.doc"], ".png, .svg or .pdf"),
    (["--out", "no/such/b.json"], "no folder"), (["--prompt_length", "5"], "template alone takes"),
])
def test_bad_values_are_refused(smollm2_folder, options, said):
    status, out, err = run_script("results/bench.py", *options)
    assert status == 2 and said in err and len(err.splitlines()) == 1
