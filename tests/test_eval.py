"""The evaluation measures what it says, survives being killed, and mixes no two runs."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMOLLM2, in_two_processes, run_script
from safetensors.torch import save_file

from plumbing.attacks import Attacker
from plumbing.measures import Measures, repeats
from plumbing.runs import parse_runs
from plumbing.tables import HARMFUL, interval, merge_results, read_results, summarize
from eval import attacked
from model import Llama
from plumbing.config import read_config
from plumbing.guards import OwnGuard
from plumbing.tokenizer import Prompt


def test_log_probs_are_those_of_the_policy(tiny_policy):
    """Of two replies to two prompts, and then of others: the prompts stay in the tries,
    and are not read again."""
    prompts = [Prompt([1, 2, 3]), Prompt([9])]
    contexts = [p.policy_tokens(tiny_policy.template) for p in prompts]
    measures = Measures(tiny_policy, None, None, dict(enumerate(prompts)), asked={})
    p = lambda tokens, token: tiny_policy.logits(
        tiny_policy(torch.tensor([tokens]))[0, -1]).softmax(-1)[token].log().item()
    for replies in ([[4, 5], [6]], [[4], [7, 8]]):
        expected = [sum(p(context + reply[:i], token) for i, token in enumerate(reply)) / len(reply)
                    for context, reply in zip(contexts, replies)]
        assert (list(measures.log_probs(dict(enumerate(replies))).values())
                == pytest.approx(expected, abs=1e-5))
    computed = [reader.trie.computed for reader, _ in measures.readers.values()]
    assert computed == [len(context) + 3 for context in contexts]


def test_a_guard_is_anything_with_score(smollm2, guard):
    """Read side by side through tries, or asked by `score`: the same rewards."""
    class Mine:
        def score(self, prompt, replies):
            return guard.score(prompt, replies)
    other = OwnGuard(Mine())
    prompts = {0: smollm2.tokenizer.prompt("How are you?", "Fine"), 1: smollm2.tokenizer.prompt("Why?")}
    replies = {0: smollm2.tokenizer.encode(" and you?"), 1: smollm2.tokenizer.encode("Because.")}
    measures = Measures(smollm2, guard, other, {}, asked=prompts)
    ours, theirs = measures.rewards(guard, replies), measures.rewards(other, replies)
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[0] != ours[1]


def test_repeats():
    assert repeats([1, 2, 3, 4, 9, 1, 2, 3, 4]) and not repeats([1, 2, 3, 4, 1, 2, 3, 5]) and not repeats([1])


def test_results_of_several_processes_become_one_file(tmp_path):
    """Lines that were cut off are passed over, a reply that stands in two files counts once,
    the order is fixed."""
    line = lambda row, text, method="none": json.dumps(
        {"safety": method, "width": 1, "row": row, "text": text}) + "\n"
    (tmp_path / "results.jsonl").write_text(line(2, "a\u2028b") + line(0, "c", "saffron") + '{"text": "c')
    (tmp_path / "results-1.jsonl").write_text(line(1, "d") + line(2, "again") + line(3, "e")[:-1])
    merged = merge_results(tmp_path)
    assert [(r["safety"], r["row"], r["text"]) for r in merged] == [
        ("none", 1, "d"), ("none", 2, "a\u2028b"), ("saffron", 0, "c")]
    assert read_results(tmp_path) == merged and {p.name for p in tmp_path.iterdir()} == {"results.jsonl"}


def test_methods_and_widths():
    assert parse_runs("none,saffron,beam:1/3", "2,4") == [
        ("none", 1), ("saffron", 2), ("saffron", 4), ("beam", 1), ("beam", 3)]


@pytest.fixture
def judge(smollm2_folder, guard):
    """The guard's own file is good enough for these tests."""
    return smollm2_folder / "guard.safetensors"


def test_attacks(smollm2):
    """The policy reads the prompt under the attack, the verdict is on the request, with the same prefill."""
    row = {"prompt": "Tell me", "response": "Sure, here it is, all of it", "suffix": "now!"}

    def texts(attack, row=row, **options):
        pair = attacked(row, Attacker(smollm2, **options), attack)
        decode = smollm2.tokenizer.decode
        return [decode(smollm2.template(p.user, p.prefill)).split("user\n")[1] for p in pair]

    plain = "Tell me\nassistant\n"
    assert texts("none") == [plain, plain]
    assert texts("prefill", prefill_tokens=4) == [plain + "Sure, here it"] * 2
    assert texts("suffix") == ["Tell me now!\nassistant\n", plain]
    assert texts("suffix", suffix="at once") == ["Tell me at once\nassistant\n", plain]
    assert texts("prefill", row | {"category": "harmless"}) == [plain, plain]


