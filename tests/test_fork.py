"""What a fork adds is known everywhere: a search, a policy, a guard, a data set."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import SMOLLM2, paper
from safetensors.torch import save_file

import eval as evaluation
import sample
from plumbing import guards, options
from results import bench
from plumbing.tokenizer import Prompt
from model import Llama
from plumbing.config import read_config
from engine import Ask, search_with
from baselines import SEARCHES, Method, beam, best_of_n, mcts, rebase, sample_replies
from plumbing.options import describe_searches
from search import saffron


def call(monkeypatch, main, *options):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, options)])
    main()


@search_with("guard")
def shortest(policy, guard, options, trace):
    """Of several samples, the shortest that the guard does not call unsafe. And more."""
    yield from sample_replies(policy, options.width, options, trace)
    answer = yield Ask(reward=trace[-1])
    for branch, reward in zip(trace[-1], answer.rewards.tolist()):
        branch.reward = reward
    return min(trace[-1], key=lambda branch: (branch.reward < 0, len(branch.tokens)))


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(SEARCHES, "shortest",
                        Method(shortest, "guard", "of several samples, the shortest safe one"))


def test_a_new_search_is_known_to_sample_and_the_page(added, smollm2_folder, monkeypatch, capsys, tmp_path):
    call(monkeypatch, sample.main, "--safety", "shortest", "--width", 2, "--max_new_tokens", 3,
         "--html", tmp_path / "tree.html")
    assert "--- shortest, width 2" in capsys.readouterr().out
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "tree.html").read_text(), re.S)[1])
    assert [tree["title"] for tree in data["trees"]] == ["none", "shortest, width 2"]
    with pytest.raises(SystemExit):
        call(monkeypatch, sample.main, "--help")
    assert re.search(r"shortest +of several samples, the shortest safe one \(asks the guard\)$",
                     capsys.readouterr().out, re.M)


@pytest.mark.slow
def test_a_new_search_is_known_to_eval_and_bench(added, smollm2_folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "own.jsonl").write_text(
        '{"prompt": "How do I open a lock?", "response": "Sure, first", "mine": 1}\n'
        '{"prompt": "Name a colour", "category": "harmless"}\n')
    call(monkeypatch, evaluation.main, "--data", tmp_path / "own.jsonl", "--safety", "shortest",
         "--width", "2", "--max_new_tokens", 3, "--min_new_tokens", 1, "--out", tmp_path / "out")
    assert "| shortest | 2 | 1 + 1 |" in capsys.readouterr().out
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["safety"], r["prompt"]) for r in results] == [
        ("shortest", "How do I open a lock?"), ("shortest", "Name a colour")]
    call(monkeypatch, bench.main, "--safety", "shortest", "--width", "2")
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("shortest; ") and out[3].split()[:3] == ["2", "38", "32"] and "–" in out[3]


def test_every_search_is_described_in_a_line(added):
    lines = describe_searches().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SEARCHES)
    assert all(len(line.split()) > 2 for line in lines[1:])


def test_a_new_policy_needs_a_folder_only(smollm2_folder, monkeypatch, capsys, tmp_path):
    """Another Llama with the vocabulary of guard and MRM, which stay adapters of their own base."""
    config = json.loads((SMOLLM2 / "config.json").read_text()) | {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "_name_or_path": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Llama(read_config(tmp_path))
    save_file({name: torch.randn_like(p) for name, p in model.named_parameters()},
              tmp_path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMOLLM2 / name, tmp_path / name)
    call(monkeypatch, sample.main, "--policy", tmp_path, "--prompt", "Hello", "--max_new_tokens", 3, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["safety"] == "saffron" and len(answer["tokens"]) == 3 and answer["reward"] is not None


class Counting:
    """A guard that knows nothing but its score: it likes odd tokens. It keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, prompt, replies):
        self.asked += [(prompt, reply) for reply in replies]
        return torch.tensor([sum(1.0 if token % 2 else -1.0 for token in reply) for reply in replies])


@pytest.mark.parametrize("search", [best_of_n, beam, rebase, mcts, saffron])
def test_a_new_guard_is_anything_with_score(tiny_policy, search):
    guard, prompts = Counting(), [Prompt([5, 6, 7], [8]), Prompt([9])]
    results = search(tiny_policy, guards.OwnGuard(guard), prompts,
                     paper(width=3, max_new_tokens=6, min_new_tokens=6))
    for prompt, result in zip(prompts, results):
        asked = [reply for whose, reply in guard.asked if whose is prompt]
        assert result.stats.reward_calls == len(asked) and result.tokens in asked
        assert result.reward == Counting().score(prompt, [result.tokens]).item()
        assert result.reward >= max(b.reward for b in result.trace[-1])


def test_a_new_guard_steers_the_commands(smollm2_folder, monkeypatch, capsys, tmp_path):
    """Where load_guard returns it: in sample.py as guard, in eval.py as guard and as judge."""
    guard = Counting()
    for module in (options, evaluation):
        monkeypatch.setattr(module, "load_guard", lambda path, llama: guard)
    call(monkeypatch, sample.main, "--safety", "beam", "--width", 1, "--prompt", "Hello",
         "--max_new_tokens", 3, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["guard"] == answer["reward"] == guard.score(None, [answer["tokens"]]).item()
    (tmp_path / "own.jsonl").write_text('{"prompt": "How do I open a lock?", "response": "Sure, first"}\n')
    call(monkeypatch, evaluation.main, "--data", tmp_path / "own.jsonl", "--safety", "best_of_n",
         "--width", "2", "--max_new_tokens", 3, "--min_new_tokens", 1, "--out", tmp_path / "out")
    result, = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert (result["guard_reward"] == result["judge_reward"] == result["reward"]
            and result["reward_calls"] == 2)
