"""saffron walks through the frontiers of the paper's own code,
and the one page through those of the search."""

import copy
import math
import random
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, paper, run_script

import saffron as one_page
from search import Branch
from plumbing.errors import BadInput
from model import Llama, LlamaConfig
from mrm import MRM
from search import best, candidates, nucleus, saffron
from baselines import no_defence
from plumbing.tokenizer import Prompt, Template
from trie_cache import TrieCache


@pytest.mark.exercise(7, points=5)
@pytest.mark.parametrize("case", range(14))
def test_saffron_walks_through_the_golden_frontiers(tiny_policy, tiny_mrm, golden_search, case):
    """Frontiers after every step, as far as the order of the authors' code is specified, and the reply."""
    case = golden_search["cases"][case]
    options = {key: case[key] for key in ("width", "top_p", "min_new_tokens", "max_new_tokens")}
    result = saffron(tiny_policy, tiny_mrm, Prompt(case["prompt"]), paper(**options))
    for t in range(1, case["compare_steps"] + 1):
        ours, theirs = [b.tokens for b in result.trace[t - 1]], case["frontiers"][t]
        wrong, missing = [s for s in ours if s not in theirs], [s for s in theirs if s not in ours]
        assert sorted(ours) == sorted(theirs), (
            f"the frontier after step {t} has {len(ours)} sequences (the golden one {len(theirs)}); "
            f"not in that are {wrong}, missing are {missing}, where token 7 is the end")
    if case["output"] is not None:
        assert (result.finished, result.tokens) == (True, case["output"])


def plain_saffron_step(policy, mrm, prompt, frontier, width, top_p, forbid_eos, beta):
    """One step of the search with no cache and no shortcut: the whole vocabulary is sorted,
    each sequence is read by itself."""
    eos, pool = policy.config.eos_token_ids[0], []
    for i, (tokens, _, log_prob) in enumerate(frontier):
        last = lambda llama, s: llama(torch.tensor([s]))[0, -1]
        logits = policy.logits(last(policy, prompt.policy_tokens(policy.template) + tokens))
        rewards = mrm.next_rewards(last(mrm.llama, prompt.reward_tokens(mrm.template) + tokens))
        if forbid_eos:
            logits[eos] = -math.inf
        ranked, mass = sorted(enumerate(logits.softmax(-1).tolist()), key=lambda x: -x[1]), 0.0
        allowed = [x for x in ranked if not mrm.unseen[x[0]]]
        kept = []
        for token, p in ranked:
            if mass < top_p and not mrm.unseen[token]:
                kept.append((token, p))
            mass += p
        for token, p in kept or allowed[:1]:
            total = log_prob + math.log(p)
            pool.append((-rewards[token].item() - beta * total, i, -p, tokens + [token],
                         rewards[token].item(), total))
    if beta:                                    # no four tokens in a row twice, unless nothing else is left
        grams = lambda tokens: [tuple(tokens[i:i + 4]) for i in range(len(tokens) - 3)]
        pool = [x for x in pool if len(set(grams(x[3]))) == len(grams(x[3]))] or pool
    return [(tokens, reward, total) for *_, tokens, reward, total in sorted(pool)[:width]]


