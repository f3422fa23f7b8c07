"""Each search against its description written out without cache, batch or shortcut,
and what all of them promise."""

import argparse
import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import paper, reward_model_of

import baselines
from plumbing.errors import BadInput
from engine import Options, Reader
from plumbing.adapters import check_vocabulary
from plumbing.options import add_search_options, check_prompt, search_options
from plumbing.tokenizer import Prompt
from baselines import DEAL_LAMBDA, DEAL_LOOK_AHEAD, MCTS_EXPLORATION, SEARCHES, best_of_n, no_defence, shares
from search import nucleus
from trie_cache import TrieCache


@pytest.mark.parametrize("method", SEARCHES)
def test_same_seed_same_reply_and_no_early_end(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    run = lambda seed: SEARCHES[method][0](
        tiny_policy, reward_model, Prompt([5, 6, 7]),
        paper(width=4, max_new_tokens=20, min_new_tokens=10, top_p=0.9, temperature=1.0, seed=seed))
    first, again, other = run(1), run(1), run(2)
    assert (first.tokens, first.reward) == (again.tokens, again.reward)
    assert (first.tokens == other.tokens) == (method in ("beam", "deal", "mcts", "saffron", "saffron_guard"))
    assert 7 not in first.tokens[:10] and first.tokens[-1] == 7 or len(first.tokens) == 20
    assert first.tokens in [b.tokens for b in first.trace[-1]] and len(first.trace) <= 20


def test_greedy_takes_the_most_likely_token(tiny_policy):
    result = no_defence(tiny_policy, None, Prompt([5, 6, 7]), paper(max_new_tokens=10, min_new_tokens=0))
    tokens = tiny_policy.template([5, 6, 7])
    for token in result.tokens:
        assert token == tiny_policy.logits(tiny_policy(torch.tensor([tokens]))[0, -1]).argmax().item()
        tokens.append(token)


def test_sampling_follows_the_policy(tiny_policy, tiny_scalar_guard):
    """First tokens of 2,000 samples against the nucleus' probabilities."""
    result = best_of_n(tiny_policy, tiny_scalar_guard, Prompt([1]),
                       paper(width=2000, max_new_tokens=1, top_p=0.5))
    logits = tiny_policy.logits(TrieCache(tiny_policy)([tiny_policy.template([1])]))[0]
    logits[7] = -math.inf                                                           # min_new_tokens
    p = logits.softmax(-1)
    inside = nucleus(p, 0.5)
    p = torch.zeros_like(p).index_copy(0, inside, p[inside]) / p[inside].sum()
    counts = torch.bincount(torch.tensor([b.tokens[0] for b in result.trace[-1]]), minlength=512)
    assert set(counts.nonzero().flatten().tolist()) <= set(inside.tolist())
    assert ((counts - 2000 * p).abs() < 5 * (2000 * p).sqrt() + 1).all()


@pytest.mark.parametrize("method", SEARCHES)
def test_a_probability_that_is_not_added_up_is_none(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """It would be 1 otherwise, log 1 = 0."""
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    options = paper(width=2, max_new_tokens=3, min_new_tokens=3)
    branch = SEARCHES[method][0](tiny_policy, reward_model, Prompt([5, 6, 7]), options).trace[-1][0]
    assert branch.log_prob < 0 if method.startswith("saffron") else branch.log_prob is None


def test_best_of_n_returns_the_reply_the_guard_likes_best(tiny_policy, tiny_scalar_guard):
    prompt = Prompt([5, 6, 7], [8])
    result = best_of_n(tiny_policy, tiny_scalar_guard, prompt,
                       paper(width=6, max_new_tokens=12, min_new_tokens=3))
    context = prompt.reward_tokens(tiny_scalar_guard.template)
    for branch in result.trace[-1]:                                         # scored by one uncached pass each
        hidden = tiny_scalar_guard.llama(torch.tensor([context + branch.tokens]))[0, -1]
        assert branch.reward == pytest.approx(tiny_scalar_guard.reward(hidden).item(), abs=1e-9)
    assert result.reward == max(b.reward for b in result.trace[-1])


@pytest.mark.parametrize("options, said", [
    ({"width": 0}, "width is 0.*at least 1"), ({"top_p": 0}, r"top_p is 0.*\(0, 1\]"),
    ({"top_p": 1.1}, "top_p"), ({"top_p": math.nan}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"min_new_tokens": -1}, "min_new"), ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-38}, "0, or from 0.01 to 100"), ({"seed": -1}, "seed"),
])
def test_bad_values_are_refused(options, said):
    """By the commands, before the work begins."""
    with pytest.raises(BadInput, match=said):
        search_options(SimpleNamespace(**options), options.get("width", 4))


