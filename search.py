"""
Searching for a safe reply: each method is one function, all with the same arguments and the same result.

    result = saffron(policy, mrm, prompt, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8)
    result.tokens, result.text, result.reward, result.finished, result.stats, result.trace

Given a list of prompts, it returns a list of results. SEARCHES, at the end, names all.

How to read one. It is written as a generator of its steps for one prompt; the decorator `search_with` makes
of it the function called above. An Ask names the Branches to be read, and two answers come back:

    hidden, rewards = yield Ask(policy=growing, reward=children, keep=earlier)

1. engine.py puts the new tokens into the tries of policy and reward model and reads them in one forward pass.
2. hidden: the policy's final hidden states after the n branches of `growing`, (n, d). rewards: the guard's R
   of the m branches of `children`, (m,), or an MRM's hidden states after them, (m, d), which `child_rewards`
   turns into M(s)_a.
3. A model that is asked forgets all but the branches asked for now, those in `keep`, and the beginnings of
   both. Name in `keep` what you go on from later. A model that is not asked forgets nothing.
4. Append each frontier, a list of branches, to `trace`. Return the branch that won. The least search is:

    @search_with(None)
    def greedy(policy, reward_model, trace, *, max_new_tokens):         # it names the options that it uses
        branch = Branch()
        while len(branch.tokens) < max_new_tokens and not branch.finished:
            hidden, _ = yield Ask(policy=[branch])
            branch = extend(policy, branch, policy.logits(hidden)[0].argmax().item())
            trace.append([branch])
        return branch

Shapes: n sequences, m candidates, d = hidden_size, V = vocab_size.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from files import BadInput

import torch

from engine import Ask, Branch, search_with
from mrm import MRM, check_finite

REBASE_TEMPERATURE = 1.0        # R is the log-odds of "safe": at 1, shares are in proportion to the odds
DEAL_LOOK_AHEAD, DEAL_LAMBDA = 4, 1.0
MCTS_EXPLORATION = 1.0          # P(safe), to which it is added, is in [0, 1]
NO_REPEAT = 4                   # saffron with beta: no run of so many tokens may come twice


@search_with("mrm", "guard")
def saffron(policy, reward_model, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, beta):
    """The paper's Saffron-1, as in saffron.py. What is added: beta, and a guard in place of the MRM.
    Deterministic; temperature only shapes the nucleus.

    A step takes the tokens a of the policy's nucleus that are not in V_unseen as candidates of each
    unfinished sequence s, and keeps the `width` sequences s·a with the highest M(s)_a; equal ones by frontier
    order, then by the policy's probability (Eq. 2, 7 and 3). If a nucleus is all unseen, its fallback is
    the likeliest seen token. Fallbacks fill the places that others leave free.

    beta > 0, which is not in the paper, ranks by M(s)_a + beta · log π(s·a), π(s·a) being the policy's
    probability of the whole reply so far: of replies that are about equally safe, the likelier one. (This is
    reward maximization with a KL penalty towards the policy.) The likeliest replies run in circles (Holtzman
    et al. 2020, arXiv 1904.09751); so with beta > 0 no NO_REPEAT tokens in a row come twice (Paulus et al.
    2017, arXiv 1705.04304), unless nothing else is left.

    With a guard in place of the MRM, it asks for R(s·a) of each candidate: the price that the MRM saves."""
    multifurcation, frontier = isinstance(reward_model, MRM), [Branch()]
    for length in range(max_new_tokens):
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        hidden, of_mrm = yield Ask(policy=growing, reward=growing if multifurcation else [])    # (n, d) each
        logits = next_logits(policy, hidden, length, min_new_tokens)                    # (n, V)
        unseen = reward_model.unseen if multifurcation else None
        rows, tokens, fallbacks = candidates(logits, unseen, top_p, temperature)        # (m,) each
        log_p = logits[rows, tokens] - logits.logsumexp(-1)[rows]                       # log π(a | s): (m,)
        children = [extend(policy, growing[row], token, log_p=p)
                    for row, token, p in zip(rows.tolist(), tokens.tolist(), log_p.tolist())]
        if multifurcation:
            # M_cons(s)_a for the candidates; of the other entries of M(s), none is needed.
            rewards = reward_model.child_rewards(of_mrm[rows], tokens)                  # (m,)
        else:
            _, rewards = yield Ask(reward=children)                                     # R(s·a): (m,)
        for child, fallback in zip(rewarded(children, rewards), fallbacks.tolist()):
            child.fallback = fallback
        finished = [branch for branch in frontier if branch.finished]
        frontier = best(finished, children, width, beta)
        trace.append(frontier)
    return frontier[0]


def best(finished, children, width, beta):
    """The next frontier, ranked by reward + beta · log_prob (equal ones keep their order). Take the best
    `width` children; with beta > 0 skip those that repeat themselves, unless all do. Sort them with
    `finished`: finished ones first, in each part fallbacks last, then by score. Keep the first `width`. A
    child that is a fallback takes only a place that is free."""
    score = lambda branch: branch.reward + beta * branch.log_prob
    ranked = sorted(children, key=lambda branch: (branch.fallback, -score(branch)))     # stable
    fresh = (branch for branch in ranked if not beta or not repeats_its_end(branch.tokens))
    kept = list(itertools.islice(fresh, width)) or ranked[:width]
    regular = sum(not branch.fallback for branch in kept)
    kept = kept[:max(regular, width - len(finished))]
    order = lambda branch: (not branch.finished, branch.fallback, -score(branch))
    return sorted(finished + kept, key=order)[:width]


def repeats_its_end(tokens, n=NO_REPEAT):
    """Whether the last n tokens stood in a row somewhere before."""
    return any(tokens[i:i + n] == tokens[-n:] for i in range(len(tokens) - n))


@search_with("guard", "mrm", None, temperature=0.0)
def none(policy, reward_model, trace, *, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """No defence: one reply, greedy at temperature 0, else sampled. The reward model is not used."""
    yield from sample_replies(policy, 1, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    return trace[-1][0]


@search_with("guard")
def best_of_n(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """Sample `width` replies independently, in one trie; the one with the highest R(reply) wins."""
    yield from sample_replies(policy, width, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    _, rewards = yield Ask(reward=trace[-1])                                            # (width,)
    return max(rewarded(trace[-1], rewards), key=lambda branch: branch.reward)


@search_with("guard")
def beam(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature):
    """Beam search over tokens: of all tokens in the nuclei of all sequences, the `width` whose sequences have
    the highest R stay, finished or not. Every candidate costs a guard call, which is the
    exploration-efficiency dilemma of the paper. (saffron with a guard puts finished ones first.)
    Deterministic."""
    frontier = [Branch()]
    for length in range(max_new_tokens):
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        hidden, _ = yield Ask(policy=growing)
        logits = next_logits(policy, hidden, length, min_new_tokens)
        rows, tokens, _ = candidates(logits, None, top_p, temperature)
        children = [extend(policy, growing[row], token) for row, token in zip(rows.tolist(), tokens.tolist())]
        _, rewards = yield Ask(reward=children)                                         # (m,)
        pool = [branch for branch in frontier if branch.finished] + rewarded(children, rewards)
        frontier = sorted(pool, key=lambda branch: -branch.reward)[:width]
        trace.append(frontier)
    return frontier[0]


@search_with("guard")
def rebase(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """Reward-balanced search (Wu et al. 2024, arXiv 2408.00724), with a token for a step: `width` expansions,
    less those finished, are shared among the unfinished sequences in proportion to softmax(R /
    REBASE_TEMPERATURE). Each draws that many different tokens of its nucleus (all, if it holds fewer). The
    guard scores the new sequences. A sequence whose share is zero is dropped, unread. The finished
    sequence with the highest R is the reply, else the unfinished one. (In Wu et al. a step is a line of
    reasoning, and rewards are probabilities.)"""
    generator = torch.Generator().manual_seed(seed)
    growing, finished = [Branch(reward=0.0)], []
    for length in range(max_new_tokens):
        counts = shares([branch.reward for branch in growing], width - len(finished))
        chosen = [(branch, count) for branch, count in zip(growing, counts) if count]
        hidden, _ = yield Ask(policy=[branch for branch, _ in chosen])
        logits, children = next_logits(policy, hidden, length, min_new_tokens), []
        for (branch, count), p in zip(chosen, probabilities(logits, temperature)):
            children += [extend(policy, branch, token) for token in draw_tokens(p, top_p, count, generator)]
        _, rewards = yield Ask(reward=children)
        rewarded(children, rewards)
        growing = [branch for branch in children if not branch.finished]
        finished += [branch for branch in children if branch.finished]
        trace.append(finished + growing)
        if not growing or len(finished) >= width:
            break
    return max(finished or growing, key=lambda branch: branch.reward)


def shares(rewards, count):
    """count · softmax(rewards / REBASE_TEMPERATURE) in ints that sum to `count`: rounded down, then one more
    for those that lost most (the first among equals). rewards: a list of floats."""
    exact = count * (torch.tensor(rewards, dtype=torch.float64) / REBASE_TEMPERATURE).softmax(-1)
    whole = exact.floor()
    order = (exact - whole).argsort(descending=True, stable=True)
    whole[order[:count - int(whole.sum())]] += 1
    return whole.int().tolist()


@search_with("guard")
def deal(policy, guard, trace, *, width, max_new_tokens, min_new_tokens):
    """Decoding-time alignment (Huang et al. 2024, arXiv 2402.06147), its greedy variant: each of the `width`
    most likely tokens a is continued greedily for DEAL_LOOK_AHEAD tokens (fewer where the reply ends), the
    guard scores the end of that, and the token with the highest log π(a | s) + DEAL_LAMBDA ·
    R(s·a·look-ahead) is taken. Deterministic. Reward of a branch: that score."""
    branch, ends = Branch(), []
    while len(branch.tokens) < max_new_tokens and not branch.finished:
        earlier = ends                                 # one of which may be the beginning of a new look-ahead
        hidden, _ = yield Ask(policy=[branch], keep=earlier)
        logits = next_logits(policy, hidden, len(branch.tokens), min_new_tokens)
        log_p, tokens = logits[0].log_softmax(-1).topk(min(width, logits.shape[-1]))    # (width,) each
        children = [extend(policy, branch, token) for token, p in zip(tokens.tolist(), log_p.tolist())
                    if p > -math.inf]
        ends = children
        for _ in range(DEAL_LOOK_AHEAD):
            growing = [end for end in ends if not end.finished and len(end.tokens) < max_new_tokens]
            if not growing:
                break
            hidden, _ = yield Ask(policy=growing, keep=ends + earlier)
            logits = next_logits(policy, hidden, len(growing[0].tokens), min_new_tokens)
            likeliest = logits.argmax(-1).tolist()
            after = {end: extend(policy, end, token) for end, token in zip(growing, likeliest)}
            ends = [after.get(end, end) for end in ends]
        _, rewards = yield Ask(reward=ends, keep=earlier)                               # (width,)
        rewarded(children, log_p[:len(children)] + DEAL_LAMBDA * rewards)
        branch = max(children, key=lambda child: child.reward)
        trace.append([branch])
    return branch


@search_with("guard")
def mcts(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature):
    """Monte-Carlo tree search with PUCT (Silver et al. 2017; for text Liu et al. 2023, arXiv 2309.15028),
    `width` simulations a token. Then the child with most visits is taken (equal ones: by mean value) and its
    part of the tree kept. Few simulations go little further than the likeliest tokens: at width 1 this is
    greedy decoding. Deterministic."""
    root, read = Choice(Branch()), []
    while len(root.branch.tokens) < max_new_tokens and not root.branch.finished:
        for _ in range(width + (root.visits == 0)):         # a root that nobody has read is read first
            yield from simulate(policy, root, read, max_new_tokens, min_new_tokens, top_p, temperature)
        root = max(root.children, key=lambda c: (c.visits, c.mean if c.visits else 0.0, c.prior))
        read = [branch for branch in read if branch.tokens[:len(root.branch.tokens)] == root.branch.tokens]
        trace.append([root.branch])
    if root.branch.reward is None:                          # no simulation came to the last token
        _, rewards = yield Ask(reward=[root.branch])
        rewarded([root.branch], rewards)
    return root.branch


@dataclass(eq=False)
class Choice:
    """A node of mcts: a branch, the policy's probability of its last token, and what came of it."""
    branch: Branch
    prior: float = 1.0
    visits: int = 0
    value: float = 0.0                           # the sum over its visits of P(safe) = sigmoid(R) at the leaf
    children: list = field(default_factory=list)

    mean = property(lambda self: self.value / self.visits)

    def puct(self, child):
        """Mean value (before the first visit, the mean here) + exploration, in proportion to the prior."""
        mean = child.mean if child.visits else self.mean
        return mean + MCTS_EXPLORATION * child.prior * math.sqrt(self.visits) / (1 + child.visits)


