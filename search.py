"""
Searching for a safe reply: each method is one function, all with the same signature and the same result.

    none        no defence: greedy decoding, or sampling
    best_of_n   sample N replies, keep the one that the guard likes best
    saffron     tree search steered by a multifurcation reward model (Qiu et al. 2025, arXiv 2506.06444)

    result = saffron(policy, mrm, prompt, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8)
    result.tokens, result.text, result.reward, result.finished, result.stats, result.trace

Shapes: n sequences, V = vocab_size.
"""

import math
import time
from dataclasses import dataclass, field

import torch

from model import BadInput
from trie_cache import TrieCache


@dataclass
class Branch:
    """A reply under way: a node of the search tree."""
    tokens: list = field(default_factory=list)      # reply tokens, end-of-sequence included
    reward: float | None = None                     # what the search's reward model says of it
    finished: bool = False                          # whether its last token is end-of-sequence


@dataclass
class Stats:
    """What a search cost. A call is one sequence asked for, also where many are computed in one forward pass."""
    policy_calls: int = 0
    reward_calls: int = 0
    tokens_computed: int = 0            # tokens that went through a model, policy and reward model together
    tokens_cached: int = 0              # tokens of requested sequences that a trie gave without computing them
    flops: int = 0                      # multiply-adds count as two
    seconds: float = 0.0
    peak_kv_bytes: int = 0              # keys and values of the tries, at their largest
    unshared_kv_bytes: int = 0          # the same if each sequence had kept a copy of its own


@dataclass
class Result:
    tokens: list                        # the reply, without the prefill
    text: str                           # the same as text; empty when the policy has no vocabulary
    reward: float | None                # the reward that the search chose it by; None for method none
    finished: bool
    stats: Stats
    trace: list                         # trace[t]: the frontier after t + 1 steps, a list of Branches


class Reader:
    """One model's side of a search: its trie, the tokens that stand before the reply, and what it has cost."""

    def __init__(self, llama, context):
        self.trie, self.context = TrieCache(llama), context
        self.calls = self.head_flops = self.unshared_slots = 0

    def read(self, replies, outputs):
        """h(context + reply) of n replies: (n, d). `outputs`: how wide the head is that will read them, which is
        counted here too."""
        self.calls += len(replies)
        self.head_flops += 2 * len(replies) * self.trie.model.config.hidden_size * outputs
        sequences = [self.context + reply for reply in replies]
        self.unshared_slots = max(self.unshared_slots, sum(map(len, sequences)))
        return self.trie(sequences)

    def retain(self, branches):
        """Forget all but what is needed to go on with the unfinished ones of these branches."""
        self.trie.retain([self.context + branch.tokens for branch in branches if not branch.finished])

    @property
    def flops(self):
        """FLOPs so far, where a multiply-add counts as two:
        2 · linear weights · tokens + 4 · layers · heads · head_dim · (query, key) pairs + 2 · d · outputs · head rows.
        """
        config = self.trie.model.config
        a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 2 * config.linear_params * self.trie.computed + a_pair * self.trie.attended + self.head_flops