def test_a_prompt_that_is_too_long_is_refused(tiny_policy, tiny_mrm, tiny_scalar_guard):
    """By the commands; without them, by an assert."""
    prompt = Prompt([1, 2, 3, 4, 5])
    for reward_model in (None, tiny_mrm, tiny_scalar_guard):
        check_prompt(tiny_policy, reward_model, prompt, 500)
        with pytest.raises(BadInput, match="10 tokens.*510.*tiny_policy.*512"):
            check_prompt(tiny_policy, reward_model, prompt, 510)
    with pytest.raises(AssertionError, match="tiny_policy reads at most 512 tokens"):
        no_defence(tiny_policy, None, Prompt([1] * 510), paper(max_new_tokens=510, min_new_tokens=510))


def test_options_are_the_same_everywhere():
    """In Python, and in the commands that search."""
    parser = argparse.ArgumentParser()
    add_search_options(parser.add_argument)
    assert search_options(parser.parse_args([]), 4) == Options()
    for wrong in ({"width": 0}, {"top_p": 0.0}, {"min_new_tokens": -1}, {"beta": -1.0}):
        with pytest.raises(AssertionError):
            Options(**wrong)


@pytest.mark.parametrize("method", SEARCHES)
def test_what_is_not_a_number_is_refused(method, tiny_policy, tiny_mrm, tiny_scalar_guard):
    """Scores of damaged weights, or of ones too large for their dtype: no search ranks by them."""
    reward_model = reward_model_of(method, tiny_mrm, tiny_scalar_guard)
    policy, damaged = copy.deepcopy(tiny_policy), copy.deepcopy(reward_model)
    next(policy.parameters()).data.fill_(math.nan)
    with pytest.raises(BadInput, match="tiny_policy gives logits that are not numbers"):
        SEARCHES[method][0](policy, reward_model, Prompt([1]))
    if reward_model:
        next(damaged.llama.parameters()).data.fill_(math.nan)
        with pytest.raises(BadInput, match="reward model gives rewards that are not numbers"):
            SEARCHES[method][0](tiny_policy, damaged, Prompt([1]))


def test_a_reward_model_of_another_kind_is_refused(tiny_policy, tiny_mrm):
    for reward_model, said in ((tiny_mrm, "beam takes .*guard.*not mrm"),
                               (None, "beam takes .*guard.*not None")):
        with pytest.raises(AssertionError, match=said):
            SEARCHES["beam"][0](tiny_policy, reward_model, Prompt([1]))


@pytest.mark.parametrize("method", ["mcts", "deal", "beam"])
def test_more_width_finds_higher_rewards(method, tiny_policy, tiny_scalar_guard):
    """Not for each prompt, but over many: a search with a budget does better than greedy decoding."""
    prompts = [Prompt([i, i + 1]) for i in range(30, 60)]
    mean = lambda width: sum(
        tiny_scalar_guard.score(prompt, [r.tokens]).item() for prompt, r in zip(prompts, SEARCHES[method][0](
            tiny_policy, tiny_scalar_guard, prompts,
            paper(width=width, max_new_tokens=6, min_new_tokens=6)))) / 30
    assert mean(12) > mean(1) + 1


def test_two_vocabularies_are_refused(tiny_policy, smollm2):
    with pytest.raises(BadInput, match="tiny_policy.*SmolLM2.*different vocabularies"):
        check_vocabulary(tiny_policy, smollm2)


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
        return self.guard.reward(self.guard.llama(torch.tensor([self.before[1] + reply]))[0, -1]).item()

    def ended(self, reply):
        return bool(reply) and reply[-1] in self.eos


@pytest.fixture
def plain(tiny_policy, tiny_scalar_guard, monkeypatch):
    monkeypatch.setattr(tiny_policy.config, "eos_token_ids", tuple(range(0, 512, 6)))   # so that replies end
    return Plain(tiny_policy, tiny_scalar_guard, Prompt([5, 6, 7], [8]), least=2)


def found(method, plain, width, top_p=0.7, length=7, seed=0):
    return SEARCHES[method][0](plain.policy, plain.guard, Prompt([5, 6, 7], [8]),
                               paper(width=width, max_new_tokens=length, min_new_tokens=plain.least,
                                     top_p=top_p, seed=seed))


@pytest.mark.parametrize("width, top_p", [(1, 0.7), (3, 0.7), (5, 0.1)])
def test_beam_scores_every_candidate(plain, width, top_p):
    """It keeps what has the highest R, finished or not. One guard call a candidate."""
    scores_every_candidate(plain, "beam", width, top_p)


