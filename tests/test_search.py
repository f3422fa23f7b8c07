"""saffron walks through the frontiers of the paper's own code; every search keeps its promises and counts its costs."""

import copy
import math
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import BadInput, Prompt, Template
from mrm import MRM, Guard, add_lora, same_base, trained_tensors
from search import (DEAL_LAMBDA, DEAL_LOOK_AHEAD, MCTS_EXPLORATION, SEARCHES, Branch, Reader, best, best_of_n, candidates,
                    none, nucleus, saffron, shares)
from trie_cache import TrieCache


@pytest.fixture(scope="module")
def tiny_scalar_guard(tiny_guard, golden_search):
    guard = Guard(tiny_guard, Template(golden_search["mrm_prefix"], golden_search["mrm_infix"]))
    torch.manual_seed(0)
    torch.nn.init.normal_(guard.head.weight)
    return guard


def reward_model_of(method, mrm, guard):
    return {None: None, "guard": guard, "mrm": mrm}[SEARCHES[method][1]]


@pytest.mark.exercise(7, points=4)
@pytest.mark.parametrize("case", range(14))
def test_saffron_walks_through_the_golden_frontiers(tiny_policy, tiny_mrm, golden_search, case):
    """Frontiers after every step, as far as the order of the authors' code is specified, and the reply."""
    case = golden_search["cases"][case]
    options = {key: case[key] for key in ("width", "top_p", "min_new_tokens", "max_new_tokens")}
    result = saffron(tiny_policy, tiny_mrm, Prompt(case["prompt"]), **options)
    for t in range(1, case["compare_steps"] + 1):
        ours, theirs = [b.tokens for b in result.trace[t - 1]], case["frontiers"][t]
        wrong, missing = [s for s in ours if s not in theirs], [s for s in theirs if s not in ours]
        assert sorted(ours) == sorted(theirs), (
            f"the frontier after step {t} has {len(ours)} sequences (the golden one {len(theirs)}); not in that are {wrong}, "
            f"missing are {missing}, where token 7 is the end")
    if case["output"] is not None:
        assert (result.finished, result.tokens) == (True, case["output"])


def plain_saffron_step(policy, mrm, prompt, frontier, width, top_p, forbid_eos, beta):
    """One step of the search with no cache and no shortcut: the whole vocabulary is sorted, each sequence is read
    by itself."""
    eos, pool = policy.config.eos_token_ids[0], []
    for i, (tokens, _, log_prob) in enumerate(frontier):
        last = lambda llama, s: llama(torch.tensor([s]))[0, -1]
        logits = policy.logits(last(policy, prompt.policy_tokens(policy.template) + tokens))
        rewards = mrm.rewards(last(mrm.llama, prompt.reward_tokens(mrm.template) + tokens))
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
            pool.append((-rewards[token].item() - beta * total, i, -p, tokens + [token], rewards[token].item(), total))
    if beta:                                            # no four tokens in a row twice, unless nothing else is left
        grams = lambda tokens: [tuple(tokens[i:i + 4]) for i in range(len(tokens) - 3)]
        pool = [x for x in pool if len(set(grams(x[3]))) == len(grams(x[3]))] or pool
    return [(tokens, reward, total) for *_, tokens, reward, total in sorted(pool)[:width]]