def test_an_interval_is_over_requests():
    """Copies of a row, or replies of other seeds to one request, make it no narrower."""
    two, copies = [True, False], [True, False] * 12
    requests = ["a", "b"] * 12
    assert interval(copies, requests) == interval(two) and interval(copies)[1] < interval(two)[1]
    numbers = [1.0, 2.0, 4.0, 8.0]
    assert interval(numbers * 5, ["a", "b", "c", "d"] * 5) == interval(numbers)
    rows = [{"safety": "none", "width": 1, "row": i, "prompt": "ab"[i % 2], "text": " " if i else "x",
             "asr": i % 2 == 0, "tflop": 0.1} for i in range(4)]
    line, = summarize(rows, None)
    assert (line["prompts"], line["requests"], line["empty"]) == (4, 2, 0.75)
    assert line["asr_ci"] == interval([True, False])


def test_intervals_and_efficiency():
    """A bootstrap interval holds the mean and narrows with more values; that of a rate is Wilson's."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    low, high = interval([False] * 60)                                  # Wilson's: 0 of 60 may be up to 6 %
    assert low == 0 and abs(high - 1.96 ** 2 / (60 + 1.96 ** 2)) < 1e-9
    assert np.allclose(interval([True] * 60), [1 - high, 1.0])
    for end in interval([True] * 9 + [False] * 51):         # the rates that 0.15 is 1.96 standard errors from
        assert abs(0.15 - end) == pytest.approx(1.96 * np.sqrt(end * (1 - end) / 60))
    result = lambda method, asr, tflop: {
        "safety": method, "width": 1, "row": 0, "text": ""} | dict.fromkeys(HARMFUL, 0.0) | {
        "asr": asr, "tflop": tflop}
    none, saffron = summarize([result("none", 1, 1.0), result("saffron", 0, 8.0)], None)
    assert none["scaleff"] == pytest.approx(math.log(8)) and saffron["scaleff"] is None
    assert summarize([result("none", 1, 1.0)], 100.0)[0]["scaleff"] == pytest.approx(math.log(100))


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path, judge):
    """Killed at some byte, or searched in batches, it ends with the results of an uninterrupted run. A
    harmless prompt is reported apart."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tell me {i}", "response": "Sure, here it is"}) + "\n"
                            for i in "abc")
                    + '{"prompt": "Name a colour", "category": "harmless"}\n')
    options = ["--data", data, "--safety", "none,saffron", "--width", 2, "--max_new_tokens", 4,
               "--min_new_tokens", 2, "--judge", judge]
    read = lambda name: [{k: pytest.approx(v, abs=1e-3) if isinstance(v, float) else v
                          for k, v in r.items() if k != "seconds"}
                         for r in read_results(tmp_path / name)]
    for name, cut, batch in (("one", 0, 1), ("two", 0.66, 1), ("three", 0.25, 3)):
        (tmp_path / name).mkdir()
        if cut:
            whole = (tmp_path / "one" / "results.jsonl").read_bytes()
            (tmp_path / name / "results.jsonl").write_bytes(whole[:int(len(whole) * cut)])
        status, out, error = run_script("eval.py", *options, "--out", tmp_path / name, "--batch", batch)
        assert status == 0 and out == (tmp_path / name / "table.md").read_text(), error
        assert "ASR" in error and read(name) == read("one") and len(read(name)) == 8
    none, saffron = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert ((none["safety"], none["width"], none["prompts"], none["harmless_prompts"], none["same"])
            == ("none", 1, 3, 1, 1.0))
    mine = [r for r in read_results(tmp_path / "one") if r["safety"] == "saffron" and "category" not in r]
    for key in set(HARMFUL) - {"empty"}:
        assert saffron[key] == pytest.approx(sum(r[key] for r in mine) / 3)
        assert saffron[f"{key}_ci"][0] <= saffron[key] <= saffron[f"{key}_ci"][1]
    assert (out.count("\n"), out.count("| saffron | 2 |")) == (4, 1)
    status, _, error = run_script("eval.py", *options, "--out", tmp_path / "one", "--seed", 1)
    assert status == 2 and error.count("\n") == 1 and "seed" in error