@pytest.mark.exercise(7, points=1, bonus=True)
@pytest.mark.parametrize("width, top_p", [(1, 0.7), (3, 0.7), (5, 0.1)])
def test_saffron_with_a_guard_scores_every_candidate(plain, width, top_p):
    """It takes `width` of the candidates, and then puts first what is finished.
    One guard call a candidate."""
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
def test_shares_are_whole_and_in_proportion(monkeypatch):
    assert shares([0.0, 0.0], 5) == [3, 2]                                      # equal: the first gets more
    assert shares([math.log(6), math.log(3), math.log(1)], 10) == [6, 3, 1]     # odds 6 : 3 : 1
    assert shares([50.0, 0.0, 0.0], 4) == [4, 0, 0] and shares([1.0], 7) == [7]
    # Of 2.6, 1.5 and 0.9, the second loses least.
    assert shares([math.log(26), math.log(15), math.log(9)], 5) == [3, 1, 1]
    for seed in range(50):
        rewards = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 2
        counts, exact = shares(rewards.tolist(), 16), (16 * rewards.double().softmax(-1)).tolist()
        assert sum(counts) == 16
        for n, x in zip(counts, exact):
            assert abs(n - x) < 1, f"{counts} of {exact}"
    monkeypatch.setattr(baselines, "REBASE_TEMPERATURE", 2.0)                   # R / 2 has these odds
    assert shares([2 * math.log(6), 2 * math.log(3), 0.0], 10) == [6, 3, 1]


@pytest.mark.exercise(8, points=1)
def test_rebase_draws_at_the_temperature_that_it_is_given(plain):
    """At 0 each sequence has one token to draw, the likeliest: then all is greedy decoding."""
    options = dict(max_new_tokens=7, min_new_tokens=plain.least, top_p=0.9, temperature=0.0)
    prompt = Prompt([5, 6, 7], [8])
    result = SEARCHES["rebase"][0](plain.policy, plain.guard, prompt, paper(width=3, **options))
    assert result.tokens == no_defence(plain.policy, None, prompt, paper(**options)).tokens
    assert all(len(frontier) == 1 for frontier in result.trace)


@pytest.mark.exercise(8, points=4)
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
            inside, mine = (dict(plain.nucleus(reply, top_p)),
                            [b.tokens[-1] for b in new if b.tokens[:-1] == reply])
            assert len(mine) == len(set(mine)) == min(count, len(inside)), (
                f"of {len(inside)} tokens, {count} are to be drawn")
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
    """First tokens of 400 searches of width 1 against the probabilities in the nucleus,
    which are far from equal."""
    inside = dict(plain.nucleus([], 0.62))
    counts = Counter(found("rebase", plain, 1, 0.62, length=1, seed=seed).tokens[0] for seed in range(400))
    assert set(counts) <= inside.keys() and max(inside.values()) > 3 * min(inside.values())
    for token, p in inside.items():
        expected = 400 * p / sum(inside.values())
        assert abs(counts[token] - expected) < 4 * math.sqrt(expected), (
            f"token {token}: {counts[token]} times, not {expected:.0f}")


@pytest.mark.exercise(8, points=1)
def test_rebase_prefers_a_finished_reply_to_any_other(plain):
    """Also where an unfinished one has a higher reward; that happens here."""
    results = [found("rebase", plain, 4, length=5, seed=seed) for seed in range(20)]
    ends = [[b for frontier in result.trace for b in frontier if b.finished] for result in results]
    assert all(result.finished == bool(end) for result, end in zip(results, ends))
    assert any(end and result.reward < max(b.reward for b in result.trace[-1])
               for result, end in zip(results, ends)), (
        "in none of 20 searches has an unfinished sequence a higher reward than the finished reply")


@pytest.mark.exercise(8, points=1)
def test_rebase_has_one_generator(plain, monkeypatch):
    """Seeded once: with a new one for each step, the steps would draw alike."""
    made, generator = [], torch.Generator
    monkeypatch.setattr(torch, "Generator",
                        lambda *args, **kwargs: made.append(1) or generator(*args, **kwargs))
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
        reply = list(max(children[tuple(reply)],
                         key=lambda c: (visits[c], mean(c) if visits[c] else 0, prior[c])))
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
    result = SEARCHES[method][0](plain.policy, reward_model, Prompt([5, 6, 7]),
                                 paper(width=4, max_new_tokens=8, min_new_tokens=2))
    distinct = {reader: {tuple(s[:i + 1]) for s in sequences for i in range(len(s))}
                for reader, sequences in asked.items()}
    assert result.stats.tokens_computed == sum(map(len, distinct.values()))
    assert result.stats.tokens_cached == sum(len(s) for sequences in asked.values() for s in sequences) - sum(
        map(len, distinct.values()))
    assert (len(asked) == 1 + (method != "none")
            and 0 < result.stats.peak_kv_bytes < result.stats.unshared_kv_bytes * 6)
