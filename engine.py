"""
How searches run: on tries, many prompts side by side, all of it counted.

A search is a generator: it yields an Ask and is sent an Answer (search.py shows one). `search_with` makes a
function of it, `lockstep` runs it, a `Reader` stands between it and a model's trie.

Shapes: n sequences, m candidates, d = hidden_size.
"""

import functools
import time
from dataclasses import dataclass, replace

import torch

from trie_cache import TrieCache, compute


@dataclass
class Options:
    """What a search is asked for; each search uses what it needs. The commands have the same defaults."""
    width: int = 4                      # N: sequences of a frontier (baselines.SEARCHES has other meanings)
    max_new_tokens: int = 50            # the most tokens of a reply, its prefill not counted
    min_new_tokens: int = 16            # the fewest: so long, end-of-sequence has probability 0
    top_p: float = 0.8                  # the probability mass of a nucleus: above 0, at most 1
    temperature: float | None = None    # logits are divided by it; 0: greedy; None: 0 for `none`, else 1
    beta: float = 0.05                  # saffron: the weight of log π beside the reward; 0: as in the paper
    seed: int = 0                       # of random draws

    def __post_init__(self):
        assert min(self.width, self.max_new_tokens) >= 1, "width and max_new_tokens must be at least 1"
        assert 0 < self.top_p <= 1, "top_p must be above 0 and at most 1"
        assert min(self.min_new_tokens, self.beta, self.temperature or 0) >= 0, "an option is below 0"


@dataclass
class Ask:
    """What a search wants read next: lists of branches."""
    policy: list = ()                   # by the policy
    reward: list = ()                   # by the reward model
    keep: list = ()                     # not read now, but not to be forgotten: it is gone on from later


@dataclass
class Answer:
    """What a search is sent for an Ask. What was not asked for is None."""
    policy_hidden: torch.Tensor | None = None       # the policy's final hidden states of Ask.policy: (n, d)
    mrm_hidden: torch.Tensor | None = None          # those of an MRM, of Ask.reward: (n, d)
    rewards: torch.Tensor | None = None             # or a guard's R of Ask.reward: (n,)


@dataclass
class Stats:
    """What a search cost."""
    policy_calls: int = 0               # sequences asked for, however many share a forward pass
    reward_calls: int = 0
    tokens_computed: int = 0            # tokens that went through a model, policy and reward model together
    tokens_cached: int = 0              # tokens of requested sequences that a trie had already
    flops: int = 0                      # of both models, without the reward's head (see Reader.flops)
    seconds: float = 0.0                # from the start of all searches of its list to the end of this one
    peak_kv_bytes: int = 0              # keys and values in the tries, at their most
    unshared_kv_bytes: int = 0          # the same if each sequence had kept a copy of its own


@dataclass
class Result:
    tokens: list                        # the reply, without the prefill
    text: str                           # "" when the policy has no vocabulary
    reward: float | None                # of the reply, as the search saw it (see Branch); None for `none`
    finished: bool                      # whether it ends with end-of-sequence
    stats: Stats
    trace: list                         # trace[t]: the frontier after t + 1 steps, a list of Branches


@dataclass
class Search:
    """A search for one prompt, under way."""
    steps: object                       # the generator
    trace: list                         # to which it appends its frontiers
    readers: list                       # the policy's Reader and, where there is one, the reward model's
    answer: Answer | None = None        # what it is sent next
    result: Result | None = None        # when it is over


def search_with(*kinds, temperature=1.0):
    """Decorator: make a search of a generator of its steps. kinds: which reward models it takes, of "guard",
    "mrm" and None. temperature: the search's default. The search takes a prompt, or a list of prompts, which
    go on in lockstep. Each has tries of its own: but for rounding, time and errors, each goes as if alone."""
    def decorate(steps):
        @functools.wraps(steps)
        @torch.no_grad()
        def search(policy, reward_model, prompts, options=Options(), watch=None):
            kind = getattr(reward_model, "kind", None)
            assert kind in kinds, f"{steps.__name__} takes {kinds} as its reward model, not {kind}"
            if options.temperature is None:
                options = replace(options, temperature=temperature)
            searches = []
            for prompt in prompts if isinstance(prompts, list) else [prompts]:
                trace = []
                readers = [Reader(policy, prompt.policy_tokens(policy.template))]
                if reward_model is not None:
                    readers.append(reward_model.reader(prompt))
                searches.append(Search(steps(policy, reward_model, options, trace), trace, readers))
            results = lockstep(policy, reward_model, searches, watch)
            return results if isinstance(prompts, list) else results[0]
        return search
    return decorate


