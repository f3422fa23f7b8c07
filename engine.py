"""
How searches run: on tries, many prompts side by side, both models in one forward pass, all of it counted.

A search is a generator of its steps for one prompt: search.py says how. `search_with` turns it into a
function, `lockstep` runs it, a `Reader` stands between it and a model's trie, `Backbone` lets policy and
reward model share a forward pass. Shapes: n sequences, T tokens, d = hidden_size, K = ranks of all LoRA
together.
"""

import inspect
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from files import BadInput

import torch
import torch.nn as nn
import torch.nn.functional as F

from mrm import MRM, PROJECTIONS, Bridge, Guard, LoRALinear, part_of, score, shallow_copy
from trie_cache import TrieCache, compute


@dataclass(eq=False)
class Branch:
    """A reply under way: a node of the search tree."""
    tokens: list = field(default_factory=list)      # reply tokens, end-of-sequence included
    reward: float | None = None                 # R of it, or what M predicted, without beta (deal: its score)
    finished: bool = False                          # whether its last token is end-of-sequence
    parent: "Branch" = field(default=None, repr=False)      # the branch that it has one token more than
    log_prob: float = 0.0                           # log π of all its tokens, where the search adds it up
    fallback: bool = False                          # whether its last token stands for an unseen nucleus


class Ask(NamedTuple):
    """What a search wants read next: lists of branches."""
    policy: list = ()                   # by the policy
    reward: list = ()                   # by the reward model
    keep: list = ()                     # not to be read now, but gone on from later


@dataclass
class Stats:
    """What a search cost. A call is one sequence asked for, however many share a forward pass."""
    policy_calls: int = 0
    reward_calls: int = 0
    tokens_computed: int = 0            # tokens that went through a model, policy and reward model together
    tokens_cached: int = 0             # tokens of requested sequences that a trie gave without computing them
    flops: int = 0                      # both models' together; multiply-adds count as two
    policy_flops: int = 0
    reward_flops: int = 0               # the guard's or the MRM's
    seconds: float = 0.0                # from the start of all searches of its list to the end of this one
    peak_kv_bytes: int = 0              # keys and values in the tries, at their most
    unshared_kv_bytes: int = 0          # the same if each sequence had kept a copy of its own


@dataclass
class Round:
    """What one Ask did."""
    step: int                           # frontiers that stood in the trace before it
    tokens_computed: int                # by it and all earlier ones
    tokens_cached: int                  # not computed so far, because a trie had them
    given_back: list                    # branches whose slots the policy's trie gave back just before it


@dataclass
class Result:
    tokens: list                        # the reply, without the prefill
    text: str                           # the same as text; empty when the policy has no vocabulary
    reward: float | None               # of the reply, as the search saw it (see Branch); None for method none
    finished: bool
    stats: Stats
    trace: list                         # trace[t]: the frontier after t + 1 steps, a list of Branches
    rounds: list                        # a Round for each Ask


def search_with(*kinds, temperature=1.0):
    """Decorator: make a search of a generator of its steps. kinds: which reward models it takes, of "guard",
    "mrm" and None. temperature: the search's default. The search takes a prompt, or a list of prompts, which
    go on in lockstep. Each has tries of its own, so its reply and stats (but the seconds) are the same as if
    it were alone, as far as rounding allows: in bfloat16, a batch of another size may decide a draw."""
    def decorate(steps):
        named = inspect.signature(steps).parameters

        @torch.no_grad()
        def search(policy, reward_model, prompts, *, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8,
                   temperature=temperature, beta=0.0, seed=0):
            kind = "mrm" if isinstance(reward_model, MRM) else reward_model and "guard"
            if kind not in kinds:
                wanted = " or ".join(map(str, kinds))
                raise BadInput(f"{steps.__name__} takes {wanted} as its reward model, not {kind}")
            options = dict(width=width, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens,
                           top_p=top_p, temperature=temperature, beta=beta, seed=seed)
            check_options(options)
            options = {key: value for key, value in options.items() if key in named}
            several, searches = isinstance(prompts, list), []
            for prompt in prompts if several else [prompts]:
                check_prompt(policy, reward_model, prompt, max_new_tokens)
                readers, trace = [Reader(policy, prompt.policy_tokens(policy.template))], []
                if reward_model:
                    readers.append(reward_reader(reward_model, prompt))
                searches.append((steps(policy, reward_model, trace, **options), readers, trace))
            results = lockstep(policy, searches)
            return results if several else results[0]
        search.__name__, search.__doc__ = steps.__name__, steps.__doc__
        return search
    return decorate