@pytest.mark.parametrize("prompt", [Prompt([1, 2, 3]), Prompt([400], [30, 31]), Prompt([9, 8], [7, 6], True)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_saffron_equals_a_plain_search(tiny_policy, tiny_mrm, prompt, beta):
    """Without cache, with prefills shown and hidden, over steps in which nothing can finish."""
    result = saffron(tiny_policy, tiny_mrm, prompt,
                     paper(width=3, max_new_tokens=5, min_new_tokens=5, top_p=0.6, beta=beta))
    frontier = [([], None, 0.0)]
    for got in result.trace:
        frontier = plain_saffron_step(tiny_policy, tiny_mrm, prompt, frontier, 3, 0.6, True, beta)
        assert [b.tokens for b in got] == [tokens for tokens, *_ in frontier]
        assert [b.reward for b in got] == pytest.approx([reward for _, reward, _ in frontier], abs=1e-9)
        assert [b.log_prob for b in got] == pytest.approx([total for *_, total in frontier], abs=1e-9)


def plain_log_prob(policy, prompt, tokens):
    """log π of a reply that may not end yet, by the policy without cache and at temperature 1."""
    logits = policy.logits(policy(torch.tensor([prompt.policy_tokens(policy.template) + tokens]))[0])
    logits[:, list(policy.config.eos_token_ids)] = -math.inf
    log_p = logits[-len(tokens) - 1:-1].log_softmax(-1)
    return sum(log_p[i, token].item() for i, token in enumerate(tokens))


@pytest.mark.exercise(7, points=2, bonus=True)
def test_beta_ranks_by_the_probability_of_the_whole_reply_too(tiny_policy, tiny_mrm, tiny_scalar_guard):
    """log π of all its tokens, by the policy without cache; with a large beta it decides alone."""
    prompt, options = Prompt([1, 2, 3]), dict(max_new_tokens=5, min_new_tokens=5, top_p=0.9)
    result = saffron(tiny_policy, tiny_mrm, prompt, paper(width=4, beta=0.5, **options))
    for branch in result.trace[-1]:
        assert branch.log_prob == pytest.approx(plain_log_prob(tiny_policy, prompt, branch.tokens), abs=1e-9)
    for frontier in result.trace:
        scores = [branch.reward + 0.5 * branch.log_prob for branch in frontier]
        assert scores == sorted(scores, reverse=True)
    assert any([b.reward for b in f] != sorted((b.reward for b in f), reverse=True)
               for f in result.trace), "beta changes no order"
    anything = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)                # of which no token is unseen
    likeliest = no_defence(tiny_policy, None, prompt, paper(**options)).tokens
    for reward_model in (anything, tiny_scalar_guard):
        result = saffron(tiny_policy, reward_model, prompt, paper(width=1, beta=1e6, **options))
        assert result.tokens == likeliest, f"with {type(reward_model).__name__}"
    safe, likely = [Branch([i], 1.0 - i, True, log_prob=2.0 * i) for i in range(2)]
    assert best([safe, likely], [], 2, 0.9) == [likely, safe] and best([safe, likely], [], 2, 0.1)[0] is safe


@pytest.mark.exercise(7, points=2)
def test_a_branch_tells_its_reward(tiny_policy, tiny_mrm, monkeypatch):
    """M(s)_a, against all of M(s) without a cache. The search itself computes no other entries."""
    prompt, next_rewards = Prompt([1, 2, 3]), tiny_mrm.next_rewards
    monkeypatch.setattr(tiny_mrm, "next_rewards", lambda hidden: pytest.fail("all of M(s) was computed"))
    monkeypatch.setattr(tiny_mrm, "conservative_rewards",
                        lambda hidden: pytest.fail("all of M(s) was computed"))
    logits = tiny_mrm.llama.logits
    monkeypatch.setattr(tiny_mrm.llama, "logits", lambda hidden: pytest.fail("all of M(s) was computed"))
    child_rewards, calls = tiny_mrm.child_rewards, []
    monkeypatch.setattr(tiny_mrm, "child_rewards",
                        lambda *given: calls.append(given) or child_rewards(*given))
    result = saffron(tiny_policy, tiny_mrm, prompt, paper(width=3, max_new_tokens=4, min_new_tokens=4))
    assert len(calls) == len(result.trace) == 4, "child_rewards gives M of all candidates of a step"
    monkeypatch.setattr(tiny_mrm.llama, "logits", logits)
    for branch in [branch for frontier in result.trace for branch in frontier]:
        *before, last = branch.tokens
        rewards = next_rewards(
            tiny_mrm.llama(torch.tensor([prompt.reward_tokens(tiny_mrm.template) + before]))[0, -1])
        assert branch.reward == pytest.approx(rewards[last].item(), abs=1e-9), (
            "the reward of a branch is M(s)_a")
    assert result.reward == result.trace[-1][0].reward


@pytest.mark.exercise(7, points=1, bonus=True)
def test_a_branch_tells_reward_and_probability_apart(tiny_policy, tiny_mrm):
    """With beta, its reward is M(s)_a alone; its log π(s·a) is at temperature 1, whatever the temperature of
    the nucleus."""
    prompt = Prompt([1, 2, 3])
    result = saffron(tiny_policy, tiny_mrm, prompt,
                     paper(width=3, max_new_tokens=4, min_new_tokens=4, beta=0.5, temperature=0.5))
    for branch in result.trace[-1]:
        *before, last = branch.tokens
        rewards = tiny_mrm.next_rewards(
            tiny_mrm.llama(torch.tensor([prompt.reward_tokens(tiny_mrm.template) + before]))[0, -1])
        assert branch.reward == pytest.approx(rewards[last].item(), abs=1e-9), "it is M(s)_a, without beta"
        expected = plain_log_prob(tiny_policy, prompt, branch.tokens)
        assert branch.log_prob == pytest.approx(expected, abs=1e-9), (
            "log π is that of the policy, at temperature 1")


@pytest.mark.exercise(7, points=2)
def test_equal_rewards_stand_in_frontier_order_then_the_policys(tiny_policy, tiny_mrm):
    """With an MRM to which all is the same, width 5 keeps the policy's five favourites, then those of the
    first of them. At temperature 0 a sequence has one candidate."""
    same = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    same.gain.data.zero_()
    prompt = Prompt([4, 5])
    first, second = saffron(tiny_policy, same, prompt, paper(width=5, max_new_tokens=2, top_p=0.99)).trace

    def favourites(reply):
        hidden = tiny_policy(torch.tensor([prompt.policy_tokens(tiny_policy.template) + reply]))[0, -1]
        # 7 is the end.
        return tiny_policy.logits(hidden).index_fill(0, torch.tensor([7]), -math.inf).topk(5).indices.tolist()
    assert [b.tokens for b in first] == [[token] for token in favourites([])]
    assert [b.tokens for b in second] == [first[0].tokens + [token] for token in favourites(first[0].tokens)]
    cold = saffron(tiny_policy, same, prompt, paper(width=5, max_new_tokens=2, top_p=0.99, temperature=0.0))
    assert [[b.tokens for b in frontier] for frontier in cold.trace] == [
        [first[0].tokens], [second[0].tokens]]


@pytest.mark.exercise(7, points=2)
def test_policy_and_mrm_are_asked_together(tiny_policy, tiny_mrm):
    """One `yield` a step, so that both can be read in one forward pass;
    each of them once for each unfinished sequence."""
    rounds, options = [], paper(width=3, max_new_tokens=6, min_new_tokens=6)
    result = saffron(tiny_policy, tiny_mrm, Prompt([1, 2, 3]), options, watch=rounds.append)
    assert len(rounds) == len(result.trace) == 6
    assert result.stats.policy_calls == result.stats.reward_calls == 1 + 5 * 3


@pytest.mark.exercise(7, points=2, bonus=True)
def test_with_beta_saffron_does_not_run_in_circles(tiny_policy, tiny_mrm):
    """Of a few tokens that each reply must use again and again, no four in a row come twice;
    without beta they do."""
    few = copy.deepcopy(tiny_mrm)
    few.unseen[:] = True
    few.unseen[[7, *range(20, 40)]] = False
    grams = lambda tokens: [tuple(tokens[i:i + 4]) for i in range(len(tokens) - 3)]
    for beta, looping in ((0.0, True), (0.05, False)):
        result = saffron(tiny_policy, few, Prompt([1, 2, 3]),
                         paper(width=2, max_new_tokens=40, min_new_tokens=40, top_p=1.0, beta=beta))
        twice = {gram for branch in result.trace[-1] for gram, n in Counter(grams(branch.tokens)).items()
                 if n > 1}
        assert bool(twice) == looping, f"with beta {beta}, these come twice: {sorted(twice)}"


@pytest.mark.exercise(7, points=1, bonus=True)
def test_what_repeats_itself_fills_no_place():
    """With beta > 0 the next frontier may be narrower than the width:
    only if all children repeat themselves, they stay."""
    child = lambda tokens, reward: Branch(tokens, reward, parent=Branch(tokens[:-1]), log_prob=0.0)
    circle, fresh = child([1, 2, 3, 4, 1, 2, 3, 4], 2.0), child([1, 2, 3, 4, 1, 2, 3, 5], 1.0)
    ended = Branch([1, 2, 3, 7, 1, 2, 3, 7], 3.0, True, log_prob=0.0)
    for children, beta, kept in (([circle, fresh], 0.1, [fresh]), ([circle, fresh], 0.0, [circle, fresh]),
                                 ([circle, circle], 0.1, [circle, circle]), ([circle], 0.1, [circle]),
                                 ([ended, fresh], 0.1, [fresh])):
        assert best([], children, 2, beta) == kept, f"beta {beta}, {len(children)} children"


@pytest.mark.exercise(7, points=1)
@pytest.mark.parametrize("seed", range(50))
def test_a_fallback_takes_no_place_of_a_regular_candidate(seed):
    """On random pools: it is kept only where regular and finished ones leave room, and stands behind them."""
    pick = random.Random(seed)
    width = pick.randint(1, 6)
    child = lambda: Branch([pick.randrange(500) for _ in range(3)], pick.gauss(0, 2), pick.random() < 0.3,
                           None, 0.0, pick.random() < 0.4)
    children = [child() for _ in range(pick.randint(1, 10))]
    done = [Branch([i], pick.gauss(0, 2), finished=True, log_prob=0.0) for i in range(pick.randint(0, width))]
    frontier = best(done, children, width, 0.0)
    regular = [b for b in children if not b.fallback]
    kept = [b for b in frontier if b.fallback]
    assert len(kept) <= max(0, width - len(done) - len(regular)), (
        "a fallback stands where a regular candidate could")
    assert len(frontier) == min(width, len(done) + len(children))
    for group in ([b for b in frontier if b.finished], [b for b in frontier if not b.finished]):
        assert [b.fallback for b in group] == sorted(b.fallback for b in group)
    assert sorted(b.reward for b in kept) == sorted(
        sorted((b.reward for b in children if b.fallback), reverse=True)[:len(kept)][::-1])


@pytest.mark.exercise(7, points=2)
def test_the_search_tells_its_fallbacks(tiny_policy, tiny_mrm):
    """With few seen tokens and a small nucleus, some sequences have a fallback, others regular candidates. A
    branch says which its own last token is, and no fallback takes the place of a regular one, whatever its
    M."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.unseen[:] = torch.arange(512) % 3 > 0
    mrm.unseen[7] = False
    prompt, counts = Prompt([1, 2]), Counter()
    result = saffron(tiny_policy, mrm, prompt, paper(width=4, max_new_tokens=8, min_new_tokens=8, top_p=0.4))
    before = [Branch()]
    for frontier in result.trace:
        regular = 0
        for branch in before:                               # none is finished: 8 tokens are the fewest
            context = prompt.policy_tokens(tiny_policy.template) + branch.tokens
            p = tiny_policy.logits(tiny_policy(torch.tensor([context]))[0, -1]).index_fill(
                0, torch.tensor([7]), -math.inf).softmax(-1)
            inside = [token for token in nucleus(p, 0.4).tolist() if not mrm.unseen[token]]
            regular += len(inside)
            for child in frontier:
                if child.tokens[:-1] == branch.tokens:
                    assert child.fallback == (child.tokens[-1] not in inside)
        kept = sum(branch.fallback for branch in frontier)
        assert len(frontier) - kept == min(4, regular), "fallbacks fill only what regular ones leave free"
        counts.update((len(frontier) > 1, branch.parent.fallback, branch.fallback) for branch in frontier)
        before = frontier
    assert counts[True, False, True] and counts[True, True, False], (
        "this search has fallbacks beside others, and regular candidates that follow a fallback")


@pytest.mark.exercise(7, points=1)
def test_a_fallback_fills_no_place_of_a_finished_one():
    """Of width 3, one sequence has finished and one regular candidate is there: one place is left. Where a
    fallback that ends gets it, it is the last of the finished ones. One that ended in an earlier step is a
    finished one like others, but it stands behind these."""
    done, regular = Branch([1], 0.5, True, log_prob=0.0), Branch([2], 1.0, log_prob=0.0)
    ending = [Branch([3, i], 9.0 - i, True, None, 0.0, True) for i in range(3)]
    assert best([done], [regular, *ending], 3, 0.0) == [done, ending[0], regular]
    assert best([done, done], [regular, *ending], 3, 0.0) == [done, done, regular]
    assert best([done, done, done], [regular, *ending], 3, 0.0) == [done, done, done]
    assert best([], ending, 2, 0.0) == ending[:2]
    earlier = Branch([5], 7.0, True, None, 0.0, True)
    assert best([earlier], [regular, *ending], 2, 0.0) == [earlier, regular], "no place is left"
    new = Branch([6], 0.1, True, log_prob=0.0)
    assert best([earlier], [new], 2, 0.0) == [new, earlier], "fallbacks are the last of the finished"


@pytest.mark.exercise(7, points=1, bonus=True)
def test_when_nothing_new_is_left_saffron_repeats_itself(tiny_policy, tiny_mrm):
    """It never runs dry: with one token to choose from, that is the reply."""
    one = copy.deepcopy(tiny_mrm)
    one.unseen[:] = True
    one.unseen[20] = False
    assert saffron(tiny_policy, one, Prompt([1]),
                   paper(width=2, max_new_tokens=9, min_new_tokens=9, beta=0.05)).tokens == [20] * 9


@pytest.mark.exercise(7, points=1)
def test_saffron_never_selects_an_unseen_token_and_never_runs_dry(tiny_policy, tiny_mrm, tiny_guard):
    """Also with all but three tokens unseen, when hardly any nucleus has a seen one."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.unseen[:] = True
    mrm.unseen[[7, 20, 300]] = False
    result = saffron(tiny_policy, mrm, Prompt([1, 2]),
                     paper(width=4, max_new_tokens=8, min_new_tokens=8, top_p=0.05))
    assert len(result.tokens) == 8 and set(result.tokens) <= {20, 300}
    assert all(set(b.tokens) <= {20, 300} and b.reward > -math.inf
               for frontier in result.trace for b in frontier)


@pytest.mark.exercise(4, points=1)
def test_a_nucleus_ends_when_its_mass_reaches_top_p():
    """The mass before a token must be *below* top_p. These sums are exact."""
    p = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert [nucleus(p, top_p).tolist() for top_p in (0.5, 0.51, 0.75, 0.76)] == [
        [1], [1, 0], [1, 0], [1, 0, 2]]


@pytest.mark.exercise(4, points=2)
def test_candidates_of_an_unseen_nucleus():
    """Of two sequences: the first one's nucleus is unseen at top_p 0.9, the second one's is not."""
    logits = torch.tensor([[5.0, 4.0, 1.0, 2.0], [1.0, 5.0, 6.0, 1.0]])
    unseen = torch.tensor([True, True, False, False])
    of = lambda top_p, temperature: [x.tolist() for x in candidates(logits, unseen, top_p, temperature)]
    assert of(0.9, 1.0) == [[0, 1], [3, 2], [True, False]]                          # the most likely seen one
    assert of(0.9, 0.0) == [[0, 1], [3, 2], [True, False]]                          # also of a greedy policy
    assert of(1.0, 1.0) == [[0, 0, 1, 1], [3, 2, 2, 3], [False] * 4]                # most likely first
    assert of(1.0, 0.0) == [[0, 1], [3, 2], [True, False]]
    with pytest.raises(BadInput, match="has not seen any token"):
        candidates(logits.index_fill(1, torch.tensor([2, 3]), -math.inf), unseen, 0.9, 1.0)


@pytest.mark.exercise(4, points=1)
def test_the_temperature_shapes_the_nucleus():
    """Probabilities are 1 : 2 : 4 : 8 at temperature 1, 1 : 4 : 16 : 64 at 1/2, and nearer to each other at
    2."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=torch.float64) * math.log(2)
    tokens = lambda temperature, top_p: candidates(logits, None, top_p, temperature)[1].tolist()
    assert [tokens(temperature, 0.7) for temperature in (0.5, 1.0, 2.0)] == [[3], [3, 2], [3, 2, 1]]
    assert tokens(0.0, 1.0) == [3]
    unseen = torch.tensor([False, True, False, True])
    rows, found, fallbacks = candidates(logits.repeat(2, 1), unseen, 0.9, 2.0)
    assert (rows.tolist(), found.tolist(), fallbacks.tolist()) == ([0, 0, 1, 1], [2, 0] * 2, [False] * 4)


@pytest.mark.exercise(4, points=2)
@pytest.mark.parametrize("seed", range(20))
def test_a_nucleus_is_the_smallest_set_of_most_likely_tokens(seed):
    """Most likely first, equal ones by id, and no token more than it takes to hold top_p."""
    generator = torch.Generator().manual_seed(seed)
    scale = [0.0, 0.5, 2.0, 6.0][seed % 4]                                          # from uniform to peaked
    p = (torch.randn(5000, generator=generator, dtype=torch.float64) * scale).round(
        decimals=seed % 3).softmax(-1)
    for top_p in (1e-9, 0.3, 0.8, 0.99):
        inside = nucleus(p, top_p)
        outside = torch.ones(5000, dtype=torch.bool).index_fill(0, inside, False)
        assert len(inside.unique()) == len(inside) == 5000 - outside.sum() >= 1
        mass = p[inside].sum()
        assert mass >= top_p - 1e-9 and mass - p[inside[-1]] < top_p + 1e-9
        assert not outside.any() or p[inside].min() >= p[outside].max()
        last = inside[p[inside] == p[inside].min()].max()                   # of tokens as likely as the last,
        assert not (outside & (p == p[last]))[:last].any(), "of equal ones, those with lower ids come first"
        keys = [(-x, i) for x, i in zip(p[inside].tolist(), inside.tolist())]
        assert keys == sorted(keys)


@pytest.mark.parametrize("seed", range(20))
def test_nucleus_equals_sorting_the_whole_vocabulary(seed):
    generator = torch.Generator().manual_seed(seed)
    scale = [0.0, 0.5, 2.0, 6.0][seed % 4]                                          # from uniform to peaked
    logits = (torch.randn(5000, generator=generator) * scale).round(decimals=seed % 3)      # with many ties
    p = logits.softmax(-1)
    for top_p in (1e-9, 0.3, 0.8, 0.99, 1.0):
        values, ids = p.sort(descending=True, stable=True)
        expected = ids[values.cumsum(0) - values < top_p] if top_p < 1 else ids[values > 0]
        assert torch.equal(nucleus(p, top_p), expected) and len(expected) >= 1


@pytest.mark.exercise(4, points=1)
def test_with_top_p_1_a_nucleus_is_all_that_is_possible():
    """All tokens but those of probability 0, also where rounding takes the sum to 1 too early, or never. Of
    the last 500 tokens all are possible, though the likeliest one has the probability 1 in float32."""
    for seed in range(10):
        p = torch.randn(49152, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        p[7] = 0.0
        assert sorted(nucleus(p / p.sum(), 1.0).tolist()) == [token for token in range(49152) if token != 7]
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    logits[7] = 30.0
    p = logits.softmax(-1)
    assert p[7] == 1 and p.min() > 0
    assert nucleus(p, 1.0).tolist() == p.sort(descending=True, stable=True).indices.tolist()
    assert sorted(candidates(logits[None], None, 1.0, 1.0)[1].tolist()) == list(range(500))


@pytest.mark.parametrize("seed", range(8))
def test_a_nucleus_is_that_of_the_paper(seed):
    """Eq. 2: a is inside where the probabilities of all tokens more likely than a sum to less than top_p.
    Where other tokens are just as likely as the last one, Eq. 2 takes all of them."""
    p = torch.randn(600, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(
        2).softmax(-1)
    mass_above = torch.stack([p[p > x].sum() for x in p])
    for top_p in (0.01, 0.3, 0.8, 0.99):
        assert set(nucleus(p, top_p).tolist()) == set((mass_above < top_p).nonzero().flatten().tolist())


@pytest.mark.exercise(7, points=2)
def test_finished_replies_stay_first_and_the_best_wins(tiny_policy, tiny_mrm):
    """With min_new_tokens = 0 and a wide nucleus, many branches end; the frontier keeps them, best first."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.bias.data[7] = 5.0                                                      # end-of-sequence looks safe
    result = saffron(tiny_policy, mrm, Prompt([3, 1, 4]),
                     paper(width=4, max_new_tokens=12, min_new_tokens=2, top_p=1.0))
    ended = 0
    for frontier in result.trace:
        flags = [b.finished for b in frontier]
        assert flags == sorted(flags, reverse=True) and sum(flags) >= ended
        ended = sum(flags)
        for group in ([b.reward for b in frontier if b.finished],
                      [b.reward for b in frontier if not b.finished]):
            assert group == sorted(group, reverse=True)
    assert result.finished and ended == 4 and len(result.trace) < 12            # all ended: the search stops
    assert result.reward == max(b.reward for b in result.trace[-1] if b.finished) and result.tokens[-1] == 7
    # With two tokens to choose from, of which the end looks unsafe: it is taken where it has to be, and stays
    # first, and is the reply.
    mrm.unseen[:] = True
    mrm.unseen[[7, 20]] = False
    mrm.bias.data[7] = -50.0
    result = saffron(tiny_policy, mrm, Prompt([3, 1, 4]),
                     paper(width=2, max_new_tokens=3, min_new_tokens=2, top_p=1.0))
    assert result.finished and result.tokens == [20, 20, 7] and result.reward < result.trace[-1][1].reward


@pytest.mark.exercise(7, points=1)
def test_finished_sequences_are_not_asked_about_and_stand_before_others_that_are_equal(tiny_policy, tiny_mrm):
    """Who asks about them does work in vain. And a sequence that ends among the best `width` candidates takes
    its place though an earlier one has ended."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.bias.data[7] = 5.0                                                      # end-of-sequence looks safe
    result = saffron(tiny_policy, mrm, Prompt([3, 1, 4]),
                     paper(width=4, max_new_tokens=12, min_new_tokens=2, top_p=1.0))
    asked = 1 + sum(not branch.finished for frontier in result.trace[:-1] for branch in frontier)
    assert result.stats.policy_calls == result.stats.reward_calls == asked
    old, new = [Branch([i], 0.0, True, log_prob=0.0) for i in range(2)]
    assert best([old], [new], 2, 0.0) == [old, new], "the finished ones of F come first"
    growing, ending = Branch([2], 2.0, log_prob=0.0), Branch([3], 1.0, True, log_prob=0.0)
    assert best([old], [growing, ending], 2, 0.0) == [ending, old], "both are among the best 2 of C"


# ------------------------------------------------------------------------------------------------------------
# saffron.py, the search on one page

def frontiers_of(result):
    return [[(b.tokens, b.finished) for b in frontier] for frontier in result.trace]


def random_models(seed):
    """A policy, and an MRM on weights of its own, of which a fifth of the tokens are unseen; in float64."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
                         eos_token_ids=(3, 4))
    policy, base = Llama(config).double(), Llama(config).double()
    for llama in (policy, base):
        for p in llama.parameters():
            torch.nn.init.normal_(p, std=0.6)
        llama.requires_grad_(False)
    policy.template = Template([1], [2])
    mrm = MRM(base, Template([1, 1], [2, 5]))
    torch.nn.init.normal_(mrm.bias)
    mrm.unseen.copy_(torch.rand(60) < 0.2)
    return policy, mrm.requires_grad_(False)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16])