@pytest.mark.slow
def test_a_run_is_told_by_content_not_by_path(tmp_path, judge, smollm2_folder):
    """The same policy elsewhere goes on. With other weights, another chat format, a row whose category
    changed, or in bfloat16 another batch, it does not."""
    def folder(name, seed):
        config = json.loads((SMOLLM2 / "config.json").read_text()) | {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 8}
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        model = Llama(read_config(tmp_path / name))
        weights = {key: torch.randn_like(p) for key, p in model.named_parameters()}
        save_file(weights, tmp_path / name / "model.safetensors")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SMOLLM2 / file, tmp_path / name)
        return tmp_path / name

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Lock?", "response": "Sure, here it is", "category": "theft"}\n')

    def end_of(policy, *more, out="out"):
        return run_script("eval.py", "--data", data, "--safety", "none", "--max_new_tokens", 2, "--judge",
                          judge, "--min_new_tokens", 1, "--policy", policy, "--out", tmp_path / out, *more)
    assert end_of(folder("one", 0))[0] == 0 == end_of(folder("two", 0))[0]
    status, _, error = end_of(folder("two", 1))
    assert status == 2 and "with policy = " in error
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    status, _, error = end_of(tmp_path / "one")
    assert status == 2 and "with policy = " in error
    (tmp_path / "one" / "chat_template.jinja").unlink()
    data.write_text('{"prompt": "Lock?", "response": "Sure, here it is", "category": "harmless"}\n')
    status, _, error = end_of(tmp_path / "one")
    assert status == 2 and "another prompt" in error
    assert end_of(tmp_path / "one", "--dtype", "bfloat16", out="low")[0] == 0
    status, _, error = end_of(tmp_path / "one", "--dtype", "bfloat16", "--batch", 2, out="low")
    assert status == 2 and "with batch = 1" in error


@pytest.mark.slow
def test_runs_of_several_seeds_become_one_table(tmp_path, judge):
    """results/merge.py takes the mean over all replies, here three to each of two requests, and takes no seed
    twice."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Tell me {i}", "response": "Sure, here it is"}) + "\n"
                            for i in "ab"))
    for seed in (0, 1, 2):
        status, _, error = run_script("eval.py", "--data", data, "--safety", "best_of_n", "--width", 2,
                                      "--max_new_tokens", 3, "--seed", seed, "--min_new_tokens", 2,
                                      "--judge", judge, "--out", tmp_path / str(seed))
        assert status == 0, error
    folders = [tmp_path / str(seed) for seed in (0, 1, 2)]
    status, out, error = run_script("results/merge.py", *folders, "--out", tmp_path / "merged.json")
    merged = json.loads((tmp_path / "merged.json").read_text())
    (row,), replies = merged["rows"], [r for folder in folders for r in read_results(folder)]
    assert (status, error, row["prompts"], merged["arguments"]["seed"]) == (0, "", 6, ["0", "1", "2"])
    assert row["requests"] == 2 and "| best_of_n | 2 | 2 " in out
    assert row["guard_reward"] == pytest.approx(sum(r["guard_reward"] for r in replies) / 6)
    (tmp_path / "merged.json").unlink()
    status, _, error = run_script("results/merge.py", *folders, folders[0], "--out", tmp_path / "merged.json")
    assert (status == 2 and error.count("\n") == 1 and "seed" in error
            and not (tmp_path / "merged.json").exists())


def test_runs_of_several_mrms_become_one_table(tmp_path):
    """A row of saffron is over the MRMs, one of rebase over the seeds: no reply counts twice."""
    folders = []
    for seed, mrm, saffron, rebase in ((0, "a", True, True), (0, "b", False, True), (1, "a", True, False),
                                       (0, "c", False, True)):
        folders.append(tmp_path / f"{seed}{mrm}")
        folders[-1].mkdir()
        (folders[-1] / "arguments.json").write_text(
            json.dumps({"seed": str(seed), "mrm": mrm, "policy": "p", "mrm_base": "p"}))
        reply = {key: 1.0 for key in HARMFUL} | {"width": 4, "row": 0, "prompt": "x", "text": "y"}
        (folders[-1] / "results.jsonl").write_text("".join(
            json.dumps(reply | {"safety": safety, "asr": asr, "judge_asr": asr}) + "\n"
            for safety, asr in (("saffron", saffron), ("rebase", rebase))))
    status, _, error = run_script("results/merge.py", *folders, "--out", tmp_path / "merged.json")
    assert status == 0, error
    rows = {row["safety"]: row for row in json.loads((tmp_path / "merged.json").read_text())["rows"]}
    assert rows["saffron"]["prompts"] == 3 and rows["saffron"]["asr"] == pytest.approx(1 / 3)
    assert rows["rebase"]["prompts"] == 2 and rows["rebase"]["asr"] == 0.5


@pytest.mark.slow
def test_a_killed_run_loses_nothing(tmp_path, judge):
    """Killed by the system three times on its way, and started again, it has each reply once."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"Tell me {i}", "response": "Sure"}) + "\n"
                            for i in range(8)))
    command = [sys.executable, "eval.py", "--data", data, "--safety", "none", "--max_new_tokens", "8",
               "--out", out, "--judge", judge]
    for replies in (1, 4, 6):
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not (out / "results.jsonl").exists()
                                          or (out / "results.jsonl").read_bytes().count(b"\n") < replies):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_script(*command[1:])[0] == 0
    assert [r["row"] for r in read_results(out)] == list(range(8))


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tmp_path, judge):
    """Prompts of two files, shared by torchrun;
    and what one of the two had written when both were killed is kept."""
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"prompt": f"Tell me {i}", "response": "Sure"}) + "\n" for i in "abc"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "Name a colour", "category": "harmless"}\n')
    options = ["--data", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--safety", "none,best_of_n",
               "--width", 2, "--batch", 2, "--max_new_tokens", 4, "--min_new_tokens", 2, "--judge", judge]
    assert run_script("eval.py", *options, "--out", tmp_path / "one")[0] == 0
    one = read_results(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "results-1.jsonl").write_text(
        json.dumps(one[1] | {"text": "from before"}) + "\n" + '{"row": 3, "sa')
    status, out, error = in_two_processes("eval.py", *options, "--out", tmp_path / "two")
    assert status == 0 and out == (tmp_path / "two" / "table.md").read_text(), error
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "arguments.json", "results.jsonl", "summary.json", "table.md"}
    two = read_results(tmp_path / "two")
    assert [(r["safety"], r["row"]) for r in two] == [(m, i) for m in ("none", "best_of_n") for i in range(4)]
    assert two[1]["text"] == "from before"
    for a, b in zip(one, two):
        if b["text"] != "from before":
            assert a["text"] == b["text"] and a["guard_reward"] == pytest.approx(b["guard_reward"], abs=1e-3)