@pytest.mark.parametrize("prompt", [Prompt([1, 2, 3]), Prompt([400], [30, 31]), Prompt([9, 8], [7, 6], True)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_saffron_equals_a_plain_search(tiny_policy, tiny_mrm, prompt, beta):
    """Without cache, with prefills shown and hidden, over steps in which nothing can finish."""
    result = saffron(tiny_policy, tiny_mrm, prompt, width=3, max_new_tokens=5, min_new_tokens=5, top_p=0.6, beta=beta)
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


@pytest.mark.exercise(7, points=2)
def test_beta_ranks_by_the_probability_of_the_whole_reply_too(tiny_policy, tiny_mrm):
    """log π of all its tokens, by the policy without cache; with a large beta it decides alone."""
    prompt, options = Prompt([1, 2, 3]), dict(max_new_tokens=5, min_new_tokens=5, top_p=0.9)
    result = saffron(tiny_policy, tiny_mrm, prompt, width=4, beta=0.5, **options)
    for branch in result.trace[-1]:
        assert branch.log_prob == pytest.approx(plain_log_prob(tiny_policy, prompt, branch.tokens), abs=1e-9)
    for frontier in result.trace:
        scores = [branch.reward + 0.5 * branch.log_prob for branch in frontier]
        assert scores == sorted(scores, reverse=True)
    assert any([b.reward for b in f] != sorted((b.reward for b in f), reverse=True) for f in result.trace), "beta changes no order"
    anything = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)                   # of which no token is unseen
    assert saffron(tiny_policy, anything, prompt, width=1, beta=100.0, **options).tokens == none(
        tiny_policy, None, prompt, **options).tokens


@pytest.mark.exercise(7, points=1)
def test_a_branch_tells_the_reward_without_beta(tiny_policy, tiny_mrm):
    """M(s)_a, computed without cache; and log π(s·a) at temperature 1, whatever the temperature of the nucleus."""
    prompt = Prompt([1, 2, 3])
    result = saffron(tiny_policy, tiny_mrm, prompt, width=3, max_new_tokens=4, min_new_tokens=4, beta=0.5, temperature=0.5)
    for branch in result.trace[-1]:
        *before, last = branch.tokens
        rewards = tiny_mrm.rewards(tiny_mrm.llama(torch.tensor([prompt.reward_tokens(tiny_mrm.template) + before]))[0, -1])
        assert branch.reward == pytest.approx(rewards[last].item(), abs=1e-9), "the reward of a branch is M(s)_a"
        expected = plain_log_prob(tiny_policy, prompt, branch.tokens)
        assert branch.log_prob == pytest.approx(expected, abs=1e-9), "log π is that of the policy, at temperature 1"
    assert result.reward == result.trace[-1][0].reward


@pytest.mark.exercise(7, points=1)
def test_equal_rewards_stand_in_frontier_order_then_the_policys(tiny_policy, tiny_mrm):
    """With an MRM to which all is the same, width 5 keeps the policy's five favourites, then those of the first of them."""
    same = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    same.gain.data.zero_()
    prompt = Prompt([4, 5])
    first, second = saffron(tiny_policy, same, prompt, width=5, max_new_tokens=2, top_p=0.99).trace

    def favourites(reply):
        hidden = tiny_policy(torch.tensor([prompt.policy_tokens(tiny_policy.template) + reply]))[0, -1]
        return tiny_policy.logits(hidden).index_fill(0, torch.tensor([7]), -math.inf).topk(5).indices.tolist()     # 7: the end
    assert [b.tokens for b in first] == [[token] for token in favourites([])]
    assert [b.tokens for b in second] == [first[0].tokens + [token] for token in favourites(first[0].tokens)]


@pytest.mark.exercise(7, points=1)
def test_policy_and_mrm_are_asked_together(tiny_policy, tiny_mrm):
    """One `yield` a step, so that both can be read in one forward pass; each of them once for each unfinished sequence."""
    result = saffron(tiny_policy, tiny_mrm, Prompt([1, 2, 3]), width=3, max_new_tokens=6, min_new_tokens=6)
    assert len(result.passes) == len(result.trace) == 6
    assert result.stats.policy_calls == result.stats.reward_calls == 1 + 5 * 3


@pytest.mark.exercise(7, points=2)
def test_with_beta_saffron_does_not_run_in_circles(tiny_policy, tiny_mrm):
    """Of a few tokens that each reply must use again and again, no four in a row come twice; without beta they do."""
    few = copy.deepcopy(tiny_mrm)
    few.unseen[:] = True
    few.unseen[[7, *range(20, 40)]] = False
    grams = lambda tokens: [tuple(tokens[i:i + 4]) for i in range(len(tokens) - 3)]
    for beta, looping in ((0.0, True), (0.05, False)):
        result = saffron(tiny_policy, few, Prompt([1, 2, 3]), width=2, max_new_tokens=40, min_new_tokens=40, top_p=1.0, beta=beta)
        twice = {gram for branch in result.trace[-1] for gram, n in Counter(grams(branch.tokens)).items() if n > 1}
        assert bool(twice) == looping, f"with beta {beta}, these come twice: {sorted(twice)}"


@pytest.mark.exercise(7, points=1)
def test_what_repeats_itself_fills_no_place():
    """With beta > 0 the next frontier may be narrower than the width: only if all children repeat themselves, they stay."""
    child = lambda tokens, reward: Branch(tokens, reward)
    circle, fresh = child([1, 2, 3, 4, 1, 2, 3, 4], 2.0), child([1, 2, 3, 4, 1, 2, 3, 5], 1.0)
    for children, beta, kept in (([circle, fresh], 0.1, [fresh]), ([circle, fresh], 0.0, [circle, fresh]),
                                 ([circle, circle], 0.1, [circle, circle]), ([circle], 0.1, [circle])):
        assert best([], children, 2, beta) == kept, f"beta {beta}, {len(children)} children"


@pytest.mark.exercise(7, points=1)
def test_when_nothing_new_is_left_saffron_repeats_itself(tiny_policy, tiny_mrm):
    """It never runs dry: with one token to choose from, that is the reply."""
    one = copy.deepcopy(tiny_mrm)
    one.unseen[:] = True
    one.unseen[20] = False
    assert saffron(tiny_policy, one, Prompt([1]), width=2, max_new_tokens=9, min_new_tokens=9, beta=0.05).tokens == [20] * 9


@pytest.mark.exercise(7, points=1)
def test_saffron_never_selects_an_unseen_token_and_never_runs_dry(tiny_policy, tiny_mrm, tiny_guard):
    """Also with all but three tokens unseen, when hardly any nucleus has a seen one."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.unseen[:] = True
    mrm.unseen[[7, 20, 300]] = False
    result = saffron(tiny_policy, mrm, Prompt([1, 2]), width=4, max_new_tokens=8, min_new_tokens=8, top_p=0.05)
    assert len(result.tokens) == 8 and set(result.tokens) <= {20, 300}
    assert all(set(b.tokens) <= {20, 300} and b.reward > -math.inf for frontier in result.trace for b in frontier)


@pytest.mark.exercise(4, points=1)
def test_a_nucleus_ends_when_its_mass_reaches_top_p():
    """The mass before a token must be *below* top_p. These sums are exact."""
    p = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert [nucleus(p, top_p).tolist() for top_p in (0.5, 0.51, 0.75, 0.76)] == [[1], [1, 0], [1, 0], [1, 0, 2]]


@pytest.mark.exercise(4, points=2)
def test_candidates_of_an_unseen_nucleus():
    """Of two sequences: the first one's nucleus is unseen at top_p 0.9, the second one's is not."""
    logits = torch.tensor([[5.0, 4.0, 1.0, 2.0], [1.0, 5.0, 6.0, 1.0]])
    unseen = torch.tensor([True, True, False, False])
    of = lambda top_p, temperature: [x.tolist() for x in candidates(logits, unseen, top_p, temperature)]
    assert of(0.9, 1.0) == [[0, 1], [3, 2]]                                         # the most likely seen one
    assert of(0.9, 0.0) == [[0, 1], [3, 2]]                                         # also when the policy is greedy
    assert of(1.0, 1.0) == [[0, 0, 1, 1], [3, 2, 2, 3]]                             # most likely first
    assert of(1.0, 0.0) == [[0, 1], [3, 2]]
    with pytest.raises(BadInput, match="has not seen any token"):
        candidates(logits.index_fill(1, torch.tensor([2, 3]), -math.inf), unseen, 0.9, 1.0)


@pytest.mark.exercise(4, points=2)
@pytest.mark.parametrize("seed", range(20))
def test_a_nucleus_is_the_smallest_set_of_most_likely_tokens(seed):
    """Most likely first, equal ones by id, and no token more than it takes to hold top_p."""
    generator = torch.Generator().manual_seed(seed)
    scale = [0.0, 0.5, 2.0, 6.0][seed % 4]                                          # from uniform to peaked
    p = (torch.randn(5000, generator=generator, dtype=torch.float64) * scale).round(decimals=seed % 3).softmax(-1)
    for top_p in (1e-9, 0.3, 0.8, 0.99):
        inside = nucleus(p, top_p)
        outside = torch.ones(5000, dtype=torch.bool).index_fill(0, inside, False)
        assert len(inside.unique()) == len(inside) == 5000 - outside.sum() >= 1
        mass = p[inside].sum()
        assert mass >= top_p - 1e-9 and mass - p[inside[-1]] < top_p + 1e-9
        assert not outside.any() or p[inside].min() >= p[outside].max()
        last = inside[p[inside] == p[inside].min()].max()                           # of tokens as likely as the last,
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
    """All tokens but those of probability 0, also where rounding takes the sum to 1 too early, or never."""
    for seed in range(30):
        p = torch.randn(49152, generator=torch.Generator().manual_seed(seed)).softmax(-1)
        p[7] = 0.0
        assert sorted(nucleus(p / p.sum(), 1.0).tolist()) == [token for token in range(49152) if token != 7]


@pytest.mark.parametrize("seed", range(8))
def test_a_nucleus_is_that_of_the_paper(seed):
    """Eq. 2: a is inside where the probabilities of all tokens more likely than a sum to less than top_p. Where other
    tokens are just as likely as the last one, Eq. 2 takes all of them."""
    p = torch.randn(600, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).softmax(-1)
    mass_above = torch.stack([p[p > x].sum() for x in p])
    for top_p in (0.01, 0.3, 0.8, 0.99):
        assert set(nucleus(p, top_p).tolist()) == set((mass_above < top_p).nonzero().flatten().tolist())


@pytest.mark.exercise(7, points=2)
def test_finished_replies_stay_first_and_the_best_wins(tiny_policy, tiny_mrm):
    """With min_new_tokens = 0 and a wide nucleus, many branches end; the frontier keeps them, best first."""
    mrm = type(tiny_mrm)(tiny_mrm.llama, tiny_mrm.template)
    mrm.bias.data[7] = 5.0                                                          # end-of-sequence looks safe
    result = saffron(tiny_policy, mrm, Prompt([3, 1, 4]), width=4, max_new_tokens=12, min_new_tokens=2, top_p=1.0)
    ended = 0
    for frontier in result.trace:
        flags = [b.finished for b in frontier]
        assert flags == sorted(flags, reverse=True) and sum(flags) >= ended
        ended = sum(flags)
        for group in ([b.reward for b in frontier if b.finished], [b.reward for b in frontier if not b.finished]):
            assert group == sorted(group, reverse=True)
    assert result.finished and ended == 4 and len(result.trace) < 12                # all ended: the search stops
    assert result.reward == max(b.reward for b in result.trace[-1] if b.finished) and result.tokens[-1] == 7


@pytest.mark.parametrize("method", SEARCHES)
def test_same_seed_same_reply_and_no_early_end(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    run = lambda seed: SEARCHES[method][0](tiny_policy, reward_model, Prompt([5, 6, 7]), width=4, max_new_tokens=20,
                                        min_new_tokens=10, top_p=0.9, temperature=1.0, seed=seed)
    first, again, other = run(1), run(1), run(2)
    assert (first.tokens, first.reward) == (again.tokens, again.reward)
    assert (first.tokens == other.tokens) == (method in ("beam", "deal", "mcts", "saffron", "saffron_guard"))
    assert 7 not in first.tokens[:10] and first.tokens[-1] == 7 or len(first.tokens) == 20
    assert first.tokens in [b.tokens for b in first.trace[-1]] and len(first.trace) <= 20


def test_greedy_takes_the_most_likely_token(tiny_policy):
    result = none(tiny_policy, None, Prompt([5, 6, 7]), max_new_tokens=10, min_new_tokens=0)
    tokens = tiny_policy.template([5, 6, 7])
    for token in result.tokens:
        assert token == tiny_policy.logits(tiny_policy(torch.tensor([tokens]))[0, -1]).argmax().item()
        tokens.append(token)


def test_sampling_follows_the_policy(tiny_policy, tiny_scalar_guard):
    """First tokens of 2,000 samples against the nucleus' probabilities."""
    result = best_of_n(tiny_policy, tiny_scalar_guard, Prompt([1]), width=2000, max_new_tokens=1, top_p=0.5)
    logits = tiny_policy.logits(TrieCache(tiny_policy)([tiny_policy.template([1])]))[0]
    logits[7] = -math.inf                                                           # min_new_tokens
    p = logits.softmax(-1)
    inside = nucleus(p, 0.5)
    p = torch.zeros_like(p).index_copy(0, inside, p[inside]) / p[inside].sum()
    counts = torch.bincount(torch.tensor([b.tokens[0] for b in result.trace[-1]]), minlength=512)
    assert set(counts.nonzero().flatten().tolist()) <= set(inside.tolist())
    assert ((counts - 2000 * p).abs() < 5 * (2000 * p).sqrt() + 1).all()


def test_best_of_n_returns_the_reply_the_guard_likes_best(tiny_policy, tiny_scalar_guard):
    prompt = Prompt([5, 6, 7], [8])
    result = best_of_n(tiny_policy, tiny_scalar_guard, prompt, width=6, max_new_tokens=12, min_new_tokens=3)
    context = prompt.reward_tokens(tiny_scalar_guard.template)
    for branch in result.trace[-1]:                                                 # scored by one uncached pass each
        hidden = tiny_scalar_guard.llama(torch.tensor([context + branch.tokens]))[0, -1]
        assert branch.reward == pytest.approx(tiny_scalar_guard.rewards(hidden).item(), abs=1e-9)
    assert result.reward == max(b.reward for b in result.trace[-1])


def test_costs_of_saffron(tiny_policy, tiny_mrm):
    prompt = Prompt([1, 2, 3])
    result = saffron(tiny_policy, tiny_mrm, prompt, width=3, max_new_tokens=6, min_new_tokens=6)
    asked = [[[]]] + [[b.tokens for b in frontier] for frontier in result.trace[:-1]]
    calls = sum(map(len, asked))
    stats = result.stats
    assert stats.policy_calls == stats.reward_calls == calls                        # one a sequence, not a candidate
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
    none_or_best = lambda width: best_of_n(tiny_policy, tiny_scalar_guard, Prompt(list(range(10, 210))), width=width,
                                           max_new_tokens=4, min_new_tokens=4, top_p=1.0)
    one, eight = peak(1), peak(8)
    assert eight.peak_kv_bytes < 1.3 * one.peak_kv_bytes and eight.unshared_kv_bytes > 7.9 * one.unshared_kv_bytes


@pytest.mark.parametrize("method", SEARCHES)
def test_flops_agree_with_torchs_own_count(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """Torch counts keys that are masked too; with one branch and few tokens there are few. (It counts
    attention only where that is written as plain products.)"""
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = SEARCHES[method][0](tiny_policy, reward_model, Prompt([1, 2]), width=1, max_new_tokens=3, top_p=1e-3)
    assert result.stats.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert result.stats.flops == result.stats.policy_flops + result.stats.reward_flops
    assert (result.stats.reward_flops == 0) == (method == "none") and result.stats.policy_flops > 0


@pytest.mark.parametrize("options, said", [
    ({"width": 0}, "width is 0.*at least 1"), ({"top_p": 0}, r"top_p is 0.*\(0, 1\]"), ({"top_p": 1.1}, "top_p"),
    ({"top_p": math.nan}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"min_new_tokens": -1}, "min_new"),
    ({"temperature": -1}, "temperature"), ({"temperature": 1e-38}, "0, or from 0.01 to 100"), ({"seed": -1}, "seed"),
    ({"max_new_tokens": 510}, "10 tokens.*510.*tiny_policy.*512"),
])
@pytest.mark.parametrize("method", SEARCHES)
def test_bad_values_are_refused(method, options, said, tiny_policy, tiny_mrm, tiny_scalar_guard):
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    with pytest.raises(BadInput, match=said):
        SEARCHES[method][0](tiny_policy, reward_model, Prompt([1, 2, 3, 4, 5]), **options)


@pytest.mark.parametrize("method", SEARCHES)
def test_what_is_not_a_number_is_refused(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """Scores of damaged weights, or of ones too large for their dtype: no search ranks by them."""
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    policy, damaged = copy.deepcopy(tiny_policy), copy.deepcopy(reward_model)
    next(policy.parameters()).data.fill_(math.nan)
    with pytest.raises(BadInput, match="tiny_policy gives scores that are not numbers"):
        SEARCHES[method][0](policy, reward_model, Prompt([1]))
    if reward_model:
        next(damaged.llama.parameters()).data.fill_(math.nan)
        with pytest.raises(BadInput, match="reward model gives rewards that are not numbers"):
            SEARCHES[method][0](tiny_policy, damaged, Prompt([1]))


def test_a_reward_model_of_another_kind_is_refused(tiny_policy, tiny_mrm):
    for reward_model, said in ((tiny_mrm, "beam takes guard.*not mrm"), (None, "beam takes guard.*not None")):
        with pytest.raises(BadInput, match=said):
            SEARCHES["beam"][0](tiny_policy, reward_model, Prompt([1]))


@pytest.mark.parametrize("method", ["mcts", "deal", "beam"])
def test_more_width_finds_higher_rewards(method, tiny_policy, tiny_scalar_guard):
    """Not for each prompt, but over many: a search with a budget does better than greedy decoding."""
    prompts = [Prompt([i, i + 1]) for i in range(30, 60)]
    mean = lambda width: sum(tiny_scalar_guard.score(prompt, [r.tokens]).item() for prompt, r in zip(prompts, SEARCHES[method][0](
        tiny_policy, tiny_scalar_guard, prompts, width=width, max_new_tokens=6, min_new_tokens=6))) / 30
    assert mean(12) > mean(1) + 1


def test_two_vocabularies_are_refused(tiny_policy, smollm2):
    mrm = Guard(smollm2, Template([1], []))
    with pytest.raises(BadInput, match="tiny_policy.*SmolLM2.*different vocabularies"):
        best_of_n(tiny_policy, mrm, Prompt([1]))


@pytest.mark.parametrize("method", SEARCHES)
def test_prompts_side_by_side_are_searched_as_if_alone(method, tiny_policy, tiny_mrm, tiny_scalar_guard, monkeypatch):
    """The same replies, rewards, trees and costs, with prompts of other lengths beside, some of which end early."""
    monkeypatch.setattr(tiny_policy.config, "eos_token_ids", tuple(range(0, 512, 4)))       # so that many do
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    prompts = [Prompt([5, 6, 7], [8]), Prompt(list(range(40, 80))), Prompt([9]), Prompt([5, 6, 7], [8, 9], True)]
    options = dict(width=8, max_new_tokens=12, min_new_tokens=2, top_p=0.95, temperature=1.0, seed=3)
    together = SEARCHES[method][0](tiny_policy, reward_model, prompts, **options)
    assert len({len(r.tokens) for r in together}) > 1 and len(together) == 4
    for prompt, got in zip(prompts, together):
        alone = SEARCHES[method][0](tiny_policy, reward_model, prompt, **options)
        frontiers = lambda r: [[b.tokens for b in frontier] for frontier in r.trace]
        assert (got.tokens, got.finished, frontiers(got)) == (alone.tokens, alone.finished, frontiers(alone))
        assert got.reward == (None if method == "none" else pytest.approx(alone.reward, abs=1e-9))
        got.stats.seconds = alone.stats.seconds
        assert got.stats == alone.stats


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_one_backbone_for_both_readers_changes_nothing(tiny_policy, beta):
    """An MRM that is LoRA on the policy's own weights, read in the policy's forward pass, against the same on a copy of
    the weights, read in a pass of its own."""
    policy, prompts = tiny_policy, [Prompt([5, 6, 7], [8]), Prompt([9] * 20)]
    mrms = []
    for base in (policy, copy.deepcopy(policy)):
        torch.manual_seed(0)
        mrm = MRM(add_lora(base, 3, 6, ["q_proj", "o_proj", "down_proj"], first_layer=1), Template([1, 2], [3]))
        for name, p in trained_tensors(mrm).items():
            if name != "unseen":
                torch.nn.init.normal_(p, std=0.3)
        mrms.append(mrm)
    assert same_base(policy, mrms[0].llama) and not same_base(policy, mrms[1].llama)
    shared, apart = [saffron(policy, mrm, prompts, width=4, max_new_tokens=10, min_new_tokens=3, beta=beta) for mrm in mrms]
    for one, two in zip(shared, apart):
        assert one.tokens == two.tokens and one.reward == pytest.approx(two.reward, abs=1e-9)
        assert [[b.tokens for b in f] for f in one.trace] == [[b.tokens for b in f] for f in two.trace]
        one.stats.seconds = two.stats.seconds
        assert one.stats == two.stats


def test_a_frontier_is_read_without_walking_its_past(tiny_policy, tiny_mrm, monkeypatch):
    """After the prompt, each step inserts one token a branch, whatever the length."""
    lengths, insert = [], TrieCache.insert
    monkeypatch.setattr(TrieCache, "insert", lambda self, node, tokens: lengths.append(len(tokens)) or insert(self, node, tokens))
    saffron(tiny_policy, tiny_mrm, Prompt([1] * 50), width=3, max_new_tokens=10, min_new_tokens=10)
    assert all(n > 50 for n in lengths[:2]) and set(lengths[2:]) == {1}


# ---------------------------------------------------------------------------------------------------------------
# the other searches, each against its description written out without cache, batch or shortcut

class Plain:
    """Policy and guard of one prompt, asked one sequence at a time."""

    def __init__(self, policy, guard, prompt, least):
        self.policy, self.guard, self.least = policy, guard, least
        self.before = prompt.policy_tokens(policy.template), prompt.reward_tokens(guard.template)
        self.eos, self.calls = policy.config.eos_token_ids, 0

    def p(self, reply):
        logits = self.policy.logits(self.policy(torch.tensor([self.before[0] + reply]))[0, -1])
        if len(reply) < self.least:
            logits[list(self.eos)] = -math.inf
        return logits.softmax(-1)

    def nucleus(self, reply, top_p):
        """[(token, probability)], most likely first."""
        p = self.p(reply)
        return [(token, p[token].item()) for token in nucleus(p, top_p).tolist()]

    def reward(self, reply):
        self.calls += 1
        return self.guard.rewards(self.guard.llama(torch.tensor([self.before[1] + reply]))[0, -1]).item()

    def ended(self, reply):
        return bool(reply) and reply[-1] in self.eos


@pytest.fixture
def plain(tiny_policy, tiny_scalar_guard, monkeypatch):
    monkeypatch.setattr(tiny_policy.config, "eos_token_ids", tuple(range(0, 512, 6)))       # so that replies end
    return Plain(tiny_policy, tiny_scalar_guard, Prompt([5, 6, 7], [8]), least=2)


def found(method, plain, width, top_p=0.7, length=7, seed=0):
    return SEARCHES[method][0](plain.policy, plain.guard, Prompt([5, 6, 7], [8]), width=width, max_new_tokens=length,
                               min_new_tokens=plain.least, top_p=top_p, seed=seed)


@pytest.mark.parametrize("width, top_p", [(1, 0.7), (3, 0.7), (5, 0.1)])
def test_beam_scores_every_candidate(plain, width, top_p):
    """It keeps what has the highest R, finished or not. One guard call a candidate."""
    scores_every_candidate(plain, "beam", width, top_p)


@pytest.mark.exercise(7, points=1)
@pytest.mark.parametrize("width, top_p", [(1, 0.7), (3, 0.7), (5, 0.1)])
def test_saffron_with_a_guard_scores_every_candidate(plain, width, top_p):
    """It takes `width` of the candidates, and then puts first what is finished. One guard call a candidate."""
    scores_every_candidate(plain, "saffron_guard", width, top_p)


def scores_every_candidate(plain, method, width, top_p):
    result, frontier = found(method, plain, width, top_p), [([], 0.0)]
    for got in result.trace:
        pool = [(r + [token], plain.reward(r + [token]))
                for r, _ in frontier if not plain.ended(r) for token, _ in plain.nucleus(r, top_p)]
        finished = [x for x in frontier if plain.ended(x[0])]
        if method == "beam":
            frontier = sorted(finished + pool, key=lambda x: -x[1])[:width]
        else:
            frontier = finished + sorted(pool, key=lambda x: -x[1])[:width]
            frontier = sorted(frontier, key=lambda x: (not plain.ended(x[0]), -x[1]))[:width]
        assert [b.tokens for b in got] == [tokens for tokens, _ in frontier]
    assert result.tokens == frontier[0][0] and result.reward == pytest.approx(frontier[0][1], abs=1e-9)
    assert result.stats.reward_calls == plain.calls >= len(result.trace)


@pytest.mark.exercise(8, points=3)
def test_shares_are_whole_and_in_proportion():
    assert shares([0.0, 0.0], 5) == [3, 2]                                      # equal: the first gets the odd one
    assert shares([math.log(6), math.log(3), math.log(1)], 10) == [6, 3, 1]     # odds 6 : 3 : 1
    assert shares([50.0, 0.0, 0.0], 4) == [4, 0, 0] and shares([1.0], 7) == [7]
    assert shares([math.log(26), math.log(15), math.log(9)], 5) == [3, 1, 1]    # of 2.6, 1.5 and 0.9, the second loses least
    for seed in range(50):
        rewards = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 2
        counts, exact = shares(rewards.tolist(), 16), (16 * rewards.double().softmax(-1)).tolist()
        assert sum(counts) == 16
        for n, x in zip(counts, exact):
            assert abs(n - x) < 1, f"{counts} of {exact}"


@pytest.mark.exercise(8, points=5)
@pytest.mark.parametrize("seed", range(4))
def test_rebase_shares_its_expansions_by_reward(plain, seed):
    width, top_p, length = 6, 0.7, (3, 7, 7, 24)[seed]
    result = found("rebase", plain, width, top_p, length, seed)
    growing, finished, read = [([], 0.0)], [], 0
    for got in result.trace:
        counts = shares([reward for _, reward in growing], width - len(finished))
        read += sum(count > 0 for count in counts)
        new = [b for b in got if b.tokens not in [r for r, _ in finished]]
        for (reply, _), count in zip(growing, counts):
            inside, mine = dict(plain.nucleus(reply, top_p)), [b.tokens[-1] for b in new if b.tokens[:-1] == reply]
            assert len(mine) == len(set(mine)) == min(count, len(inside)), f"of {len(inside)} tokens, {count} are to be drawn"
            assert set(mine) <= inside.keys()
        rewards = {tuple(b.tokens): plain.reward(b.tokens) for b in new}
        assert all(b.reward == pytest.approx(rewards[tuple(b.tokens)], abs=1e-9) for b in new)
        finished += [(b.tokens, b.reward) for b in new if b.finished]
        growing = [(b.tokens, b.reward) for b in new if not b.finished]
        assert [b.tokens for b in got] == [tokens for tokens, _ in finished + growing]
    assert len(result.trace) == length or not growing
    assert (result.tokens, result.reward) == max(finished or growing, key=lambda x: x[1])
    assert result.stats.reward_calls == plain.calls and result.stats.policy_calls == read


@pytest.mark.exercise(8, points=1)
def test_another_seed_makes_rebase_draw_others(plain):
    assert found("rebase", plain, 3, seed=5).tokens == found("rebase", plain, 3, seed=5).tokens
    assert len({tuple(found("rebase", plain, 3, seed=seed).tokens) for seed in range(5)}) > 1


@pytest.mark.exercise(8, points=1)
def test_rebase_draws_in_proportion_to_the_policy(plain):
    """First tokens of 400 searches of width 1 against the probabilities in the nucleus, which are far from equal."""
    inside = dict(plain.nucleus([], 0.62))
    counts = Counter(found("rebase", plain, 1, 0.62, length=1, seed=seed).tokens[0] for seed in range(400))
    assert set(counts) <= inside.keys() and max(inside.values()) > 3 * min(inside.values())
    for token, p in inside.items():
        expected = 400 * p / sum(inside.values())
        assert abs(counts[token] - expected) < 4 * math.sqrt(expected), f"token {token}: {counts[token]} times, not {expected:.0f}"


@pytest.mark.exercise(8, points=1)
def test_rebase_prefers_a_finished_reply_to_any_other(plain):
    """Also where an unfinished one has a higher reward; that happens here."""
    results = [found("rebase", plain, 4, length=5, seed=seed) for seed in range(20)]
    ends = [[b for frontier in result.trace for b in frontier if b.finished] for result in results]
    assert all(result.finished == bool(end) for result, end in zip(results, ends))
    assert any(end and result.reward < max(b.reward for b in result.trace[-1]) for result, end in zip(results, ends)), (
        "in none of 20 searches has an unfinished sequence a higher reward than the finished reply")


@pytest.mark.exercise(8, points=1)
def test_rebase_has_one_generator(plain, monkeypatch):
    """Seeded once: with a new one for each step, the steps would draw alike."""
    made, generator = [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *args, **kwargs: made.append(1) or generator(*args, **kwargs))
    assert len(found("rebase", plain, 3).trace) > 1 and len(made) == 1


@pytest.mark.parametrize("width", [1, 3])
def test_deal_looks_ahead_greedily(plain, width):
    result, reply, length = found("deal", plain, width), [], 7
    while len(reply) < length and not plain.ended(reply):
        p, scores = plain.p(reply), []
        for token in sorted(range(512), key=lambda token: -p[token])[:width]:
            end = reply + [token]
            for _ in range(DEAL_LOOK_AHEAD):
                if len(end) < length and not plain.ended(end):
                    end = end + [plain.p(end).argmax().item()]
            scores.append((p[token].log().item() + DEAL_LAMBDA * plain.reward(end), token))
        reply = reply + [max(scores)[1]]
    assert result.tokens == reply and result.reward == pytest.approx(max(scores)[0], abs=1e-9)
    assert result.stats.reward_calls == plain.calls == width * len(reply)


@pytest.mark.parametrize("width", [1, 3, 10])
def test_mcts_goes_where_puct_leads(plain, width):
    result, reply, length, top_p = found("mcts", plain, width), [], 7, 0.7
    visits, value, prior, children, rewards = Counter(), Counter(), {}, {}, {}
    mean = lambda s: value[s] / visits[s]
    while len(reply) < length and not plain.ended(reply):
        for _ in range(width if visits[tuple(reply)] else width + 1):
            path = [tuple(reply)]
            while children.get(path[-1]):
                s = path[-1]
                path.append(max(children[s], key=lambda c: mean(c if visits[c] else s)
                                + MCTS_EXPLORATION * prior[c] * visits[s] ** 0.5 / (1 + visits[c])))
            leaf = list(path[-1])
            if path[-1] not in rewards:
                rewards[path[-1]] = plain.reward(leaf)
                if len(leaf) < length and not plain.ended(leaf):
                    inside = plain.nucleus(leaf, top_p)
                    children[path[-1]] = [(*leaf, token) for token, _ in inside]
                    prior |= {(*leaf, token): p / sum(p for _, p in inside) for token, p in inside}
            for s in path:
                visits[s] += 1
                value[s] += 1 / (1 + math.exp(-rewards[path[-1]]))
        reply = list(max(children[tuple(reply)], key=lambda c: (visits[c], mean(c) if visits[c] else 0, prior[c])))
    if tuple(reply) not in rewards:
        rewards[tuple(reply)] = plain.reward(reply)
    assert result.tokens == reply and result.reward == pytest.approx(rewards[tuple(reply)], abs=1e-9)
    assert result.stats.reward_calls == plain.calls


@pytest.mark.parametrize("method", SEARCHES)
def test_every_search_computes_each_prefix_once(method, plain, tiny_mrm, monkeypatch):
    """In the trie of each model, over the whole search: what is forgotten is not asked for again."""
    reward_model, asked = reward_model_of(method, tiny_mrm, plain.guard), {}
    ask = Reader.ask
    monkeypatch.setattr(Reader, "ask", lambda self, branches, keep=(): asked.setdefault(self, []).extend(
        self.context + b.tokens for b in branches) or ask(self, branches, keep))
    result = SEARCHES[method][0](plain.policy, reward_model, Prompt([5, 6, 7]), width=4, max_new_tokens=8, min_new_tokens=2)
    distinct = {reader: {tuple(s[:i + 1]) for s in sequences for i in range(len(s))} for reader, sequences in asked.items()}
    assert result.stats.tokens_computed == sum(map(len, distinct.values()))
    assert result.stats.tokens_cached == sum(len(s) for sequences in asked.values() for s in sequences) - sum(
        map(len, distinct.values()))
    assert len(asked) == 1 + (method != "none") and 0 < result.stats.peak_kv_bytes < result.stats.unshared_kv_bytes * 6