def check(policy, reward_model, prompt, width, max_new_tokens, min_new_tokens, top_p, temperature, beta, seed):
    """Raises BadInput for a value outside its range, a prompt too long for a model, or two vocabularies."""
    for name, value, ok, allowed in (
            ("width", width, width >= 1, "at least 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", min_new_tokens, min_new_tokens >= 0, "at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
            ("temperature", temperature, temperature == 0 or 0.01 <= temperature <= 100, "0, or from 0.01 to 100"),
            ("beta", beta, 0 <= beta <= 100, "from 0 to 100"),
            ("seed", seed, 0 <= seed < 2 ** 63, "at least 0 and below 2^63")):
        if not ok:
            raise BadInput(f"{name} is {value}, but it must be {allowed}")
    readers = [(policy, prompt.policy_tokens(policy.template))]
    if reward_model is not None:
        readers.append((reward_model.llama, prompt.reward_tokens(reward_model.template)))
        check_vocabulary(policy, reward_model.llama)
    for llama, context in readers:
        limit = llama.config.max_position_embeddings
        if len(context) + max_new_tokens > limit:
            raise BadInput(f"the prompt takes {len(context)} tokens and the reply may take {max_new_tokens} "
                           f"(max_new_tokens), but {llama.config.name} reads at most {limit} together")


def check_vocabulary(policy, other):
    """Raises BadInput unless both Llamas have the same vocabulary, which reward models need to read the policy's
    tokens as they are."""
    if policy.config.vocab_size != other.config.vocab_size or (
            policy.tokenizer and other.tokenizer and policy.tokenizer.fingerprint != other.tokenizer.fingerprint):
        raise BadInput(f"the policy {policy.config.name} and the reward model on {other.config.name} have different "
                       "vocabularies; they must share one")


# ---------------------------------------------------------------------------------------------------------------
# distributions over the next token

def next_logits(policy, hidden, length, min_new_tokens):
    """The policy's scores of the next token, (n, d) -> (n, V), in float32 at least. While the replies (all of
    `length` tokens) are shorter than min_new_tokens, end-of-sequence has the score -inf."""
    logits = policy.logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if length < min_new_tokens:
        logits[:, list(policy.config.eos_token_ids)] = -math.inf
    return logits


def probabilities(logits, temperature):
    """softmax(logits / temperature): (V,) -> (V,). At temperature 0, the best token has all of it."""
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    return (logits / temperature).softmax(-1)


def nucleus(p, top_p):
    """The smallest set of most likely tokens whose mass *before* each token is below top_p: ids, most likely first,
    equal ones by id. p: probabilities (V,).

    Sorting 50,000 numbers to find a handful is slow: the largest few are looked at first, and more of them only
    while they do not hold enough mass. All tokens as likely as the last of them come along, so ties are complete.
    """
    k = 64
    while k < len(p):
        top = p.topk(k).values
        if top.cumsum(0)[-2] >= top_p:                                          # the mass before the last of them
            break
        k *= 8
    threshold = top[-1] if k < len(p) else 0.0
    tokens = (p >= threshold).nonzero().squeeze(-1)                             # ascending ids
    values, order = p[tokens].sort(descending=True, stable=True)
    inside = (values.cumsum(0) - values < top_p) & (values > 0)                 # rounding may keep the sum below 1
    return tokens[order[inside]]


# ---------------------------------------------------------------------------------------------------------------
# the searches

def none(policy, reward_model, prompt, *, width=1, max_new_tokens=50, min_new_tokens=16, top_p=0.8,
         temperature=0.0, beta=0.0, seed=0):
    """No defence: one reply, greedy at temperature 0, else sampled. width, beta and the reward model are not
    used."""
    check(policy, None, prompt, width, max_new_tokens, min_new_tokens, top_p, temperature, beta, seed)
    started = time.perf_counter()
    reader = Reader(policy, prompt.policy_tokens(policy.template))
    trace = sample(policy, reader, 1, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    return finish(policy, trace[-1][0], trace, reader, None, started)


def best_of_n(policy, guard, prompt, *, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8,
              temperature=1.0, beta=0.0, seed=0):
    """Sample `width` replies independently, in one trie; the one with the highest guard reward R(reply)
    wins. beta is not used."""
    check(policy, guard, prompt, width, max_new_tokens, min_new_tokens, top_p, temperature, beta, seed)
    started = time.perf_counter()
    reader = Reader(policy, prompt.policy_tokens(policy.template))
    rewards = Reader(guard.llama, prompt.reward_tokens(guard.template))
    trace = sample(policy, reader, width, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    branches = trace[-1]
    hidden = rewards.read([branch.tokens for branch in branches], outputs=1)
    for branch, reward in zip(branches, guard.rewards(hidden).tolist()):
        branch.reward = reward
    return finish(policy, max(branches, key=lambda branch: branch.reward), trace, reader, rewards, started)


def saffron(policy, mrm, prompt, *, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8,
            temperature=1.0, beta=0.0, seed=0):
    """Tree search with a multifurcation reward model (the paper's Saffron-1). Deterministic: seed is not used.

    A step asks the policy and the MRM once for each unfinished sequence s of the frontier (all in one forward pass
    each), takes the tokens a of the policy's nucleus as candidates, and keeps the `width` sequences s·a with the
    highest M_cons(s)_a; equal ones by frontier order, then by the policy's probability. One that ends is finished:
    it stays, and stands before the unfinished. The first of the last frontier is the reply.

    beta > 0, which is not in the paper, ranks by M_cons(s)_a + beta · log π(a | s), π the policy: where many tokens
    are about equally safe, what the policy would say decides, and the reply stays fluent.
    """
    check(policy, mrm, prompt, width, max_new_tokens, min_new_tokens, top_p, temperature, beta, seed)
    started = time.perf_counter()
    reader = Reader(policy, prompt.policy_tokens(policy.template))
    rewards = Reader(mrm.llama, prompt.reward_tokens(mrm.template))
    frontier, trace = [Branch()], []
    for length in range(max_new_tokens):
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        replies = [branch.tokens for branch in growing]
        hidden = reader.read(replies, policy.config.vocab_size)                         # (n, d)
        logits = next_logits(policy, hidden, length, min_new_tokens)                    # (n, V)
        m_cons = mrm.conservative_rewards(rewards.read(replies, policy.config.vocab_size))      # (n, V)
        if beta:
            m_cons = m_cons + beta * logits.log_softmax(-1)
        pool = [(reward, branch, token) for branch, row, r in zip(growing, logits, m_cons)
                for token, reward in candidates(row, r, top_p, temperature)]
        pool.sort(key=lambda candidate: -candidate[0])          # stable: ties stay in frontier and nucleus order
        best = [extend(policy, branch, token, reward) for reward, branch, token in pool[:width]]
        frontier = [branch for branch in frontier if branch.finished] + best
        frontier = sorted(frontier, key=lambda branch: (not branch.finished, -branch.reward))[:width]
        trace.append(frontier)
        reader.retain(frontier)
        rewards.retain(frontier)
    return finish(policy, frontier[0], trace, reader, rewards, started)


def candidates(logits, m_cons, top_p, temperature):
    """The (token, reward) pairs of a nucleus, most likely first, without unseen tokens, whose reward is -inf. If
    all of the nucleus is unseen: the most likely seen token. logits, m_cons: (V,). Raises BadInput when there is none:
    an MRM that saw end-of-sequence only."""
    tokens = nucleus(probabilities(logits, temperature), top_p)
    tokens = tokens[m_cons[tokens] > -math.inf]
    if len(tokens) == 0:
        tokens = logits.masked_fill(m_cons == -math.inf, -math.inf).argmax(keepdim=True)
        if logits[tokens] + m_cons[tokens] == -math.inf:
            raise BadInput("the MRM has not seen any token that could come next; train it on more text")
    return zip(tokens.tolist(), m_cons[tokens].tolist())


def sample(policy, reader, n, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """n independent replies, each token drawn from the nucleus. Returns the trace; its last element holds them."""
    generator = torch.Generator().manual_seed(seed)
    branches, trace = [Branch() for _ in range(n)], []
    for length in range(max_new_tokens):
        growing = [branch for branch in branches if not branch.finished]
        if not growing:
            break
        hidden = reader.read([branch.tokens for branch in growing], policy.config.vocab_size)
        rows = iter(next_logits(policy, hidden, length, min_new_tokens))
        branches = [branch if branch.finished else
                    extend(policy, branch, draw(probabilities(next(rows), temperature), top_p, generator))
                    for branch in branches]
        trace.append(branches)
        reader.retain(branches)
    return trace


def draw(p, top_p, generator):
    """One token of the nucleus, in proportion to its probability. p: probabilities (V,)."""
    tokens = nucleus(p, top_p)
    return tokens[torch.multinomial(p[tokens].cpu(), 1, generator=generator).item()].item()


def extend(policy, branch, token, reward=None):
    """The branch with one token more; end-of-sequence finishes it."""
    return Branch(branch.tokens + [token], reward, token in policy.config.eos_token_ids)


def finish(policy, branch, trace, reader, rewards, started):
    """The Result for the winning branch, with what both readers have cost."""
    readers = [reader, rewards] if rewards else [reader]
    total = lambda value: sum(map(value, readers))
    stats = Stats(
        policy_calls=reader.calls,
        reward_calls=rewards.calls if rewards else 0,
        tokens_computed=total(lambda r: r.trie.computed),
        tokens_cached=total(lambda r: r.trie.cached),
        flops=total(lambda r: r.flops),
        seconds=time.perf_counter() - started,
        peak_kv_bytes=total(lambda r: r.trie.peak_slots * r.trie.bytes_per_slot),
        unshared_kv_bytes=total(lambda r: r.unshared_slots * r.trie.bytes_per_slot))
    text = policy.tokenizer.decode(branch.tokens) if policy.tokenizer else ""
    return Result(branch.tokens, text, branch.reward, branch.finished, stats, trace)


SEARCHES = {"none": none, "best_of_n": best_of_n, "saffron": saffron}