def test_one_page_finds_the_frontiers_of_the_search(width):
    """Step by step, over many models, prompts and nuclei;
    replies end on the way, and prefills are hidden or not."""
    ended = 0
    for seed in range(25):
        policy, mrm = random_models(seed)
        top_p, least = (0.3, 0.6, 0.8, 1.0, 0.95, 0.02)[seed % 6], seed % 4
        prompt = Prompt([7, 8, 9 + seed], [10] * (seed % 3), bool(seed % 2))
        result = saffron(policy, mrm, prompt,
                         paper(width=width, max_new_tokens=8, min_new_tokens=least, top_p=top_p))
        frontiers = one_page.saffron_frontiers(policy, mrm, prompt, width, 8, least, top_p)
        assert ([[(s.tokens, s.finished) for s in frontier] for frontier in frontiers]
                == frontiers_of(result)), seed
        for frontier, branches in zip(frontiers, result.trace):
            assert [s.reward for s in frontier] == pytest.approx([b.reward for b in branches], abs=1e-9)
        ended += sum(s.finished for s in frontiers[-1])
    assert ended > 1


@pytest.mark.parametrize("seed", range(4))
def test_one_page_takes_every_possible_token_with_top_p_1_and_no_other(seed):
    """Rounding makes the sum of all probabilities reach 1 early, or never: the end of sequence, which is
    forbidden at first, stays out, and the least likely token is in. The same nucleus as that of search.py."""
    torch.manual_seed(seed)
    logits = torch.randn(3000) * 3
    logits[[3, 4, 1000]] = -math.inf
    p = logits.softmax(-1)
    for top_p in (1.0, 0.999999, 0.5):
        plain = one_page.nucleus(p, top_p)
        assert torch.equal(plain, nucleus(p, top_p)) and not {3, 4, 1000} & set(plain.tolist())
    assert len(one_page.nucleus(p, 1.0)) == (p > 0).sum()


