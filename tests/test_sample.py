"""The command line: what it prints, what it refuses, and what it does on the default models."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMOLLM2, run_script

from baselines import SEARCHES

QUICK = ["--max_new_tokens", 6, "--min_new_tokens", 3, "--width", 2]


def ask(*args, **more):
    status, out, error = run_script("sample.py", "--json", *QUICK, *args, **more)
    assert status == 0, error
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module", autouse=True)
def weights(smollm2_folder):
    """All of this needs the default weights."""


@pytest.mark.parametrize("method", SEARCHES)
def test_json(method, smollm2, guard):
    answer = ask("--safety", method, "--prompt", "How do magnets work?", "--prefill", "Sure", "--trace")
    assert set(answer) == {"prompt", "prefill", "safety", "text", "tokens", "finished", "reward", "guard",
                           "stats", "frontiers"}
    assert (answer["prompt"], answer["prefill"], answer["safety"]) == ("How do magnets work?", "Sure", method)
    assert 3 <= len(answer["tokens"]) <= 6 and answer["text"] == smollm2.tokenizer.decode(answer["tokens"])
    assert len(answer["frontiers"]) <= 6 and answer["tokens"] in answer["frontiers"][-1]
    assert all(len(reply) <= t + 1 for t, frontier in enumerate(answer["frontiers"]) for reply in frontier)
    assert (answer["reward"] is None) == (method == "none")
    # the guard's reward, without a cache
    encode = smollm2.tokenizer.encode
    context = guard.template(encode("How do magnets work?"), encode("Sure"))
    expected = guard.reward(guard.llama(torch.tensor([context + answer["tokens"]]))[0, -1]).item()
    assert answer["guard"] == pytest.approx(expected, abs=1e-3)
    if method == "best_of_n":
        assert answer["reward"] == pytest.approx(answer["guard"], abs=1e-3)


def test_same_arguments_same_output():
    run = lambda: {k: v for k, v in ask("--safety", "saffron", "--prompt", "Hi").items() if k != "stats"}
    assert run() == run()


def test_hide_prefill_keeps_it_from_guard_and_mrm():
    shown = ask("--safety", "none", "--prompt", "Tell me a story", "--prefill", "Once")
    hidden = ask("--safety", "none", "--prompt", "Tell me a story", "--prefill", "Once", "--hide_prefill")
    assert shown["tokens"] == hidden["tokens"] and shown["guard"] != hidden["guard"]


def test_prompt_from_standard_input():
    assert ask("--safety", "none", "--prompt", "-", stdin="Name a colour.\nOne word.\n")["prompt"] == \
        "Name a colour.\nOne word."


@pytest.mark.slow
def test_prompts_from_a_file(tmp_path):
    """One JSON object a line, each as if its prompt were alone; in plain text, one after another."""
    path = tmp_path / "prompts.txt"
    path.write_text("How do magnets work?\n\nName a colour.\n")
    status, out, error = run_script("sample.py", "--json", *QUICK, "--prompt", f"FILE:{path}")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [a["prompt"] for a in answers] == ["How do magnets work?", "Name a colour."], error
    for answer in answers:
        assert answer["tokens"] == ask("--prompt", answer["prompt"])["tokens"]
    status, out, _ = run_script("sample.py", *QUICK, "--safety", "none", "--prompt", f"FILE:{path}")
    assert status == 0 and out.count("prompt:  ") == out.count("guard's reward") == 2


@pytest.mark.slow
def test_compare_and_plain_text():
    answers = ask("--compare", "--prompt", "Hi")
    assert set(answers) == set(SEARCHES) and all(answers[m]["safety"] == m for m in answers)
    status, out, error = run_script("sample.py", *QUICK, "--trace")
    assert status == 0 and "--- none" in out and "--- saffron" in out       # the built-in example shows both
    assert out.count("guard's reward") == 2 and "surviving branches" in out and "searching" not in out
    assert "searching" in error


def test_half_precision(tmp_path):
    for dtype in ("bfloat16", "float16"):
        answer = ask("--safety", "saffron", "--prompt", "Hi", "--dtype", dtype)
        assert math.isfinite(answer["reward"]) and math.isfinite(answer["guard"])


@pytest.mark.parametrize("args, said", [
    (["--width", 0], "width is 0, but it must be at least 1"),
    (["--width", "four"], "--width: invalid int value"),
    (["--top_p", 0], "(0, 1]"), (["--top_p", "nan"], "(0, 1]"), (["--top_p", 1.5], "(0, 1]"),
    (["--beta", -1], "from 0 to 100"), (["--beta", "nan"], "from 0 to 100"),
    (["--temperature", -1], "temperature"),
    (["--max_new_tokens", 0], "max_new_tokens"),
    (["--prompt", "  "], "prompt is empty"),
    (["--prompt", "word " * 9000], "8192"),
    (["--prompt", "FILE:no/such/file"], "no/such/file: no such file"),
    (["--prompt", "FILE:/dev/null"], "one prompt a line"),
    (["--policy", "no/such/folder"], "no/such/folder: no such folder"),
    (["--policy", "tests/golden/tiny_policy"], "tokenizer.json"),
    (["--mrm_base", "tests/golden/tiny_guard"], "different vocabularies"),
    (["--mrm", "no/such/file"], "no/such/file: no such file"),
    (["--guard", SMOLLM2 / "mrm.safetensors"], "kind mrm"),
    (["--mrm", "tests/golden/tiny_mrm"], "vocabulary 49152"),
    (["--safety", "magic"], "saffron"), (["--device", "abacus"], "cpu"), (["--dtype", "int3"], "float32"),
    (["--no_such_option"], "--no_such_option"), (["--seed", 2 ** 64], "seed"),
])
def test_bad_input_gives_one_line_and_status_2(args, said):
    status, out, error = run_script("sample.py", "--json", "--safety", "saffron", *args)
    lines = [line for line in error.splitlines() if not line.startswith("searching")]
    assert status == 2 and out == "" and len(lines) == 1 and said in lines[0], error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", [
    ["sample.py"], ["results/bench.py"], ["eval.py", "--data", "{data}", "--out", "{tmp}"],
    ["data/safety_rewards/prepare.py", "--labels", "{data}"],
    ["train_mrm.py", "--objective", "guard", "--data", ".", "--out", "{tmp}/g"],
])
def test_without_cuda_every_entry_point_says_so(command, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n')
    args = [arg.format(data=data, tmp=tmp_path) for arg in command]
    status, _, error = run_script(*args, "--device", "cuda", "--dtype", "bfloat16")
    assert status == 2 and error.count("\n") == 1 and "device 'cuda' cannot be used on this machine" in error


def test_undecodable_standard_input():
    done = subprocess.run([sys.executable, "sample.py", "--prompt", "-"], input=b"\xff\xfe",
                          capture_output=True, cwd=ROOT)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


def test_options_are_not_abbreviated():
    """--prefill is not --prefill_tokens; and a prompt that begins with - is told from an option."""
    status, _, error = run_script("eval.py", "--data", "x", "--out", "y", "--prefill", "3")
    assert status == 2 and "unrecognized arguments: --prefill" in error
    status, _, error = run_script("sample.py", "--prompt", "-hello")
    assert status == 2 and "--prompt=-x" in error and error.count("\n") == 1


@pytest.mark.slow
def test_control_c_ends_quietly():
    process = subprocess.Popen([sys.executable, "sample.py", "--max_new_tokens", "500", "--prompt", "Hi"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        assert any("searching" in line for line in process.stderr)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in error
    finally:
        process.kill()


@pytest.mark.slow
def test_saffron_raises_the_guards_reward_of_the_built_in_example():
    """At full length, with the committed adapters."""
    answers = {}
    for method in ("none", "saffron"):
        status, out, error = run_script("sample.py", "--safety", method, "--json")
        assert status == 0, error
        answers[method] = json.loads(out)
    assert answers["none"]["guard"] < 0 < answers["saffron"]["guard"]
    stats = answers["saffron"]["stats"]
    assert stats["peak_kv_bytes"] < stats["unshared_kv_bytes"]
