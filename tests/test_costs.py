"""What a search costs is counted right, and batches and shared weights change nothing but the time."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import paper, reward_model_of, run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
from plumbing.tokenizer import Prompt, Template
from model import Llama
from mrm import MRM, add_lora, trained_tensors
from plumbing.shared import same_base, share_pass
from baselines import SEARCHES, best_of_n
from results import dilemma
from search import saffron
from trie_cache import TrieCache


def test_costs_of_saffron(tiny_policy, tiny_mrm):
    prompt = Prompt([1, 2, 3])
    result = saffron(tiny_policy, tiny_mrm, prompt, paper(width=3, max_new_tokens=6, min_new_tokens=6))
    asked = [[[]]] + [[b.tokens for b in frontier] for frontier in result.trace[:-1]]
    calls = sum(map(len, asked))
    stats = result.stats
    assert stats.policy_calls == stats.reward_calls == calls                # one a sequence, not a candidate
    expected, cached = 0, 0
    for template in (tiny_policy.template, tiny_mrm.template):
        sequences = [template(prompt.user, reply) for replies in asked for reply in replies]
        distinct = {tuple(s[:i + 1]) for s in sequences for i in range(len(s))}
        expected += len(distinct)                   # nothing that was forgotten is ever asked for again
        cached += sum(map(len, sequences)) - len(distinct)
    assert (stats.tokens_computed, stats.tokens_cached) == (expected, cached)
    assert 0 < stats.peak_kv_bytes < stats.unshared_kv_bytes and stats.seconds > 0


def test_kv_memory_grows_with_distinct_prefixes(tiny_policy, tiny_scalar_guard):
    """A long prompt is stored once, whatever the width."""
    peak = lambda width: none_or_best(width).stats
    none_or_best = lambda width: best_of_n(tiny_policy, tiny_scalar_guard, Prompt(list(range(10, 210))),
                                           paper(width=width, max_new_tokens=4, min_new_tokens=4, top_p=1.0))
    one, eight = peak(1), peak(8)
    assert (eight.peak_kv_bytes < 1.3 * one.peak_kv_bytes
            and eight.unshared_kv_bytes > 7.9 * one.unshared_kv_bytes)


def real_cost(method, policy, mrm, guard, width, steps, monkeypatch, seed=0):
    """The Result of a search in which no reply ends, each nucleus is the whole vocabulary but for the end of
    sequence, and to the guard all is the same; the tokens of its context, and those that it reads in all,
    both as (policy, reward model)."""
    tries = []

    def noted_trie(llama):
        tries.append(TrieCache(llama))
        return tries[-1]

    monkeypatch.setattr(engine, "TrieCache", noted_trie)
    indifferent = copy.deepcopy(guard)
    torch.nn.init.zeros_(indifferent.head.weight)
    reward_model = reward_model_of(method, mrm, indifferent)
    prompt = Prompt([1, 2, 3, 4], [5])
    result = SEARCHES[method][0](policy, reward_model, prompt, paper(
        width=width, max_new_tokens=steps, min_new_tokens=steps, top_p=1.0, seed=seed))
    contexts = prompt.policy_tokens(policy.template), prompt.reward_tokens(reward_model.template)
    read = [trie.computed for trie in tries]
    assert len(read) == 2 and sum(read) == result.stats.tokens_computed
    return result, tuple(map(len, contexts)), read


@pytest.mark.exercise(11, points=4)
@pytest.mark.parametrize("method", dilemma.METHODS)
@pytest.mark.parametrize("width, steps", [(1, 1), (1, 5), (4, 1), (4, 2), (3, 6)])
def test_calls_and_tokens_are_as_predicted(method, width, steps, tiny_policy, tiny_mrm, tiny_scalar_guard,
                                           monkeypatch):
    """Exactly those of a real search on tiny models, under the conditions of results/dilemma.py."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)                     # of which no token is unseen
    for seed in range(100):
        result, context, read = real_cost(method, tiny_policy, mrm, tiny_scalar_guard, width, steps,
                                          monkeypatch, seed)
        if method != "best_of_n" or len({b.tokens[0] for b in result.trace[0]}) == width:
            break                                                               # no two begin alike
    cost = dilemma.predicted_cost(method, width, steps, 511, context)
    where = f"of {method}, width {width}, {steps} steps, 511 tokens in a nucleus"
    assert cost.policy_calls == result.stats.policy_calls, f"policy calls {where}"
    assert cost.reward_calls == result.stats.reward_calls, f"reward calls {where}"
    assert [cost.policy_tokens, cost.reward_tokens] == read, f"tokens of policy and reward model {where}"
    if method == "beam":
        fewer = dilemma.predicted_cost(method, width, steps, 73, context)
        assert fewer.reward_calls * 511 == cost.reward_calls * 73, "with 73 tokens in a nucleus"


@pytest.mark.exercise(11, points=2)
@pytest.mark.parametrize("method", ["rebase", "saffron"])
def test_flops_are_as_predicted(method, tiny_policy, tiny_mrm, tiny_scalar_guard, monkeypatch):
    """Two for each weight and token, and the policy's unembedding. Attention, which is left out, is less than
    a tenth of what a real search counts here."""
    small = replace(tiny_policy.config, vocab_size=100, hidden_size=32, intermediate_size=40,
                    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    policy, other = add_lora(tiny_policy, 3, 6, ["q_proj"]), add_lora(Llama(small), 2, 4, ["down_proj"])
    added, of_other = [sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name)
                       for llama in (policy, other)]
    assert added > 0 and of_other > 0 and small.linear_params != policy.config.linear_params
    flops = lambda *numbers: dilemma.predicted_flops(dilemma.Cost(*numbers), policy, other)
    assert flops(1, 0, 0, 0) == 2 * policy.config.hidden_size * policy.config.vocab_size
    assert flops(0, 5, 0, 0) == 0, "the reward model's head is left out"
    assert flops(0, 0, 1, 0) == 2 * (policy.config.linear_params + added)
    assert flops(0, 0, 0, 1) == 2 * (small.linear_params + of_other)
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    result, context, _ = real_cost(method, tiny_policy, mrm, tiny_scalar_guard, 3, 6, monkeypatch)
    reward_llama = mrm.llama if method == "saffron" else tiny_scalar_guard.llama
    predicted = dilemma.predicted_flops(dilemma.predicted_cost(method, 3, 6, 511, context), tiny_policy,
                                        reward_llama)
    assert 0.9 * result.stats.flops < predicted < result.stats.flops