@pytest.mark.slow
def test_one_run_at_a_time(tmp_path, judge):
    """A second run with the same --out is refused, and the first loses nothing;
    under torchrun, one of them holds it."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"Tell me {i}", "response": "Sure"}) + "\n"
                            for i in range(6)))
    options = ["--data", data, "--safety", "none", "--max_new_tokens", "8", "--out", out, "--judge", judge]
    process = subprocess.Popen([sys.executable, "eval.py", *map(str, options)], cwd=ROOT,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "results.jsonl").exists():
        time.sleep(0.01)
    status, _, error = run_script("eval.py", *options, "--safety", "none,best_of_n")
    assert status == 2 and error.count("\n") == 1 and "another run is at work" in error
    assert process.wait() == 0 and [r["row"] for r in read_results(out)] == list(range(6))
    assert run_script("eval.py", *options)[0] == 0                              # and it was given back


def test_arguments_without_results_count_for_nothing(tmp_path, judge):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "Tell me", "response": "Sure", "id": 7, "text": "mine", "row": 9}\n')
    options = ["--data", data, "--safety", "none", "--min_new_tokens", "1", "--out", out, "--judge", judge]
    status, _, error = run_script("eval.py", *options, "--max_new_tokens", "0")
    assert status == 2 and error.count("\n") == 1 and not out.exists()
    out.mkdir()
    (out / "arguments.json").write_text('{"seed": "5"}')
    assert run_script("eval.py", *options, "--max_new_tokens", "3")[0] == 0
    result, = read_results(out)
    # the data's other keys are kept
    assert (result["id"], result["row"]) == (7, 0) and result["text"] != "mine"
    assert run_script("eval.py", *options, "--max_new_tokens", "3")[0] == 0
    status, _, error = run_script("eval.py", *options, "--max_new_tokens", "4")
    assert status == 2 and "max_new_tokens" in error


@pytest.mark.parametrize("line, said", [
    ("garbage", "line 2"), ('{"row": 0, "safety": "magic", "width": 1, "text": "", "asr": true}', "magic"),
    ('{"row": 1, "safety": "none", "width": 1, "text": "", "asr": NaN}', "asr")])
def test_a_line_that_is_no_result_is_named_and_nothing_is_deleted(tmp_path, judge, line, said):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "Tell me", "response": "Sure"}\n')
    options = ["--data", data, "--safety", "none", "--max_new_tokens", "3", "--min_new_tokens", "1",
               "--out", out, "--judge", judge]
    assert run_script("eval.py", *options)[0] == 0
    before = (out / "results.jsonl").read_bytes() + line.encode() + b"\n"
    (out / "results.jsonl").write_bytes(before)
    status, _, error = run_script("eval.py", *options)
    assert status == 2 and error.count("\n") == 1 and "line 2" in error and said in error
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("args, said", [
    (["--safety", "magic"], "magic"), (["--width", "0"], "--width 0"), (["--limit", "0"], "--limit"),
    (["--data", "no/file"], "no/file"), (["--safety", "beam:1/x"], "beam:1/x"),
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


def test_a_prompt_that_is_too_long_is_named_before_anything_runs(tmp_path, judge):
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "a", "response": "b"}\n' + json.dumps({"prompt": "a " * 9000, "response": "b"}))
    status, _, error = run_script("eval.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out",
                                  "--judge", judge)
    assert status == 2 and error.count("\n") == 1 and "data.jsonl, line 2: the prompt takes" in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("attack, row", [
    ("prefill", {"prompt": "a"}), ("suffix", {"prompt": "a", "response": "b"})])
def test_an_attack_needs_its_field(tmp_path, attack, row):
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    status, _, error = run_script("eval.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out",
                                  "--attack", attack)
    assert (status == 2 and error.count("\n") == 1 and f"--attack {attack} needs" in error
            and "line 1" in error)


def test_plots(tmp_path):
    """ASR against compute, and (bench.py) seconds against width and length, are PNG files."""
    pytest.importorskip("matplotlib")
    from results import draw
    line = {"safety": "saffron", "width": 4, "tflop": 0.1, "asr": 0.2, "judge_asr": 0.4, "guard_reward": 1.0,
            "judge_reward": 2.0}
    draw.attack_success(tmp_path / "asr.png",
                        [line, line | {"width": 16, "tflop": 0.4, "asr": 0.1}, line | {"safety": "none"}])
    row = {"width": 4, "new": 32, "seconds": 1.0, "copies": 2.0}
    draw.seconds_a_step(tmp_path / "speed.png", [row, row | {"width": 16}, row | {"new": 64}], 4, 32)
    for path in tmp_path.iterdir():
        assert path.suffix == ".png" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_paired_differences_are_over_requests(tmp_path):
    """Two folders of a search against one of another: of three requests, two are on both sides."""
    def write(name, safety, replies):
        (tmp_path / name).mkdir()
        rows = [{"safety": safety, "width": 4, "row": i, "prompt": prompt, "text": "", "asr": asr,
                 "judge_asr": False, "category": None} for i, (prompt, asr) in enumerate(replies)]
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("a", "rebase", [("p", True), ("q", True), ("r", False)])
    write("b", "rebase", [("p", False), ("q", True)])
    write("c", "saffron", [("q", False), ("p", False)])
    status, out, err = run_script("results/paired.py", f"{tmp_path}/a,{tmp_path}/b:rebase:4",
                                  f"{tmp_path}/c:saffron:4")
    assert status == 0, err
    guard, judge = (line.split(" | ") for line in out.splitlines()[2:4])
    assert guard[1:5] == ["2", "0.750", "0.000", "+0.750 [+0.500, +1.000] |"]
    assert judge[4] == "+0.000 [-1.000, +1.000] |"                      # none differs: the rule of three
    # By both classifiers, with a varied reply: of four successes by both, three are varied.
    for name, shares in (("d", (0.5, 0.9)), ("e", (0.6, 0.4))):
        (tmp_path / name).mkdir()
        rows = [{"safety": "none", "width": 1, "row": i, "prompt": f"p{i}", "text": "", "asr": True,
                 "judge_asr": True, "distinct": share, "category": None} for i, share in enumerate(shares)]
        rows.append(rows[0] | {"row": 2, "prompt": "p2", "asr": False, "category": "harmless"})
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run_script("results/paired.py", f"{tmp_path}/d:none:1", f"{tmp_path}/e:none:1")
    lines = {line.split(" | ")[0]: line.split(" | ")[1:4] for line in out.splitlines()}
    assert lines["| ASR, both, a varied reply"] == ["2", "1.000", "0.500"], err
    assert lines["| flagged, guard"] == ["1", "0.000", "0.000"]
    assert lines["| flagged, judge"] == ["1", "1.000", "1.000"]
    status, _, err = run_script("results/paired.py", f"{tmp_path}/a:saffron:4", f"{tmp_path}/c:saffron:4")
    assert status == 2 and "found no replies" in err
