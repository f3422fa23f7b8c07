"""
Searching for a safe reply: each method is one function, all with the same signature and the same result.

    none        no defence: greedy decoding, or sampling
    best_of_n   sample N replies, keep the one that the guard likes best
    beam        beam search over tokens, steered by the guard
    rebase      reward-balanced search (Wu et al. 2024, arXiv 2408.00724)
    deal        decoding-time alignment with a look-ahead (Huang et al. 2024, arXiv 2402.06147)
    mcts        Monte-Carlo tree search with PUCT (Silver et al. 2017; for text Liu et al. 2023, arXiv 2309.15028)
    saffron     tree search steered by a multifurcation reward model (Qiu et al. 2025, arXiv 2506.06444)

    result = saffron(policy, mrm, prompt, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8)
    result.tokens, result.text, result.reward, result.finished, result.stats, result.trace

Given a list of prompts instead, a search returns a list of results, found side by side: see `side_by_side`.

Shapes: n sequences, m candidates, d = hidden_size, V = vocab_size.
"""

import inspect
import itertools
import math
import re
import time
from dataclasses import dataclass, field

import torch

from model import BadInput
from mrm import Backbone, same_base
from trie_cache import TrieCache, compute

REBASE_TEMPERATURE = 1.0        # R is the log-odds of "safe": at 1, expansions are shared in proportion to the odds
DEAL_LOOK_AHEAD, DEAL_LAMBDA = 4, 1.0
MCTS_EXPLORATION = 1.0          # P(safe), which it stands beside, is in [0, 1]
NO_REPEAT = 4                   # saffron with beta: so many tokens in a row do not come twice


@dataclass(eq=False)
class Branch:
    """A reply under way: a node of the search tree."""
    tokens: list = field(default_factory=list)      # reply tokens, end-of-sequence included
    reward: float | None = None                     # R of it, or what M predicted for it, without beta (deal: its score)
    finished: bool = False                          # whether its last token is end-of-sequence
    parent: "Branch" = field(default=None, repr=False)      # the branch that it has one token more than
    log_prob: float = 0.0                           # log π of all its tokens, where the search adds it up


@dataclass
class Stats:
    """What a search cost. A call is one sequence asked for, also where many are computed in one forward pass."""
    policy_calls: int = 0
    reward_calls: int = 0
    tokens_computed: int = 0            # tokens that went through a model, policy and reward model together
    tokens_cached: int = 0              # tokens of requested sequences that a trie gave without computing them
    flops: int = 0                      # both models' together; multiply-adds count as two
    policy_flops: int = 0
    reward_flops: int = 0               # the guard's or the MRM's
    seconds: float = 0.0
    peak_kv_bytes: int = 0              # keys and values in the tries, at their most
    unshared_kv_bytes: int = 0          # the same if each sequence had kept a copy of its own


@dataclass
class ForwardPass:
    """What the tries of a prompt did in one forward pass, and before it."""
    step: int                           # frontiers that stood in the trace before it
    tokens_computed: int                # by it and all earlier ones
    tokens_cached: int                  # not computed so far, because a trie had them
    given_back: list                    # branches whose slots the policy's trie gave back just before it


@dataclass
class Result:
    tokens: list                        # the reply, without the prefill
    text: str                           # the same as text; empty when the policy has no vocabulary
    reward: float | None                # of the reply, as the search saw it (see Branch); None for method none
    finished: bool
    stats: Stats
    trace: list                         # trace[t]: the frontier after t + 1 steps, a list of Branches
    passes: list                        # what each forward pass did, a list of ForwardPasses