def simulate(policy, root, read, max_new_tokens, min_new_tokens, top_p, temperature):
    """One simulation of mcts. Go down by the highest PUCT to a leaf. Its children are the policy's nucleus
    (priors: the probabilities). Add the guard's P(safe) of the leaf to all nodes on the path. read: the
    branches read so far."""
    path = [root]
    while path[-1].children:
        path.append(max(path[-1].children, key=path[-1].puct))
    leaf, branch = path[-1], path[-1].branch
    if branch.reward is None:                         # else a leaf that nothing can follow, come to once more
        open_ended = not branch.finished and len(branch.tokens) < max_new_tokens
        hidden, rewards = yield Ask(policy=[branch] if open_ended else [], reward=[branch], keep=read)
        rewarded([branch], rewards)
        read.append(branch)
        if open_ended:
            logits = next_logits(policy, hidden, len(branch.tokens), min_new_tokens)
            p = probabilities(logits, temperature)[0]
            inside = nucleus(p, top_p)
            priors = (p[inside] / p[inside].sum()).tolist()
            leaf.children = [Choice(extend(policy, branch, token), prior)
                             for token, prior in zip(inside.tolist(), priors)]
    for choice in path:
        choice.visits += 1
        choice.value += 0.5 + 0.5 * math.tanh(branch.reward / 2)        # sigmoid, which cannot overflow so