def test_one_page_is_the_search_on_the_golden_models(tiny_policy, tiny_mrm, golden_search):
    for case in golden_search["cases"][:6]:
        options = {key: case[key] for key in ("width", "top_p", "min_new_tokens", "max_new_tokens")}
        frontiers = one_page.saffron_frontiers(tiny_policy, tiny_mrm, Prompt(case["prompt"]), **options)
        result = saffron(tiny_policy, tiny_mrm, Prompt(case["prompt"]), paper(**options))
        assert [[(s.tokens, s.finished) for s in frontier] for frontier in frontiers] == frontiers_of(result)


def test_one_page_takes_a_trie_for_its_reader(tiny_policy, tiny_mrm):
    """`trie(sequences)` has the shape of `states`: the same frontiers, and no token is computed twice."""
    tries, prompt = (TrieCache(tiny_policy), TrieCache(tiny_mrm.llama)), Prompt([5, 6, 7], [8])
    with_tries = one_page.saffron_frontiers(tiny_policy, tiny_mrm, prompt, 3, 6, 6, read=tries)
    without = one_page.saffron_frontiers(tiny_policy, tiny_mrm, prompt, 3, 6, 6)
    assert [[s.tokens for s in f] for f in with_tries] == [[s.tokens for s in f] for f in without]
    result = saffron(tiny_policy, tiny_mrm, prompt, paper(width=3, max_new_tokens=6, min_new_tokens=6))
    assert sum(trie.computed for trie in tries) == result.stats.tokens_computed


def test_one_page_on_the_default_weights(smollm2, mrm):
    """In float32, a few steps of the built-in example."""
    prompt = smollm2.tokenizer.prompt(one_page.PROMPT, one_page.PREFILL)
    frontiers = one_page.saffron_frontiers(smollm2, mrm, prompt, 4, 5, 5)
    result = saffron(smollm2, mrm, prompt, paper(width=4, max_new_tokens=5, min_new_tokens=5))
    assert [[(s.tokens, s.finished) for s in frontier] for frontier in frontiers] == frontiers_of(result)


@pytest.mark.slow
def test_one_page_runs_as_a_command(smollm2_folder):
    """`python saffron.py`, without options: both replies, with the guard's reward of each."""
    status, out, error = run_script("saffron.py")
    assert status == 0, error
    rewards = [float(line.split(": ")[1]) for line in out.splitlines()
               if line.startswith("the guard's reward")]
    assert "--- no search" in out and "--- saffron, width 3" in out and rewards[0] < 0 < rewards[1]
    source = (ROOT / "saffron.py").read_text()
    assert len(source.splitlines()) <= 115
    assert not {"trie_cache", "engine", "search"} & set(re.findall(r"^(?:from|import) (\w+)", source, re.M))