class Reader:
    """One model's side of one prompt's search: its trie, the tokens that stand before the reply, and its cost. head:
    what makes the answer of final hidden states; by default they are the answer."""

    def __init__(self, llama, context, suffix=(), head=lambda hidden: hidden):
        self.trie, self.context, self.suffix, self.head = TrieCache(llama), context, list(suffix), head
        self.nodes, self.asked = {}, []                 # the trie's node of each branch it has; those asked for
        self.calls = self.unshared_slots = 0

    def ask(self, branches, keep=()):
        """Ask about context + reply + suffix of n branches. The next `compute` reads what is new of them. What is on no path
        to them, nor to one of `keep`, is forgotten: returns the branches whose slots are given back."""
        self.asked = []
        if not branches:
            return []                                       # not its turn: everything is kept
        known = [self.nearest(branch) for branch in branches]
        self.trie.keep({node for node, _ in known} | {self.nearest(branch)[0] for branch in keep})
        given_back = [branch for branch, node in self.nodes.items() if node.slot is None]
        for branch in given_back:
            del self.nodes[branch]
        self.asked = [self.trie.insert(node, tokens + self.suffix) for node, tokens in known]
        for branch, node in zip(branches, self.asked):
            for _ in self.suffix:                           # a side branch, on no path to anything later
                node = node.parent
            while branch is not None and branch not in self.nodes:
                self.nodes[branch] = node
                branch, node = branch.parent, node.parent
        self.calls += len(branches)
        copies = [*self.asked, *(self.nearest(branch)[0] for branch in keep)]
        self.unshared_slots = max(self.unshared_slots, sum(node.depth for node in copies))
        return given_back

    def nearest(self, branch):
        """(the node of the longest known beginning of a branch, the tokens from there on)."""
        tokens, known = branch.tokens, branch
        while known is not None and known not in self.nodes:
            known = known.parent
        return (self.nodes[known], tokens[len(known.tokens):]) if known else (self.trie.root, self.context + tokens)

    def answer(self):
        """What was asked for, when it is computed: (n, ...)."""
        return self.head(self.trie.states(self.asked))

    @property
    def flops(self):
        """FLOPs so far without the head, where a multiply-add counts as two:
        2 · linear weights (LoRA's included) · tokens + 4 · layers · heads · head_dim · (query, key) pairs.
        The policy's head adds 2 · d · V a call (`measure`). Of a guard's or an MRM's, no more is computed than one
        row for each reward that is asked for: 2 · d, which is not counted.
        """
        llama, config = self.trie.model, self.trie.model.config
        weights = config.linear_params + sum(p.numel() for name, p in llama.named_parameters() if "lora_" in name)
        a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 2 * weights * self.trie.computed + a_pair * self.trie.attended


class Scorer:
    """In a Reader's place, for a guard of which no more is known than `score`; what that computes is not counted."""

    trie = None

    def __init__(self, guard, prompt):
        self.guard, self.prompt, self.asked, self.calls = guard, prompt, [], 0

    def ask(self, branches, keep=()):
        self.asked = branches
        self.calls += len(branches)
        return []

    def answer(self):
        return self.guard.score(self.prompt, [branch.tokens for branch in self.asked]) if self.asked else None


def reward_reader(reward_model, prompt):
    """The reward model's side of a search: an MRM answers with hidden states, a guard with rewards."""
    if not hasattr(reward_model, "llama"):
        return Scorer(reward_model, prompt)
    template, head = reward_model.template, {} if kind_of(reward_model) == "mrm" else {"head": reward_model.rewards}
    return Reader(reward_model.llama, prompt.reward_tokens(template), template.suffix, **head)


def kind_of(reward_model):
    """ "mrm", "guard" (so is everything that does not say what it is) or None."""
    return reward_model and getattr(reward_model, "kind", "guard")


def check_options(width, max_new_tokens, min_new_tokens, top_p, temperature, beta, seed):
    """Raises BadInput for a value outside its range."""
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


def check_prompt(policy, reward_model, prompt, max_new_tokens):
    """Raises BadInput for a prompt too long for a model, or two vocabularies. reward_model: None where the search uses
    none."""
    readers = [(policy, prompt.policy_tokens(policy.template))]
    if hasattr(reward_model, "llama"):
        template = reward_model.template
        readers.append((reward_model.llama, prompt.reward_tokens(template) + template.suffix))
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


def check_numbers(values, giving):
    """Raises BadInput where a value is not a number. giving: who gives what."""
    if values.isnan().any():
        raise BadInput(f"{giving} that are not numbers; its weights, or their dtype, are to blame")


# ---------------------------------------------------------------------------------------------------------------
# distributions over the next token

def next_logits(policy, hidden, length, min_new_tokens):
    """The policy's scores of the next token, (n, d) -> (n, V), in float32 at least. While the replies (all of
    `length` tokens) are shorter than min_new_tokens, end-of-sequence has the score -inf. Raises BadInput for scores that
    are not numbers."""
    logits = policy.logits(hidden)
    check_numbers(logits.amax(-1), f"{policy.config.name} gives scores")           # a nan stays one in amax, which is quick
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if length < min_new_tokens:
        logits[:, list(policy.config.eos_token_ids)] = -math.inf
    return logits