def lockstep(policy, reward_model, searches, watch=None):
    """The Results of searches for several prompts. In a round, each search goes on to the next thing that it
    wants read; then all of that is read at once. watch: called with each Search after each of its rounds."""
    started = time.perf_counter()
    shared = getattr(reward_model, "shared_pass", None)
    under_way = searches
    while under_way:
        # 1. Each search says what it wants read next, or is over.
        for search in under_way:
            try:
                ask = search.steps.send(search.answer)
            except StopIteration as end:
                search.result = result_of(policy, search, end.value, time.perf_counter() - started)
                continue
            for reader in search.readers:
                reader.ask(ask.policy if reader.gives == "policy_hidden" else ask.reward, ask.keep)
        under_way = [search for search in under_way if search.result is None]
        # 2. The models read it, each in a pass of its own, or in one where plumbing/shared.py joins them.
        tries = [reader.trie for search in under_way for reader in search.readers if reader.trie]
        if shared and policy in shared.llamas:
            compute(shared, tries)
        else:
            for model in dict.fromkeys(trie.model for trie in tries):
                compute(model, [trie for trie in tries if trie.model is model])
        # 3. The answers go back.
        for search in under_way:
            search.answer = Answer(**{reader.gives: reader.answer() for reader in search.readers})
            if watch:
                watch(search)
    return [search.result for search in searches]


def result_of(policy, search, reply, seconds):
    """The Result of a search that is over; reply: the branch that won."""
    text = policy.tokenizer.decode(reply.tokens) if policy.tokenizer else ""
    stats = Stats(seconds=seconds)
    for reader in search.readers:
        if reader.gives == "policy_hidden":
            stats.policy_calls = reader.calls
            stats.flops += 2 * reader.calls * policy.config.hidden_size * policy.config.vocab_size  # its head
        else:
            stats.reward_calls = reader.calls
        if reader.trie:                                 # a guard of one's own reads without
            stats.flops += reader.flops
            stats.tokens_computed += reader.trie.computed
            stats.tokens_cached += reader.trie.cached
            stats.peak_kv_bytes += reader.trie.bytes_of(reader.trie.used)
            stats.unshared_kv_bytes += reader.trie.bytes_of(reader.unshared_slots)
    return Result(reply.tokens, text, reply.reward, reply.finished, stats, search.trace)


class Reader:
    """One model's side of one prompt's search: its trie, the tokens before the reply, and its cost. gives:
    the field of Answer that it fills. head: maps final hidden states to that (by default they are it)."""

    def __init__(self, llama, context, suffix=(), gives="policy_hidden", head=torch.nn.Identity()):
        self.trie = TrieCache(llama)
        self.context = context
        self.suffix = list(suffix)                          # read after each sequence: a Llama Guard has one
        self.gives = gives
        self.head = head
        self.nodes = {}                                     # the trie's node of each branch that it has
        self.asked = []                                     # the nodes asked for last
        self.given_back = []                                # branches that were forgotten then
        self.calls = 0
        self.unshared_slots = 0

    def ask(self, branches, keep=()):
        """Ask about context + reply + suffix of n branches, for the next `compute` to read. What is on no
        path to them, nor to one of `keep`, is forgotten. Without branches, nothing is forgotten."""
        self.asked = []
        self.given_back = []
        if not branches:
            return
        starts = [self.nearest(branch) for branch in branches]          # (node, tokens after it) of each
        self.trie.prune([node for node, _ in starts] + [self.nearest(branch)[0] for branch in keep])
        self.given_back = [branch for branch, node in self.nodes.items() if node.slot is None]
        for branch in self.given_back:
            del self.nodes[branch]
        self.asked = [self.trie.insert(node, tokens + self.suffix) for node, tokens in starts]
        for branch, node in zip(branches, self.asked):
            self.remember(branch, node)
        self.calls += len(branches)
        copies = self.asked + [self.nearest(branch)[0] for branch in keep]
        self.unshared_slots = max(self.unshared_slots, sum(node.depth for node in copies))

    def remember(self, branch, node):
        """Note the nodes of a branch and of its ancestors; `node` ends its path."""
        for _ in self.suffix:                               # up to the reply's end: nothing follows a suffix
            node = node.parent
        while branch is not None and branch not in self.nodes:
            self.nodes[branch] = node
            branch = branch.parent
            node = node.parent

    def nearest(self, branch):
        """(the node of the longest known beginning of a branch, the tokens from there on)."""
        known = branch
        while known is not None and known not in self.nodes:
            known = known.parent
        if known is None:
            return self.trie.root, self.context + branch.tokens
        return self.nodes[known], branch.tokens[len(known.tokens):]

    def answer(self):
        """What was asked for, when it is computed: (n, ...), or None."""
        return self.head(self.trie.hidden_at(self.asked)) if self.asked else None

    @property
    def flops(self):
        """FLOPs so far (a multiply-add is two): 2 · linear weights with LoRA · tokens + 4 · layers · heads ·
        head_dim · pairs of a token and one on its path. `result_of` adds the policy's head."""
        config = self.trie.model.config
        lora = sum(p.numel() for name, p in self.trie.model.named_parameters() if "lora_" in name)
        a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 2 * (config.linear_params + lora) * self.trie.computed + a_pair * self.trie.attended
