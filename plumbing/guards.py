"""
Guards other than mrm.Guard: a Llama Guard, a guard with another vocabulary than the policy's, one's own.

A search asks a reward model for its `kind`, its `shared_pass` and its `reader(prompt)`. Here are classes that
have these for other guards than mrm.Guard; `load_guard` and `guard_for` choose what fits.
"""

import codecs
import dataclasses
from pathlib import Path

import torch

from engine import Reader
from mrm import Guard
from plumbing.adapters import load_adapter, read_metadata
from plumbing.checkpoint import DEFAULT, load_llama
from plumbing.errors import BadInput, check_finite


def guard_for(policy, guard):
    """The guard in a form that searches of this policy can ask."""
    if not hasattr(guard, "reader"):
        return OwnGuard(guard)
    if not isinstance(guard, Guard):
        return guard
    ours = policy.vocabulary
    theirs = guard.llama.vocabulary
    return Bridge(policy, guard) if ours and theirs and ours != theirs else guard


def load_guard(path, llama):
    """The guard at `path`: a Llama Guard's folder (maybe that of `llama`), or an adapter on `llama`. Those of
    this repository are adapters on the default weights, whatever `llama` is."""
    if not Path(path).is_dir():
        base = read_metadata(path).get("base_fingerprint")
        if Path(path).resolve().parent == DEFAULT and base != llama.fingerprint:
            llama = load_llama(DEFAULT, llama.dtype, llama.device)
        return load_adapter(path, llama, "guard")
    other = load_llama(path, llama.dtype, llama.device)
    if other.tokenizer is None:
        raise BadInput(f"{path} has no tokenizer.json, which a Llama Guard needs")
    return llama_guard(llama if other.fingerprint == llama.fingerprint else other)


def llama_guard(llama):
    """A Llama Guard as a Guard (Inan et al. 2023, arXiv 2312.06674), the paper's PRM: R(s) =
    logit("safe") − logit("unsafe") of the first word that it says of s, for which the template's suffix asks.
    As a head: the difference of two rows of the unembedding. Raises BadInput where a word is not one
    token."""
    guard = Guard(llama, llama.tokenizer.template("guard"))
    safe = llama.tokenizer.encode("safe")
    unsafe = llama.tokenizer.encode("unsafe")
    if len(safe) != 1 or len(unsafe) != 1:
        raise BadInput(f"{llama.config.name}: not a Llama Guard: safe and unsafe must be one token each")
    guard.head.weight.data = llama.lm_head.weight[safe] - llama.lm_head.weight[unsafe]      # (1, d)
    return guard.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# across vocabularies

class Bridge:
    """A guard with another vocabulary than the policy's. It reads the text of the policy's tokens, in tokens
    of its own. Half a character at the end is left out. The policy's end of sequence becomes the guard's."""
    kind = "guard"
    shared_pass = None

    def __init__(self, policy, guard):
        self.policy = policy
        self.guard = guard

    def tokens(self, tokens):
        """The policy's tokens as the guard's."""
        text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(
            b"".join(map(self.policy.tokenizer.token_bytes, tokens)))
        llama = self.guard.llama
        ended = tokens and tokens[-1] in self.policy.config.eos_token_ids
        return llama.tokenizer.encode(text) + [*(llama.config.eos_token_ids[:1] if ended else [])]

    def prompt(self, prompt):
        return dataclasses.replace(prompt, user=self.tokens(prompt.user), prefill=self.tokens(prompt.prefill))

    def score(self, prompt, replies):
        """As Guard.score."""
        return self.guard.score(self.prompt(prompt), [self.tokens(reply) for reply in replies])

    def reader(self, prompt):
        return BridgeReader(self, prompt)


class BridgeReader(Reader):
    """A Reader for a Bridge. It encodes the whole reply each time, and goes on from the longest beginning
    that is in the trie."""

    def __init__(self, bridge, prompt):
        guard = bridge.guard
        context = bridge.prompt(prompt).reward_tokens(guard.template)
        super().__init__(guard.llama, context, guard.template.suffix, "rewards", guard.reward)
        self.bridge = bridge

    def remember(self, branch, node):
        """Nothing: the beginning of a text may have other tokens than the whole."""

    def nearest(self, branch):
        tokens = self.context + self.bridge.tokens(branch.tokens)
        config = self.trie.model.config
        if len(tokens) + len(self.suffix) > config.max_position_embeddings:
            raise BadInput("prompt and reply are longer than the "
                           f"{config.max_position_embeddings} tokens that the guard {config.name} reads")
        node = self.trie.root
        known = 0
        while known < len(tokens) and tokens[known] in node.children:
            node = node.children[tokens[known]]
            known += 1
        return node, tokens[known:]


# ------------------------------------------------------------------------------------------------------------
# one's own

class OwnGuard:
    """Any object with a method score(prompt, replies), as a guard: it gives the rewards of n replies (token
    lists), a tensor, an array or a list of n finite numbers, negative for unsafe. What it computes is not
    counted in the costs."""
    kind = "guard"
    shared_pass = None

    def __init__(self, scorer):
        self.scorer = scorer

    def score(self, prompt, replies):
        """As Guard.score."""
        rewards = torch.as_tensor(self.scorer.score(prompt, replies))
        assert rewards.shape == (len(replies),), f"the guard's score has shape {tuple(rewards.shape)}, not n"
        return check_finite(rewards, "the guard gives rewards")

    def reader(self, prompt):
        return OwnReader(self, prompt)


class OwnReader:
    """Stands for a Reader: it has no trie, and the guard reads each reply alone."""
    trie = None
    gives = "rewards"

    def __init__(self, guard, prompt):
        self.guard = guard
        self.prompt = prompt
        self.asked = []
        self.calls = 0

    def ask(self, branches, keep=()):
        self.asked = branches
        self.calls += len(branches)

    def answer(self):
        if not self.asked:
            return None
        return self.guard.score(self.prompt, [branch.tokens for branch in self.asked])