def probabilities(logits, temperature):
    """softmax(logits / temperature): (n, V) -> (n, V). At temperature 0, the best token of a row has all of it."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return (logits / temperature).softmax(-1)


def nucleus(p, top_p):
    """The paper's Eq. 2: the most likely tokens, as long as the mass *before* a token is below top_p (with top_p 1, all
    that are possible): ids, most likely first, equal ones by id. p: probabilities (V,). (Of tokens exactly as likely as
    the last one, those with higher ids are outside; Eq. 2 would have them too.)

    Sorting 50,000 numbers to find a handful is slow: the largest few are looked at first, and more of them only
    while they do not hold enough mass. All tokens as likely as the last of them are sorted too, so that ties go by id.
    """
    limit = top_p if top_p < 1 else math.inf            # the sum of all may be rounded to 1 before the last of them
    k = 64
    while k < len(p):
        top = p.topk(k).values
        if top.cumsum(0)[-2] >= limit:                                          # the mass before the last of them
            break
        k *= 8
    threshold = top[-1] if k < len(p) else 0.0
    tokens = ((p >= threshold) & (p > 0)).nonzero().squeeze(-1)                 # ascending ids
    values, order = p[tokens].sort(descending=True, stable=True)
    return tokens[order[values.cumsum(0) - values < limit]]


# ---------------------------------------------------------------------------------------------------------------
# running searches

def side_by_side(*kinds, temperature=1.0):
    """Decorator: make a search of a generator that describes its steps for one prompt. kinds: which reward models
    it takes, of "guard", "mrm" and None. temperature: the search's default.

    The generator is called as steps(policy, reward_model, trace, **those of a search's options that it names). It yields
    two lists: the branches that the policy shall read, and those that the reward model shall, and perhaps a third:
    branches that it will go on from later. (A model that is asked forgets the paths of all others.) It is sent two answers
    (one, where there is no reward model): the final hidden states of the first list, (n, d), and of the second, of which
    a guard answers with rewards instead, (n,). It appends each frontier it comes to, a list of branches, to `trace`, and
    returns the branch that won.

    The function made of it takes a prompt, or a list of prompts, whose searches then go on in lockstep: what all of
    them want read is read in one forward pass, for policy and reward model together where these differ in LoRA only.
    Each prompt has tries of its own, so its reply and its stats (but the seconds) are the same as if it were alone, as far
    as rounding allows: in bfloat16, a batch of another size may decide a draw.
    """
    def decorate(steps):
        named = inspect.signature(steps).parameters

        @torch.no_grad()
        def search(policy, reward_model, prompts, *, width=4, max_new_tokens=50, min_new_tokens=16, top_p=0.8,
                   temperature=temperature, beta=0.0, seed=0):
            kind = kind_of(reward_model)
            if kind not in kinds:
                raise BadInput(f"{steps.__name__} takes {' or '.join(map(str, kinds))} as its reward model, not {kind}")
            options = dict(width=width, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, top_p=top_p,
                           temperature=temperature, beta=beta, seed=seed)
            check_options(**options)
            options = {key: value for key, value in options.items() if key in named}
            several, searches = isinstance(prompts, list), []
            for prompt in prompts if several else [prompts]:
                check_prompt(policy, reward_model, prompt, max_new_tokens)
                readers, trace = [Reader(policy, prompt.policy_tokens(policy.template))], []
                if reward_model:
                    readers.append(reward_reader(reward_model, prompt))
                tries = [reader.trie for reader in readers if reader.trie]
                searches.append((steps(policy, reward_model, trace, **options), readers, tries, trace))
            results = lockstep(policy, getattr(reward_model, "llama", None), searches)
            return results if several else results[0]
        search.__name__, search.__doc__, search.steps = steps.__name__, steps.__doc__, steps
        return search
    return decorate


def lockstep(policy, other, searches):
    """The Results of searches, each of which is a generator, its readers, their tries and its trace. other: the reward
    model's Llama, or None. In a round, each goes on to the next thing that it wants read; then all of that is read at
    once."""
    started, results, passes = time.perf_counter(), {}, [[] for _ in searches]
    shared = Backbone([policy, other]) if other and same_base(policy, other) else None
    answers = dict.fromkeys(range(len(searches)))           # what each search under way is sent next, at first None
    while answers:
        given_back = {}
        for i, answer in list(answers.items()):
            steps, readers, _, trace = searches[i]
            try:
                wanted = steps.send(answer)                 # (the policy's branches, the reward model's[, to be kept])
            except StopIteration as end:
                reply = end.value
                text = policy.tokenizer.decode(reply.tokens) if policy.tokenizer else ""
                results[i] = Result(reply.tokens, text, reply.reward, reply.finished, measure(policy, readers, started),
                                    trace, passes[i])
                del answers[i]
                continue
            keep = wanted[2] if len(wanted) > 2 else ()
            given_back[i] = [reader.ask(branches, keep) for reader, branches in zip(readers, wanted)][0]
        tries = [trie for i in answers for trie in searches[i][2]]
        if shared:
            compute(shared, tries)
        else:
            for llama in [policy, other]:
                compute(llama, [trie for trie in tries if trie.model is llama])
        for i in answers:
            _, readers, tries, trace = searches[i]
            answers[i] = [reader.answer() for reader in readers]
            passes[i].append(ForwardPass(len(trace), sum(trie.computed for trie in tries), sum(trie.cached for trie in tries),
                                         given_back[i]))
    return [results[i] for i in range(len(searches))]


def measure(policy, readers, started):
    """The Stats of a search that is over, by what its readers have read; the first is the policy's."""
    counted = [reader for reader in readers if reader.trie]
    total = lambda value: sum(map(value, counted))
    policy_flops = readers[0].flops + 2 * readers[0].calls * policy.config.hidden_size * policy.config.vocab_size
    reward_flops = sum(reader.flops for reader in counted[1:])
    return Stats(
        policy_calls=readers[0].calls,
        reward_calls=sum(reader.calls for reader in readers[1:]),
        tokens_computed=total(lambda r: r.trie.computed),
        tokens_cached=total(lambda r: r.trie.cached),
        flops=policy_flops + reward_flops, policy_flops=policy_flops, reward_flops=reward_flops,
        seconds=time.perf_counter() - started,
        peak_kv_bytes=total(lambda r: r.trie.used * r.trie.bytes_per_slot),
        unshared_kv_bytes=total(lambda r: r.unshared_slots * r.trie.bytes_per_slot))


# ---------------------------------------------------------------------------------------------------------------
# the searches. Below stand the steps for one prompt, with the options that they use; `side_by_side` makes of each a
# function that is called as search(policy, reward_model, prompt or list of prompts, width=..., ...).

@side_by_side("guard", "mrm", None, temperature=0.0)
def none(policy, reward_model, trace, *, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """No defence: one reply, greedy at temperature 0, else sampled. The reward model is not used."""
    yield from sample(policy, 1, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    return trace[-1][0]


@side_by_side("guard")
def best_of_n(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """Sample `width` replies independently, in one trie; the one with the highest guard reward R(reply) wins."""
    yield from sample(policy, width, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed)
    _, rewards = yield [], trace[-1]                                                    # (width,)
    return max(rewarded(trace[-1], rewards), key=lambda branch: branch.reward)


@side_by_side("guard")
def beam(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature):
    """Beam search over tokens with the guard as process reward model: of all tokens in the nuclei of all sequences, the
    `width` whose sequences have the highest R stay, finished or not. Every candidate costs a guard call, which is the
    exploration-efficiency dilemma of the paper. (saffron with a guard, at beta 0, differs in that finished ones stand first.)
    Deterministic."""
    frontier = [Branch()]
    for length in range(max_new_tokens):
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        hidden, _ = yield growing, []
        logits = next_logits(policy, hidden, length, min_new_tokens)
        rows, tokens = candidates(logits, None, top_p, temperature)
        children = [extend(policy, growing[row], token) for row, token in zip(rows.tolist(), tokens.tolist())]
        _, rewards = yield [], children                                                 # (m,)
        pool = [branch for branch in frontier if branch.finished] + rewarded(children, rewards)
        frontier = sorted(pool, key=lambda branch: -branch.reward)[:width]
        trace.append(frontier)
    return frontier[0]


@side_by_side("guard")
def rebase(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """Reward-balanced search, with a token for a step: the next expansions, `width` less those finished, are shared
    among the unfinished sequences in proportion to softmax(R / REBASE_TEMPERATURE), each draws so many different tokens
    from its nucleus (or all of that, if it holds fewer), and the guard scores what comes of it. A sequence whose share is
    none is dropped, unread. (In Wu et al. a step is a line of reasoning, and rewards are probabilities.) The finished
    sequence with the highest R is the reply, else the unfinished one."""
    generator = torch.Generator().manual_seed(seed)
    growing, finished = [Branch(reward=0.0)], []
    for length in range(max_new_tokens):
        counts = shares([branch.reward for branch in growing], width - len(finished))
        chosen = [(branch, count) for branch, count in zip(growing, counts) if count]
        hidden, _ = yield [branch for branch, _ in chosen], []
        logits, children = next_logits(policy, hidden, length, min_new_tokens), []
        for (branch, count), p in zip(chosen, probabilities(logits, temperature)):
            inside = nucleus(p, top_p)
            drawn = torch.multinomial(p[inside].cpu(), min(count, len(inside)), generator=generator)
            children += [extend(policy, branch, token) for token in inside[drawn.to(inside.device)].tolist()]
        _, rewards = yield [], children
        rewarded(children, rewards)
        growing = [branch for branch in children if not branch.finished]
        finished += [branch for branch in children if branch.finished]
        trace.append(finished + growing)
        if not growing or len(finished) >= width:
            break
    return max(finished or growing, key=lambda branch: branch.reward)


def shares(rewards, count):
    """count · softmax(rewards / REBASE_TEMPERATURE) in whole numbers that sum to `count`: rounded down, then one more
    for those that lost most by it (of equal ones, the first). rewards: floats; result: a list of ints."""
    exact = count * (torch.tensor(rewards, dtype=torch.float64) / REBASE_TEMPERATURE).softmax(-1)
    whole = exact.floor()
    order = (exact - whole).argsort(descending=True, stable=True)
    whole[order[:count - int(whole.sum())]] += 1
    return whole.int().tolist()


@side_by_side("guard")
def deal(policy, guard, trace, *, width, max_new_tokens, min_new_tokens):
    """Decoding-time alignment, its greedy variant: each of the `width` most likely tokens a is continued greedily for
    DEAL_LOOK_AHEAD tokens (fewer where the reply ends), the guard scores the end of that, and the token with the highest
    log π(a | s) + DEAL_LAMBDA · R(s·a·look-ahead) is taken. Deterministic. Reward of a branch: that score."""
    branch, ends = Branch(), []
    while len(branch.tokens) < max_new_tokens and not branch.finished:
        earlier = ends                                      # one of which may be the beginning of a new look-ahead
        hidden, _ = yield [branch], [], earlier
        logits = next_logits(policy, hidden, len(branch.tokens), min_new_tokens)
        log_p, tokens = logits[0].log_softmax(-1).topk(min(width, logits.shape[-1]))    # (width,) each
        children = [extend(policy, branch, token) for token, p in zip(tokens.tolist(), log_p.tolist()) if p > -math.inf]
        ends = children
        for _ in range(DEAL_LOOK_AHEAD):
            growing = [end for end in ends if not end.finished and len(end.tokens) < max_new_tokens]
            if not growing:
                break
            hidden, _ = yield growing, [], ends + earlier
            logits = next_logits(policy, hidden, len(growing[0].tokens), min_new_tokens)
            after = {end: extend(policy, end, token) for end, token in zip(growing, logits.argmax(-1).tolist())}
            ends = [after.get(end, end) for end in ends]
        _, rewards = yield [], ends, earlier                                            # (width,)
        rewarded(children, log_p[:len(children)] + DEAL_LAMBDA * rewards)
        branch = max(children, key=lambda child: child.reward)
        trace.append([branch])
    return branch


@dataclass(eq=False)
class Choice:
    """A node of mcts: a branch, the policy's probability of its last token, and what came of it."""
    branch: Branch
    prior: float = 1.0
    visits: int = 0
    value: float = 0.0                              # the sum over its visits of P(safe) = sigmoid(R) at the leaf
    children: list = field(default_factory=list)

    @property
    def mean(self):
        return self.value / self.visits

    def puct(self, child):
        """Mean value + MCTS_EXPLORATION · prior · sqrt(visits here) / (1 + visits there), of a child; one that was not
        visited yet is taken to be worth what this node is."""
        mean = child.mean if child.visits else self.mean
        return mean + MCTS_EXPLORATION * child.prior * math.sqrt(self.visits) / (1 + child.visits)


@side_by_side("guard")
def mcts(policy, guard, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature):
    """Monte-Carlo tree search, `width` simulations a token. A simulation goes down from the reply so far by the highest
    PUCT, has the policy's nucleus as children of the leaf it comes to (probabilities as priors), and adds the guard's
    P(safe) of that leaf to all nodes on its way. Then the child with most visits is taken (equal ones: by mean value)
    and its part of the tree kept. Few simulations go little further than the likeliest tokens: at width 1 this is
    greedy decoding. Deterministic."""
    root, read = Choice(Branch()), []
    while len(root.branch.tokens) < max_new_tokens and not root.branch.finished:
        for _ in range(width + (root.visits == 0)):         # a root that nobody has read is read first
            path = [root]
            while path[-1].children:
                path.append(max(path[-1].children, key=path[-1].puct))
            leaf, branch = path[-1], path[-1].branch
            if branch.reward is None:                       # else a leaf that nothing can follow, come to once more
                open_ended = not branch.finished and len(branch.tokens) < max_new_tokens
                hidden, rewards = yield ([branch] if open_ended else []), [branch], read
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
                choice.value += 0.5 + 0.5 * math.tanh(branch.reward / 2)         # sigmoid, which cannot overflow so
        root = max(root.children, key=lambda child: (child.visits, child.mean if child.visits else 0.0, child.prior))
        read = [branch for branch in read if branch.tokens[:len(root.branch.tokens)] == root.branch.tokens]
        trace.append([root.branch])
    if root.branch.reward is None:                          # no simulation came to the last token
        _, rewards = yield [], [root.branch]
        rewarded([root.branch], rewards)
    return root.branch


@side_by_side("mrm", "guard")
def saffron(policy, reward_model, trace, *, width, max_new_tokens, min_new_tokens, top_p, temperature, beta):
    """Tree search for the highest reward of each next token, the paper's Saffron-1. Deterministic.

    A step asks the policy and the MRM once for each unfinished sequence s of the frontier (all in one forward pass, if
    they have a base model in common), takes the tokens a of the policy's nucleus that are not in V_unseen as candidates
    (the likeliest seen token, if none is left), and keeps the `width` sequences s·a with the highest M(s)_a (the paper's
    Eq. 2, 7 and 3); equal ones by frontier order, then by the policy's probability. One that ends is finished: it stays,
    and stands before the unfinished. The first of the last frontier is the reply.

    beta > 0, which is not in the paper, ranks by M(s)_a + beta · log π(s·a), π(s·a) being the policy's probability of
    the whole reply so far: where many replies are about equally safe, what the policy would say decides. (This is the
    objective of reward maximization with a KL penalty towards the policy, looked for by search.)
    The likeliest replies run in circles, as in any search for them (Holtzman et al. 2020, arXiv 1904.09751); so with
    beta > 0 no NO_REPEAT tokens in a row come twice (Paulus et al. 2017, arXiv 1705.04304), unless nothing else is left.

    With a guard in place of the MRM it is the very same search at the price that the MRM saves: R(s·a) costs one
    call of the guard for each candidate.
    """
    multifurcation = kind_of(reward_model) == "mrm"
    frontier = [Branch()]
    for length in range(max_new_tokens):
        growing = [branch for branch in frontier if not branch.finished]
        if not growing:
            break
        hidden, reward_hidden = yield growing, growing if multifurcation else []        # (n, d) each
        logits = next_logits(policy, hidden, length, min_new_tokens)                    # (n, V)
        unseen = reward_model.unseen if multifurcation else None
        rows, tokens = candidates(logits, unseen, top_p, temperature)                   # (m,) each
        log_p = logits[rows, tokens] - logits.logsumexp(-1)[rows]                       # log π(a | s): (m,)
        children = [extend(policy, growing[row], token, log_p=p)
                    for row, token, p in zip(rows.tolist(), tokens.tolist(), log_p.tolist())]
        if multifurcation:
            # M_cons(s)_a for the candidates; of the other entries of M(s), none is needed.
            rewards = reward_model.child_rewards(reward_hidden[rows], tokens)           # (m,)
        else:
            _, rewards = yield [], children                                             # R(s·a): (m,)
        frontier = best([branch for branch in frontier if branch.finished], rewarded(children, rewards), width, beta)
        trace.append(frontier)
    return frontier[0]


def rewarded(branches, rewards):
    """The branches, each with its reward: (m,). Raises BadInput for rewards that are not numbers."""
    check_numbers(rewards, "the reward model gives rewards")
    for branch, reward in zip(branches, rewards.tolist()):
        branch.reward = reward
    return branches


def best(finished, children, width, beta):
    """The next frontier: of `finished` and the `width` children with the highest reward + beta · log_prob (equal ones as
    they stand; with beta > 0 of those that do not repeat themselves, or of all, if all do) the first `width`: finished
    ones before unfinished, both by that score."""
    score = lambda branch: branch.reward + beta * branch.log_prob
    ranked = sorted(children, key=score, reverse=True)                      # stable: equal ones keep their order
    fresh = (branch for branch in ranked if not beta or not repeats_its_end(branch.tokens))
    kept = list(itertools.islice(fresh, width)) or ranked[:width]
    return sorted(finished + kept, key=lambda branch: (not branch.finished, -score(branch)))[:width]


def repeats_its_end(tokens, n=NO_REPEAT):
    """Whether the last n tokens stood in a row somewhere before."""
    return any(tokens[i:i + n] == tokens[-n:] for i in range(len(tokens) - n))


def candidates(logits, unseen, top_p, temperature):
    """Which tokens may follow which of n sequences: rows (m,) and tokens (m,), by row and then most likely first. Those
    of a row are its nucleus without unseen tokens; if all of it is unseen, the seen token with the highest logit. logits:
    (n, V), unseen: bool (V,), or None where no token is. Raises BadInput when there is none, as with an MRM that saw
    end-of-sequence only, where the reply may not end yet."""
    rows, tokens = [], []
    for i, p in enumerate(probabilities(logits, temperature)):
        inside = nucleus(p, top_p)
        if unseen is not None:
            inside = inside[~unseen[inside]]
        if len(inside) == 0:
            seen = logits[i].masked_fill(unseen, -math.inf)
            inside = seen.argmax(keepdim=True)
            if seen[inside] == -math.inf:
                raise BadInput("the reward model has not seen any token that could come next; train it on more text")
        rows.append(torch.full_like(inside, i))
        tokens.append(inside)
    return torch.cat(rows), torch.cat(tokens)


def sample(policy, n, trace, max_new_tokens, min_new_tokens, top_p, temperature, seed):
    """n independent replies, each token drawn from the nucleus. They are the last frontier of the trace."""
    generator = torch.Generator().manual_seed(seed)
    branches = [Branch() for _ in range(n)]
    for length in range(max_new_tokens):
        growing = [branch for branch in branches if not branch.finished]
        if not growing:
            break
        hidden, *_ = yield growing, []
        rows = iter(probabilities(next_logits(policy, hidden, length, min_new_tokens), temperature))
        branches = [branch if branch.finished else extend(policy, branch, draw(next(rows), top_p, generator))
                    for branch in branches]
        trace.append(branches)


def draw(p, top_p, generator):
    """One token of the nucleus, in proportion to its probability. p: probabilities (V,)."""
    tokens = nucleus(p, top_p)
    return tokens[torch.multinomial(p[tokens].cpu(), 1, generator=generator).item()].item()


def extend(policy, branch, token, log_p=0.0):
    """The branch with one token more, whose log-probability is log_p; end-of-sequence finishes it."""
    return Branch(branch.tokens + [token], None, token in policy.config.eos_token_ids, branch, branch.log_prob + log_p)


# name -> (search, the kind of reward model it takes). A search is known to all commands by its line here.
SEARCHES = {"none": (none, None), "best_of_n": (best_of_n, "guard"), "beam": (beam, "guard"), "rebase": (rebase, "guard"),
            "deal": (deal, "guard"), "mcts": (mcts, "guard"), "saffron": (saffron, "mrm"),
            "saffron_guard": (saffron, "guard")}


def describe():
    """What the searches do, for --help: the first sentence of each docstring."""
    sentence = lambda search: re.split(r"[.:;(]", " ".join((search.__doc__ or "").split()))[0].strip()
    return "searches:\n" + "\n".join(f"  {name:14} {sentence(search)}{f' (asks the {kind})' if kind else ''}"
                                     for name, (search, kind) in SEARCHES.items())