@pytest.mark.parametrize("options, said", [
    (["--context", "60"], "two numbers"), (["--width", "4,x"], "'x' is not a whole number"),
    (["--width", "1,100"], "widths up to --candidates, 84")])
def test_predictions_that_would_not_hold_are_refused(options, said):
    status, out, err = run_script("results/dilemma.py", *options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_table_of_predictions(smollm2_folder):
    """saffron costs about as much as rebase, and beam many times that."""
    status, out, err = run_script("results/dilemma.py", "--width", "4")
    assert status == 0, err
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in out.splitlines()[2:]}
    assert [row[:3] for row in rows.values()] == [["4", "128", "4"], ["4", "125", "10,500"],
                                                  ["4", "125", "128"], ["4", "125", "125"]]
    tflop = {name.strip("| "): float(row[-1].strip("| ")) for name, row in rows.items()}
    assert tflop["saffron"] < 1.2 * tflop["rebase"] < tflop["beam"] / 10


@pytest.mark.parametrize("method", SEARCHES)
def test_flops_agree_with_torchs_own_count(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """Torch counts keys that are masked too; with one branch and few tokens there are few. (It counts
    attention only where that is written as plain products.)"""
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = SEARCHES[method][0](tiny_policy, reward_model, Prompt([1, 2]),
                                     paper(width=1, max_new_tokens=3, top_p=1e-3))
    assert result.stats.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_frontier_is_read_without_walking_its_past(tiny_policy, tiny_mrm, monkeypatch):
    """After the prompt, each step inserts one token a branch, whatever the length."""
    lengths, insert = [], TrieCache.insert
    monkeypatch.setattr(TrieCache, "insert", lambda self, node, tokens: (
        lengths.append(len(tokens)) or insert(self, node, tokens)))
    saffron(tiny_policy, tiny_mrm, Prompt([1] * 50), paper(width=3, max_new_tokens=10, min_new_tokens=10))
    assert all(n > 50 for n in lengths[:2]) and set(lengths[2:]) == {1}


@pytest.mark.parametrize("method", SEARCHES)
def test_prompts_side_by_side_are_searched_as_if_alone(method, tiny_policy, tiny_mrm, tiny_scalar_guard,
                                                       monkeypatch):
    """The same replies, rewards, trees and costs, with prompts of other lengths beside,
    some of which end early."""
    monkeypatch.setattr(tiny_policy.config, "eos_token_ids", tuple(range(0, 512, 4)))       # so that many do
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    prompts = [Prompt([5, 6, 7], [8]), Prompt(list(range(40, 80))), Prompt([9]),
               Prompt([5, 6, 7], [8, 9], True)]
    options = dict(width=8, max_new_tokens=12, min_new_tokens=2, top_p=0.95, temperature=1.0, seed=3)
    together = SEARCHES[method][0](tiny_policy, reward_model, prompts, paper(**options))
    assert len({len(r.tokens) for r in together}) > 1 and len(together) == 4
    for prompt, got in zip(prompts, together):
        alone = SEARCHES[method][0](tiny_policy, reward_model, prompt, paper(**options))
        frontiers = lambda r: [[b.tokens for b in frontier] for frontier in r.trace]
        assert (got.tokens, got.finished, frontiers(got)) == (alone.tokens, alone.finished, frontiers(alone))
        assert got.reward == (None if method == "none" else pytest.approx(alone.reward, abs=1e-9))
        got.stats.seconds = alone.stats.seconds
        assert got.stats == alone.stats


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_one_backbone_for_both_readers_changes_nothing(tiny_policy, beta):
    """An MRM that is LoRA on the policy's own weights, read in the policy's forward pass, against the same on
    a copy of the weights, read in a pass of its own."""
    policy, prompts = tiny_policy, [Prompt([5, 6, 7], [8]), Prompt([9] * 20)]
    mrms = []
    for base in (policy, copy.deepcopy(policy)):
        torch.manual_seed(0)
        mrm = MRM(add_lora(base, 3, 6, ["q_proj", "o_proj", "down_proj"], first_layer=1),
                  Template([1, 2], [3]))
        for name, p in trained_tensors(mrm).items():
            if name != "unseen":
                torch.nn.init.normal_(p, std=0.3)
        mrms.append(share_pass(policy, mrm))
    assert mrms[0].shared_pass and not mrms[1].shared_pass
    assert same_base(policy, mrms[0].llama) and not same_base(policy, mrms[1].llama)
    shared, apart = [saffron(policy, mrm, prompts,
                             paper(width=4, max_new_tokens=10, min_new_tokens=3, beta=beta)) for mrm in mrms]
    for one, two in zip(shared, apart):
        assert one.tokens == two.tokens and one.reward == pytest.approx(two.reward, abs=1e-9)
        assert [[b.tokens for b in f] for f in one.trace] == [[b.tokens for b in f] for f in two.trace]
        one.stats.seconds = two.stats.seconds
        assert one.stats == two.stats
