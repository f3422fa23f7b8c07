"""The evaluation measures what it says, survives being killed, and mixes no two runs."""

import json

import pytest
import torch
from conftest import run_script

from eval import log_prob, read_results, repeats


def test_log_prob_is_that_of_the_policy(tiny_policy):
    context, reply = [1, 2, 3], [4, 5]
    p = lambda tokens, token: tiny_policy.logits(tiny_policy(torch.tensor([tokens]))[0, -1]).softmax(-1)[token].log()
    expected = (p(context, 4) + p(context + [4], 5)) / 2
    assert log_prob(tiny_policy, context, reply) == pytest.approx(expected.item(), abs=1e-5)


def test_repeats():
    assert repeats([1, 2, 3, 4, 9, 1, 2, 3, 4]) and not repeats([1, 2, 3, 4, 1, 2, 3, 5]) and not repeats([1])


def test_a_line_that_was_cut_off_is_taken_away(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"text": "a\u2028b"}\n{"text": "c')
    assert read_results(path) == [{"text": "a\u2028b"}]
    assert path.read_text() == '{"text": "a\u2028b"}\n' and read_results(tmp_path / "absent") == []


def test_a_run_goes_on_where_it_was(tmp_path, guard, mrm):
    """Killed in the middle of a line, it ends with the results of an uninterrupted run."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tell me {i}", "response": "Sure, here it is"}) + "\n" for i in "ab"))
    options = ["--data", data, "--safety", "none,saffron", "--width", 2, "--max_new_tokens", 4, "--min_new_tokens", 2]
    for name in ("one", "two"):
        if name == "two":
            (tmp_path / name).mkdir()
            whole = (tmp_path / "one" / "results.jsonl").read_bytes()
            (tmp_path / name / "results.jsonl").write_bytes(whole[:len(whole) * 2 // 3])
        status, _, error = run_script("eval.py", *options, "--out", tmp_path / name)
        assert status == 0, error
    read = lambda name: [{k: v for k, v in r.items() if k != "seconds"}
                         for r in read_results(tmp_path / name / "results.jsonl")]
    assert read("one") == read("two") and len(read("one")) == 4
    none, saffron = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert (none["safety"], none["width"], none["prompts"]) == ("none", 1, 2)
    assert saffron["reward_calls"] == sum(r["reward_calls"] for r in read("one") if r["safety"] == "saffron") / 2
    status, _, error = run_script("eval.py", *options, "--out", tmp_path / "one", "--seed", 1)
    assert status == 2 and error.count("\n") == 1 and "seed" in error


@pytest.mark.parametrize("args, said", [
    (["--safety", "magic"], "magic"), (["--width", "0"], "--width 0"), (["--limit", "0"], "--limit"),
    (["--data", "no/file"], "no/file"),
])
def test_bad_input(tmp_path, args, said):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    status, _, error = run_script("eval.py", "--data", data, "--out", tmp_path / "out", *args)
    assert status == 2 and error.count("\n") == 1 and said in error


def test_a_malformed_row_is_named_by_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    status, _, error = run_script("eval.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    assert status == 2 and error.count("\n") == 1 and "line 2" in error