def extend(policy, branch, token, log_p=0.0):
    """The branch with one token more, whose log-probability is log_p; end-of-sequence finishes it."""
    finished = token in policy.config.eos_token_ids
    return Branch(branch.tokens + [token], None, finished, branch, branch.log_prob + log_p)


def rewarded(branches, rewards):
    """The branches, each with its reward: (m,). Raises BadInput for rewards that are not numbers."""
    for branch, reward in zip(branches, check_finite(rewards, "the reward model gives rewards").tolist()):
        branch.reward = reward
    return branches


def next_logits(policy, hidden, length, min_new_tokens):
    """The policy's scores of the next token, in float32 at least: (n, d) -> (n, V). End-of-sequence has −∞
    while the replies' length is below min_new_tokens. Raises BadInput for scores that are not numbers."""
    logits = policy.logits(hidden)
    check_finite(logits.amax(-1), f"{policy.config.name} gives scores")       # amax is quick, and keeps a nan
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if length < min_new_tokens:
        logits[:, list(policy.config.eos_token_ids)] = -math.inf
    return logits


def probabilities(logits, temperature):
    """softmax(logits / temperature): (n, V) -> (n, V). At temperature 0, a row's best token has all of it."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits / temperature).softmax(-1)


def nucleus(p, top_p):
    """The paper's Eq. 2: the most likely tokens, as long as the mass *before* a token is below top_p (with
    top_p 1, all that are possible): ids, most likely first, equal ones by id. p: probabilities (V,). (Of
    tokens exactly as likely as the last one, those with higher ids are outside; Eq. 2 would have them too.)

    Sorting 50,000 numbers to find a handful is slow: the largest few are looked at first, and more of them
    only while they do not hold enough mass. All tokens as likely as the last of them are sorted too."""
    limit = top_p if top_p < 1 else math.inf      # the sum of all may be rounded to 1 before the last of them
    k = 64
    while k < len(p):
        top = p.topk(k).values
        if top.cumsum(0)[-2] >= limit:                                      # the mass before the last of them
            break
        k *= 8
    threshold = top[-1] if k < len(p) else 0.0
    tokens = ((p >= threshold) & (p > 0)).nonzero().squeeze(-1)                 # ascending ids
    values, order = p[tokens].sort(descending=True, stable=True)
    return tokens[order[values.cumsum(0) - values < limit]]


def candidates(logits, unseen, top_p, temperature):
    """Which tokens may follow which of n sequences: rows (m,) and tokens (m,), by row, then most likely
    first, and which of them are fallbacks, bool (m,). A row has its nucleus without unseen tokens or, if all
    are unseen, one fallback: the seen token with the highest logit. logits: (n, V), unseen: bool (V,), or
    None where no token is. Raises BadInput when no seen token is possible."""
    rows, tokens, fallbacks = [], [], []
    for i, p in enumerate(probabilities(logits, temperature)):
        inside = nucleus(p, top_p)
        if unseen is not None:
            inside = inside[~unseen[inside]]
        fallback = len(inside) == 0
        if fallback:
            seen = logits[i].masked_fill(unseen, -math.inf)
            inside = seen.argmax(keepdim=True)
            if seen[inside] == -math.inf:
                raise BadInput("the reward model has not seen any token that could come next")
        rows.append(torch.full_like(inside, i))
        tokens.append(inside)
        fallbacks.append(torch.full_like(inside, fallback, dtype=torch.bool))
    return torch.cat(rows), torch.cat(tokens), torch.cat(fallbacks)


def draw_tokens(p, top_p, count, generator):
    """`count` different ids of the nucleus (at most all), drawn in proportion to p: probabilities (V,)."""
    tokens = nucleus(p, top_p)
    drawn = torch.multinomial(p[tokens].cpu(), min(count, len(tokens)), generator=generator)
    return tokens[drawn.to(tokens.device)].tolist()


def sample_replies(policy, n, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """Asks for n independent replies, each token drawn from the nucleus: the last frontier of `trace`."""
    generator = torch.Generator().manual_seed(seed)
    branches = [Branch() for _ in range(n)]
    for length in range(max_new_tokens):
        growing = [branch for branch in branches if not branch.finished]
        if not growing:
            break
        hidden, _ = yield Ask(policy=growing)
        rows = iter(probabilities(next_logits(policy, hidden, length, min_new_tokens), temperature))
        drawn = lambda: draw_tokens(next(rows), top_p, 1, generator)[0]
        branches = [branch if branch.finished else extend(policy, branch, drawn()) for branch in branches]
        trace.append(branches)


class Method(NamedTuple):
    search: object                  # the function
    reward_model: str | None        # the kind of reward model that it takes: "guard", "mrm" or None
    what: str                       # what it does, for --help


# A search is known to all commands by its line here.
SEARCHES = {
    "none": Method(none, None, "no defence: greedy decoding, or sampling"),
    "best_of_n": Method(best_of_n, "guard", "samples N replies, keeps the one that the guard likes best"),
    "beam": Method(beam, "guard", "at each token, keeps the N sequences with the highest reward"),
    "rebase": Method(rebase, "guard", "at each token, shares out N expansions by reward"),
    "deal": Method(deal, "guard", "looks ahead greedily from the N likeliest tokens"),
    "mcts": Method(mcts, "guard", "Monte-Carlo tree search with PUCT, N simulations a token"),
    "saffron": Method(saffron, "mrm", "the paper's: one call of the MRM scores all next tokens"),
    "saffron_guard": Method(saffron, "guard", "the same, with a call of the guard for each candidate"),
}


def describe():
    """What the searches do, for --help."""
    return "searches:\n" + "\n".join(f"  {name:14} {what}{f' (asks the {kind})' if kind else ''}"
                                     for name, (_, kind, what) in SEARCHES.items())
