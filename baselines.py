"""
The field's other searches, to compare SAFFRON with, and the table SEARCHES, which names all of them.

search.py says how to read a search. All take the same Options, and report what a reply cost.

Shapes: n sequences, m candidates, V = vocab_size.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine import Ask, search_with
from search import Branch, candidates, extend, next_logits, nucleus, probabilities, rewarded, saffron

REBASE_TEMPERATURE = 1.0        # R is the log-odds of "safe": at 1, shares are in proportion to the odds
DEAL_LOOK_AHEAD = 4             # tokens
DEAL_LAMBDA = 1.0               # weight of R beside log π
MCTS_EXPLORATION = 1.0          # P(safe), to which it is added, is in [0, 1]


@search_with("guard", "mrm", None, temperature=0.0)
def no_defence(policy, reward_model, options, trace):
    """One reply, greedy at temperature 0, else sampled. The reward model is not used."""
    yield from sample_replies(policy, 1, options, trace)
    return trace[-1][0]


@search_with("guard")
def best_of_n(policy, guard, options, trace):
    """Sample `width` replies independently, in one trie; the one with the highest R(reply) wins."""
    yield from sample_replies(policy, options.width, options, trace)
    answer = yield Ask(reward=trace[-1])
    return max(rewarded(trace[-1], answer.rewards), key=reward_of)                      # of (width,)


@search_with("guard")
def beam(policy, guard, options, trace):
    """Beam search over tokens: of all tokens in the nuclei of all sequences, the `width` whose sequences have
    the highest R stay, finished or not. Every candidate costs a guard call, which is the
    exploration-efficiency dilemma of the paper. (saffron with a guard puts finished ones first.)
    Deterministic."""
    frontier = [Branch()]
    for length in range(options.max_new_tokens):
        finished = [branch for branch in frontier if branch.finished]
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        answer = yield Ask(policy=growing)
        logits = next_logits(policy, answer.policy_hidden, length, options.min_new_tokens)
        rows, tokens, _ = candidates(logits, None, options.top_p, options.temperature)
        children = [extend(policy, growing[row], token) for row, token in zip(rows.tolist(), tokens.tolist())]
        answer = yield Ask(reward=children)
        pool = finished + rewarded(children, answer.rewards)                            # of (m,)
        frontier = sorted(pool, key=reward_of, reverse=True)[:options.width]            # stable
        trace.append(frontier)
    return frontier[0]


@search_with("guard")
def rebase(policy, guard, options, trace):
    """Reward-balanced search (Wu et al. 2024, arXiv 2408.00724), with a token for a step: `width` expansions,
    less those finished, are shared among the unfinished sequences in proportion to softmax(R /
    REBASE_TEMPERATURE). Each draws that many different tokens of its nucleus (all, if it holds fewer). The
    guard scores the new sequences. A sequence whose share is zero is dropped, unread. The finished
    sequence with the highest R is the reply, else the unfinished one. (In Wu et al. a step is a line of
    reasoning, and rewards are probabilities.)"""
    generator = torch.Generator().manual_seed(options.seed)
    growing = [Branch(reward=0.0)]
    finished = []
    for length in range(options.max_new_tokens):
        counts = shares([branch.reward for branch in growing], options.width - len(finished))
        chosen = [(branch, count) for branch, count in zip(growing, counts) if count]
        answer = yield Ask(policy=[branch for branch, _ in chosen])
        logits = next_logits(policy, answer.policy_hidden, length, options.min_new_tokens)
        children = []
        for (branch, count), p in zip(chosen, probabilities(logits, options.temperature)):
            drawn = draw_tokens(p, options.top_p, count, generator)
            children += [extend(policy, branch, token) for token in drawn]
        answer = yield Ask(reward=children)
        rewarded(children, answer.rewards)
        growing = [branch for branch in children if not branch.finished]
        finished += [branch for branch in children if branch.finished]
        trace.append(finished + growing)
        if not growing:                                 # also when `width` sequences are finished
            break
    return max(finished or growing, key=reward_of)


def shares(rewards, count):
    """count · softmax(rewards / REBASE_TEMPERATURE) in ints that sum to `count`: rounded down, then one more
    for those that lost most (the first among equals). rewards: a list of floats."""
    exact = count * (torch.tensor(rewards, dtype=torch.float64) / REBASE_TEMPERATURE).softmax(-1)
    whole = exact.floor()
    order = (exact - whole).argsort(descending=True, stable=True)
    whole[order[:count - int(whole.sum())]] += 1
    return whole.int().tolist()


@search_with("guard")
def deal(policy, guard, options, trace):
    """Decoding-time alignment (Huang et al. 2024, arXiv 2402.06147), its greedy variant: each of the `width`
    most likely tokens a is continued greedily for DEAL_LOOK_AHEAD tokens (fewer where the reply ends), the
    guard scores the end of that, and the token with the highest log π(a | s) + DEAL_LAMBDA ·
    R(s·a·look-ahead) is taken. Deterministic. Reward of a branch: that sum."""
    branch = Branch()
    ends = []
    while len(branch.tokens) < options.max_new_tokens and not branch.finished:
        # 1. The likeliest next tokens.
        earlier = ends                                 # one of which may be the beginning of a new look-ahead
        answer = yield Ask(policy=[branch], keep=earlier)
        logits = next_logits(policy, answer.policy_hidden, len(branch.tokens), options.min_new_tokens)
        width = min(options.width, logits.shape[-1])
        log_p, tokens = logits[0].log_softmax(-1).topk(width)                           # (width,) each
        children = [extend(policy, branch, token) for token, p in zip(tokens.tolist(), log_p.tolist())
                    if p > -math.inf]
        # 2. Look ahead: continue each greedily.
        ends = children
        for _ in range(DEAL_LOOK_AHEAD):
            growing = [end for end in ends if not end.finished and len(end.tokens) < options.max_new_tokens]
            if not growing:
                break
            answer = yield Ask(policy=growing, keep=ends + earlier)
            logits = next_logits(policy, answer.policy_hidden, len(growing[0].tokens), options.min_new_tokens)
            likeliest = logits.argmax(-1).tolist()
            after = {end: extend(policy, end, token) for end, token in zip(growing, likeliest)}
            ends = [after.get(end, end) for end in ends]
        # 3. Take the token whose look-ahead the guard and the policy like best.
        answer = yield Ask(reward=ends, keep=earlier)
        rewarded(children, log_p[:len(children)] + DEAL_LAMBDA * answer.rewards)        # (width,)
        branch = max(children, key=reward_of)
        trace.append([branch])
    return branch


@search_with("guard")
def mcts(policy, guard, options, trace):
    """Monte-Carlo tree search with PUCT (Silver et al. 2017; for text Liu et al. 2023, arXiv 2309.15028),
    `width` simulations a token. Then the child with most visits is taken (equal ones: by mean value) and its
    part of the tree kept. Few simulations go little further than the likeliest tokens: at width 1 this is
    greedy decoding. Deterministic."""
    root = Choice(Branch())
    read = []                                               # the branches that the models have read
    while len(root.branch.tokens) < options.max_new_tokens and not root.branch.finished:
        for _ in range(options.width + (root.visits == 0)):     # a root that nobody has read is read first
            yield from simulate(policy, root, read, options)
        root = max(root.children, key=lambda child: (child.visits, child.mean(), child.prior))
        length = len(root.branch.tokens)
        read = [branch for branch in read if branch.tokens[:length] == root.branch.tokens]
        trace.append([root.branch])
    if root.branch.reward is None:                          # no simulation came to the last token
        answer = yield Ask(reward=[root.branch])
        rewarded([root.branch], answer.rewards)
    return root.branch


@dataclass(eq=False)
class Choice:
    """A node of mcts: a branch, the policy's probability of its last token, and what came of it."""
    branch: Branch
    prior: float = 1.0
    visits: int = 0
    value: float = 0.0                           # the sum over its visits of P(safe) = sigmoid(R) at the leaf
    children: list = field(default_factory=list)

    def mean(self):
        return self.value / max(1, self.visits)

    def puct(self, child):
        """Mean value (before the first visit, the mean here) + exploration, in proportion to the prior."""
        mean = child.mean() if child.visits else self.mean()
        return mean + MCTS_EXPLORATION * child.prior * math.sqrt(self.visits) / (1 + child.visits)