def lockstep(policy, searches):
    """The Results of searches, each given as (generator, readers, trace). In a round, each search goes
    on to the next thing that it wants read; then all of that is read at once, for policy and reward model
    together where these differ in LoRA only."""
    started, results, rounds = time.perf_counter(), {}, [[] for _ in searches]
    tries_of = [[reader.trie for reader in readers if reader.trie] for _, readers, _ in searches]
    models = list(dict.fromkeys(trie.model for tries in tries_of for trie in tries))
    shared = Backbone(models) if len(models) == 2 and same_base(*models) else None
    answers = dict.fromkeys(range(len(searches)))     # what each search under way is sent next, at first None
    while answers:
        given_back = {}
        for i, answer in list(answers.items()):
            steps, readers, trace = searches[i]
            try:
                ask = steps.send(answer)
            except StopIteration as end:
                reply = end.value
                text = policy.tokenizer.decode(reply.tokens) if policy.tokenizer else ""
                stats = total_stats(policy, readers, time.perf_counter() - started)
                results[i] = Result(reply.tokens, text, reply.reward, reply.finished, stats, trace, rounds[i])
                del answers[i]
            else:
                given_back[i], *_ = [reader.ask(branches, ask.keep) for reader, branches in zip(readers, ask)]
        waiting = [trie for i in answers for trie in tries_of[i]]
        for model in [shared] if shared else models:
            compute(model, [trie for trie in waiting if shared or trie.model is model])
        for i in answers:
            _, readers, trace = searches[i]
            hidden, rewards, *_ = [reader.answer() for reader in readers] + [None]
            answers[i] = hidden, rewards
            total = lambda what: sum(getattr(trie, what) for trie in tries_of[i])
            rounds[i].append(Round(len(trace), total("computed"), total("cached"), given_back[i]))
    return [results[i] for i in range(len(searches))]


def total_stats(policy, readers, seconds):
    """The Stats of a search that is over, by what its readers have read; the first is the policy's."""
    counted, config = [reader for reader in readers if reader.trie], policy.config
    total = lambda value: sum(map(value, counted))
    policy_flops = readers[0].flops + 2 * readers[0].calls * config.hidden_size * config.vocab_size
    reward_flops = sum(reader.flops for reader in counted[1:])
    return Stats(
        policy_calls=readers[0].calls,
        reward_calls=sum(reader.calls for reader in readers[1:]),
        tokens_computed=total(lambda r: r.trie.computed),
        tokens_cached=total(lambda r: r.trie.cached),
        flops=policy_flops + reward_flops, policy_flops=policy_flops, reward_flops=reward_flops,
        seconds=seconds,
        peak_kv_bytes=total(lambda r: r.trie.bytes_of(r.trie.used)),
        unshared_kv_bytes=total(lambda r: r.trie.bytes_of(r.unshared_slots)))


class Reader:
    """One model's side of one prompt's search: its trie, the tokens before the reply, and its cost. head:
    maps final hidden states to the answer (by default these are the answer)."""

    def __init__(self, llama, context, suffix=(), head=lambda hidden: hidden):
        self.trie, self.context, self.suffix, self.head = TrieCache(llama), context, list(suffix), head
        self.nodes, self.asked = {}, []             # the trie's node of each branch it has; those asked for
        self.calls = self.unshared_slots = 0

    def ask(self, branches, keep=()):
        """Ask about context + reply + suffix of n branches, for the next `compute` to read. What is on no
        path to them, nor to one of `keep`, is forgotten. Returns the branches whose slots are given back."""
        self.asked = []
        if not branches:
            return []                                       # not its turn: everything is kept
        known = [self.nearest(branch) for branch in branches]           # (node, tokens after it) of each
        self.trie.keep({node for node, _ in known} | {self.nearest(branch)[0] for branch in keep})
        given_back = [branch for branch, node in self.nodes.items() if node.slot is None]
        for branch in given_back:
            del self.nodes[branch]
        self.asked = [self.trie.insert(node, tokens + self.suffix) for node, tokens in known]
        for branch, node in zip(branches, self.asked):
            self.remember(branch, node)
        self.calls += len(branches)
        copies = [*self.asked, *(self.nearest(branch)[0] for branch in keep)]
        self.unshared_slots = max(self.unshared_slots, sum(node.depth for node in copies))
        return given_back

    def remember(self, branch, node):
        """Note the nodes of a branch and of its ancestors; `node` ends its path."""
        for _ in self.suffix:                               # a side branch, on no path to anything later
            node = node.parent
        while branch is not None and branch not in self.nodes:
            self.nodes[branch] = node
            branch, node = branch.parent, node.parent

    def nearest(self, branch):
        """(the node of the longest known beginning of a branch, the tokens from there on)."""
        tokens, known = branch.tokens, branch
        while known is not None and known not in self.nodes:
            known = known.parent
        if known is None:
            return self.trie.root, self.context + tokens
        return self.nodes[known], tokens[len(known.tokens):]

    def answer(self):
        """What was asked for, when it is computed: (n, ...)."""
        return self.head(self.trie.hidden_at(self.asked))

    @property
    def flops(self):
        """FLOPs so far without the head, where a multiply-add counts as two: 2 · linear weights (with LoRA) ·
        tokens + 4 · layers · heads · head_dim · (query, key) pairs. `total_stats` adds the policy's head, 2 ·
        d · V a call. A reward is one row of a head, 2 · d, which is not counted."""
        llama, config = self.trie.model, self.trie.model.config
        lora = sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name)
        a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 2 * (config.linear_params + lora) * self.trie.computed + a_pair * self.trie.attended


