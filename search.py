"""
SAFFRON's search, on tries: with beta 0 the frontiers of saffron.py, with each token computed once.

    result = saffron(policy, mrm, prompt, Options(width=4, max_new_tokens=50))
    result.tokens, result.text, result.reward, result.finished, result.stats, result.trace

Given a list of prompts, it returns a list of results. baselines.py has the field's other searches.

How to read a search. It is written as a generator of its steps for one prompt; the decorator `search_with`
makes of it the function called above. It asks for Branches to be read, and is answered by name:

    answer = yield Ask(policy=growing, reward=children, keep=earlier)

1. engine.py puts the new tokens into the tries of policy and reward model. All that is new is read at once.
2. answer.policy_hidden: the policy's final hidden states after the n branches of `growing`, (n, d). Of the m
   branches of `children`, a guard gives answer.rewards, R (m,), and an MRM answer.mrm_hidden, (m, d), which
   `child_rewards` turns into M(s)_a. What was not asked for is None.
3. A model that is asked forgets all branches but those asked for now, those in `keep`, and what they began
   as. Name in `keep` what you go on from later. A model that is not asked forgets nothing.
4. Append each frontier, a list of branches, to `trace`. Return the branch that won. The smallest search:

    @search_with(None)
    def greedy(policy, reward_model, options, trace):
        branch = Branch()
        while len(branch.tokens) < options.max_new_tokens and not branch.finished:
            answer = yield Ask(policy=[branch])
            branch = extend(policy, branch, policy.logits(answer.policy_hidden)[0].argmax().item())
            trace.append([branch])
        return branch

Shapes: n sequences, m candidates, d = hidden_size, V = vocab_size.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch

from engine import Ask, search_with
from plumbing.errors import BadInput, check_finite

NO_REPEAT = 4                   # with beta: no run of so many tokens may come twice in a reply


@dataclass(eq=False)
class Branch:
    """A reply under way: a node of the search tree."""
    tokens: list = field(default_factory=list)      # reply tokens, end-of-sequence included
    reward: float | None = None                 # R of it, or what M predicted, without beta (deal: its value)
    finished: bool = False                          # whether its last token is end-of-sequence
    parent: "Branch" = field(default=None, repr=False)      # the branch without the last token
    log_prob: float | None = None                   # log π of all its tokens, where the search adds it up
    fallback: bool = False                          # whether its last token stands for an unseen nucleus


@search_with("mrm", "guard")
def saffron(policy, reward_model, options, trace):
    """The paper's Saffron-1, as in saffron.py. What is added: beta, and a guard in place of the MRM.
    Deterministic; temperature only shapes the nucleus.

    A step takes the tokens a of the policy's nucleus that are not in V_unseen as candidates of each
    unfinished sequence s (Eq. 2 and 7). If these are none, the likeliest seen token stands in, as a fallback.
    Of the sequences s·a, it keeps the `width` ones with the highest M(s)_a (Eq. 3); equal ones by frontier
    order, then by the policy's probability. Fallbacks only fill places that are left free.

    beta > 0, which is not in the paper, ranks by M(s)_a + beta · log π(s·a), π(s·a) being the policy's
    probability of the whole reply so far: of replies that are about equally safe, the likelier one. (This is
    reward maximization with a KL penalty towards the policy.) The likeliest replies run in circles (Holtzman
    et al. 2020, arXiv 1904.09751); so with beta > 0 no NO_REPEAT tokens in a row come twice (Paulus et al.
    2017, arXiv 1705.04304), unless nothing else is left.

    With a guard in place of the MRM, it asks for R(s·a) of each candidate: the price that the MRM saves."""
    multifurcation = reward_model.kind == "mrm"
    frontier = [Branch(log_prob=0.0)]
    for length in range(options.max_new_tokens):
        finished = [branch for branch in frontier if branch.finished]
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break

        # 1. Policy and MRM read each unfinished sequence s once.
        answer = yield Ask(policy=growing, reward=growing if multifurcation else [])
        logits = next_logits(policy, answer.policy_hidden, length, options.min_new_tokens)       # (n, V)

        # 2. The candidates s·a, each with log π(s·a).
        unseen = reward_model.unseen if multifurcation else None
        rows, tokens, fallbacks = candidates(logits, unseen, options.top_p, options.temperature)
        log_p = logits[rows, tokens] - logits.logsumexp(-1)[rows]                       # log π(a | s): (m,)
        children = []
        columns = (rows.tolist(), tokens.tolist(), log_p.tolist(), fallbacks.tolist())
        for row, token, log_probability, fallback in zip(*columns):
            s = growing[row]
            children.append(extend(policy, s, token, s.log_prob + log_probability, fallback))

        # 3. Their rewards: of an MRM these entries M(s)_a alone, of a guard R(s·a).
        if multifurcation:
            rewards = reward_model.child_rewards(answer.mrm_hidden[rows], tokens)       # (m,)
        else:
            answer = yield Ask(reward=children)
            rewards = answer.rewards                                                    # (m,)
        rewarded(children, rewards)

        # 4. The next frontier.
        frontier = best(finished, children, options.width, options.beta)
        trace.append(frontier)
    return frontier[0]


def best(finished, children, width, beta):
    """The next frontier, ranked by reward + beta · log_prob (equal ones keep their order). Take the best
    `width` children; with beta > 0 skip those that repeat themselves, unless all do. Fallbacks come last, and
    take only places that finished and regular ones leave free. Finished ones come first: they are never
    dropped for unfinished ones. The first `width` stay."""
    def rank(branch):
        return branch.fallback, -(branch.reward + beta * branch.log_prob)       # the lowest is first

    def place(branch):
        return not branch.finished, rank(branch)

    ranked = sorted(children, key=rank)                                                 # stable
    fresh = (branch for branch in ranked if not beta or not repeats_its_end(branch.tokens))
    kept = list(itertools.islice(fresh, width)) or ranked[:width]
    regular = sum(not branch.fallback for branch in kept)
    kept = kept[:max(regular, width - len(finished))]
    return sorted(finished + kept, key=place)[:width]


def repeats_its_end(tokens, n=NO_REPEAT):
    """Whether the last n tokens stood in a row somewhere before."""
    return any(tokens[i:i + n] == tokens[-n:] for i in range(len(tokens) - n))


def extend(policy, branch, token, log_prob=None, fallback=False):
    """The branch with one token more; end-of-sequence finishes it."""
    finished = token in policy.config.eos_token_ids
    return Branch(branch.tokens + [token], None, finished, branch, log_prob, fallback)


def rewarded(branches, rewards):
    """The branches, now with their rewards: (m,). Raises BadInput for rewards that are not finite."""
    check_finite(rewards, "the reward model gives rewards")
    for branch, reward in zip(branches, rewards.tolist()):
        branch.reward = reward
    return branches


def next_logits(policy, hidden, length, min_new_tokens):
    """The policy's logits of the next token, in float32 at least: (n, d) -> (n, V). End-of-sequence has −∞
    while the replies' length is below min_new_tokens. Raises BadInput where the highest is not finite."""
    logits = policy.logits(hidden)
    check_finite(logits.amax(-1), f"{policy.config.name} gives logits")       # amax is quick, and keeps a nan
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