def simulate(policy, root, read, options):
    """One simulation of mcts. Go down by the highest PUCT to a leaf. Its children are the policy's nucleus
    (priors: the probabilities). Add the guard's P(safe) of the leaf to all nodes on the path. read: the
    branches read so far."""
    path = [root]
    while path[-1].children:
        path.append(max(path[-1].children, key=path[-1].puct))
    leaf = path[-1]
    branch = leaf.branch
    if branch.reward is None:                         # else a leaf that nothing can follow, come to once more
        open_ended = not branch.finished and len(branch.tokens) < options.max_new_tokens
        answer = yield Ask(policy=[branch] if open_ended else [], reward=[branch], keep=read)
        rewarded([branch], answer.rewards)
        read.append(branch)
        if open_ended:
            logits = next_logits(policy, answer.policy_hidden, len(branch.tokens), options.min_new_tokens)
            p = probabilities(logits, options.temperature)[0]
            inside = nucleus(p, options.top_p)
            priors = (p[inside] / p[inside].sum()).tolist()
            leaf.children = [Choice(extend(policy, branch, token), prior)
                             for token, prior in zip(inside.tolist(), priors)]
    for choice in path:
        choice.visits += 1
        choice.value += 0.5 + 0.5 * math.tanh(branch.reward / 2)        # sigmoid, which cannot overflow so