class BridgeReader(Reader):
    """A Reader for a guard with another vocabulary. It encodes the whole reply each time, and goes on from
    the longest beginning that is in the trie."""

    def __init__(self, bridge, prompt):
        self.bridge, guard = bridge, bridge.guard
        context = bridge.prompt(prompt).reward_tokens(guard.template)
        super().__init__(guard.llama, context, guard.template.suffix, guard.reward)

    def remember(self, branch, node):
        """Nothing: the beginning of a text may have other tokens than the whole."""

    def nearest(self, branch):
        tokens, node, known = self.context + self.bridge.tokens(branch.tokens), self.trie.root, 0
        config = self.trie.model.config
        if len(tokens) + len(self.suffix) > config.max_position_embeddings:
            raise BadInput("prompt and reply are longer than the "
                           f"{config.max_position_embeddings} tokens that the guard {config.name} reads")
        while known < len(tokens) and tokens[known] in node.children:
            node, known = node.children[tokens[known]], known + 1
        return node, tokens[known:]


class Scorer:
    """Stands for a Reader if a guard has only `score`; the cost of that is not counted."""

    def __init__(self, guard, prompt):
        self.guard, self.prompt, self.trie, self.asked, self.calls = guard, prompt, None, [], 0

    def ask(self, branches, keep=()):
        self.asked = branches
        self.calls += len(branches)
        return []

    def answer(self):
        replies = [branch.tokens for branch in self.asked]
        return score(self.guard, self.prompt, replies) if replies else None


def reward_reader(reward_model, prompt):
    """The reward model's side of a search: an MRM answers with hidden states, a guard with rewards."""
    if isinstance(reward_model, Bridge):
        return BridgeReader(reward_model, prompt)
    if not isinstance(reward_model, (MRM, Guard)):
        return Scorer(reward_model, prompt)
    head = (lambda hidden: hidden) if isinstance(reward_model, MRM) else reward_model.reward
    template = reward_model.template
    return Reader(reward_model.llama, prompt.reward_tokens(template), template.suffix, head)


class Backbone:
    """Llamas that differ in LoRA only, as one: a pass reads the base weights once for the tokens of all. It
    is a copy of them in which each projection that some of them adapt is a SharedLinear."""

    def __init__(self, llamas):
        self.llamas, self.llama, self.linears = llamas, shallow_copy(llamas[0]), []
        self.device = self.llama.device
        lora = [[m for m in llama.modules() if isinstance(m, LoRALinear)] for llama in llamas]
        ranks = [len(ms[0].lora_A) if ms else 0 for ms in lora]
        owner = [i for i, rank in enumerate(ranks) for _ in range(rank)]
        self.owner = torch.tensor(owner, device=self.device)        # whose each of the K ranks is: (K,)
        for block, *blocks in zip(self.llama.model.layers, *(llama.model.layers for llama in llamas)):
            for name in PROJECTIONS:
                linears = [getattr(part_of(b, name), name) for b in blocks]
                if any(isinstance(linear, LoRALinear) for linear in linears):
                    self.linears.append(SharedLinear(linears, ranks))
                    setattr(part_of(block, name), name, self.linears[-1])

    def __call__(self, tokens, positions, cache):
        """As Llama's forward, with B = 1. cache: a trie_cache.Pass, whose tries say whose the tokens are."""
        reader = [self.llamas.index(trie.model) for trie in cache.tries for _ in trie.waiting]
        own = (torch.tensor(reader, device=self.device)[:, None] == self.owner).to(self.llama.dtype)  # (T, K)
        for linear in self.linears:
            linear.own = own
        return self.llama(tokens, positions, cache)