def reward_of(branch):
    return branch.reward


def draw_tokens(p, top_p, count, generator):
    """`count` different ids of the nucleus (at most all), drawn in proportion to p: probabilities (V,)."""
    tokens = nucleus(p, top_p)
    drawn = torch.multinomial(p[tokens].cpu(), min(count, len(tokens)), generator=generator)
    return tokens[drawn.to(tokens.device)].tolist()


def sample_replies(policy, n, options, trace):
    """Asks for n independent replies, each token drawn from the nucleus: the last frontier of `trace`."""
    generator = torch.Generator().manual_seed(options.seed)
    branches = [Branch() for _ in range(n)]
    for length in range(options.max_new_tokens):
        growing = [branch for branch in branches if not branch.finished]
        if not growing:
            break
        answer = yield Ask(policy=growing)
        logits = next_logits(policy, answer.policy_hidden, length, options.min_new_tokens)
        after = {}
        for branch, p in zip(growing, probabilities(logits, options.temperature)):
            token, = draw_tokens(p, options.top_p, 1, generator)
            after[branch] = extend(policy, branch, token)
        branches = [after.get(branch, branch) for branch in branches]
        trace.append(branches)


class Method(NamedTuple):
    search: object                  # the function
    reward_model: str | None        # the kind of reward model that it takes: "guard", "mrm" or None
    what: str                       # what it does, for --help


# A search is known to all commands by its line here.
SEARCHES = {
    "none": Method(no_defence, None, "no defence: greedy decoding, or sampling"),
    "best_of_n": Method(best_of_n, "guard", "samples N replies, keeps the one that the guard likes best"),
    "beam": Method(beam, "guard", "at each token, keeps the N sequences with the highest reward"),
    "rebase": Method(rebase, "guard", "at each token, shares out N expansions by reward"),
    "deal": Method(deal, "guard", "looks ahead greedily from the N likeliest tokens"),
    "mcts": Method(mcts, "guard", "Monte-Carlo tree search with PUCT, N simulations a token"),
    "saffron": Method(saffron, "mrm", "the paper's: one call of the MRM scores all next tokens"),
    "saffron_guard": Method(saffron, "guard", "the same, with a call of the guard for each candidate"),
}