class SharedLinear(nn.Module):
    """y = x Wᵀ + (own ⊙ x Aᵀ) Bᵀ, where A and B hold the LoRA of all Llamas, zeros for those that have none
    here. own: which of the ranks are each token's, (T, K). Backbone sets it before each pass."""

    def __init__(self, linears, ranks):
        super().__init__()
        self.linear = next(linear.linear for linear in linears if isinstance(linear, LoRALinear))
        zeros, (d_out, d_in), A, B = self.linear.weight.new_zeros, self.linear.weight.shape, [], []
        for linear, rank in zip(linears, ranks):
            adapted = isinstance(linear, LoRALinear)
            A.append(linear.lora_A if adapted else zeros(rank, d_in))
            B.append(linear.scale * linear.lora_B if adapted else zeros(d_out, rank))
        self.A, self.B = torch.cat(A), torch.cat(B, dim=1)                             # (K, d_in), (d_out, K)

    def forward(self, x):                                                                   # (1, T, d_in)
        return self.linear(x) + F.linear(F.linear(x, self.A) * self.own, self.B)            # (1, T, d_out)


def same_base(a, b):
    """Whether two Llamas differ in LoRA only: one is an `add_lora` of the other, or both of a third."""
    return a.model.embed_tokens.weight is b.model.embed_tokens.weight


def check_options(options):
    """Raises BadInput for a value outside its range. options: {name: value}."""
    for name, fits, allowed in (
            ("width", lambda x: 1 <= x <= 10_000, "at least 1, and at most 10,000"),
            ("max_new_tokens", lambda x: 1 <= x <= 10 ** 6, "at least 1, and at most a million"),
            ("min_new_tokens", lambda x: x >= 0, "at least 0"),
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("temperature", lambda x: x == 0 or 0.01 <= x <= 100, "0, or from 0.01 to 100"),
            ("beta", lambda x: 0 <= x <= 100, "from 0 to 100"),
            ("seed", lambda x: 0 <= x < 2 ** 63, "at least 0 and below 2^63")):
        if options.get(name) is not None and not fits(options[name]):
            raise BadInput(f"{name} is {str(options[name])[:40]}, but it must be {allowed}")


def check_prompt(policy, reward_model, prompt, max_new_tokens):
    """Raises BadInput for too long a prompt, two vocabularies, or a policy without a chat format."""
    if policy.template is None:
        policy.tokenizer.template("chat")                   # raises BadInput: it says where one could be
    readers = [(policy, prompt.policy_tokens(policy.template))]
    if isinstance(reward_model, Bridge):
        reward_model, prompt = reward_model.guard, reward_model.prompt(prompt)
    elif isinstance(reward_model, (MRM, Guard)):
        check_vocabulary(policy, reward_model.llama, isinstance(reward_model, MRM))
    if isinstance(reward_model, (MRM, Guard)):
        template = reward_model.template
        readers.append((reward_model.llama, prompt.reward_tokens(template) + template.suffix))
    for llama, context in readers:
        limit = llama.config.max_position_embeddings
        if len(context) + max_new_tokens > limit:
            raise BadInput(f"the prompt takes {len(context)} tokens and the reply may take {max_new_tokens} "
                           f"(max_new_tokens), but {llama.config.name} reads at most {limit} together")


def check_vocabulary(policy, other, for_mrm=True):
    """Raises BadInput unless both Llamas have one vocabulary, for an MRM also heads of one size: M(s) is a
    reward for each token of the policy's. (mrm.bridged takes a guard across.)"""
    same_size = policy.config.vocab_size == other.config.vocab_size
    known = policy.vocabulary and other.vocabulary
    if known and policy.vocabulary != other.vocabulary or not same_size and (for_mrm or not known):
        raise BadInput(f"the policy {policy.config.name} and the reward model on {other.config.name} have "
                       "different vocabularies; an MRM must share the policy's. data/safety_rewards/"
                       "prepare.py --policy DIR, then train_mrm.py --objective mrm --base DIR make one; pass "
                       "it with --mrm PATH --mrm_base DIR")
