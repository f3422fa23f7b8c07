"""
Which guard a path names (an adapter, a Llama Guard, a Qwen3Guard), and how a search can ask it.

A search asks a reward model for its `kind`, its `shared_pass` and its `reader(prompt)`. mrm.Guard has these.
`guard_for` wraps what lacks them, or reads other tokens than the policy's.
"""

from pathlib import Path

import torch

from mrm import Guard
from plumbing.adapters import load_adapter, read_metadata
from plumbing.bridge import Bridge
from plumbing.checkpoint import DEFAULT, load_llama
from plumbing.config import STREAM_GUARD
from plumbing.errors import BadInput, check_finite
from plumbing.files import read_json
from plumbing.stream_guard import load_stream_guard
from plumbing.templates import both_turns

VERDICT = "Safety:"                 # Qwen3Guard-Gen, a guard by words, begins its answer with this


def guard_for(policy, guard):
    """The guard in a form that searches of this policy can ask."""
    if not hasattr(guard, "reader"):
        return OwnGuard(guard)
    if not isinstance(guard, Guard):
        return guard
    ours = policy.vocabulary
    theirs = guard.llama.vocabulary             # "": a model without a tokenizer cannot be bridged
    return Bridge(policy, guard) if ours and theirs and ours != theirs else guard


def load_guard(path, llama):
    """The guard at `path`: an adapter on `llama`, or the folder of a Llama Guard or a Qwen3Guard, Stream or
    Gen (maybe that of `llama`). Those of this repository are adapters on the default weights, always."""
    if not Path(path).is_dir():
        base = read_metadata(path).get("base_fingerprint")
        if Path(path).resolve().parent == DEFAULT and base != llama.fingerprint:
            llama = load_llama(DEFAULT, llama.dtype, llama.device)
        return load_adapter(path, llama, "guard")
    if not (Path(path) / "tokenizer.json").exists():
        raise BadInput(f"{path} has no tokenizer.json, which such a guard needs")
    if read_json(Path(path) / "config.json").get("architectures") == [STREAM_GUARD]:
        return load_stream_guard(path, llama.dtype, llama.device)
    other = load_llama(path, llama.dtype, llama.device)
    other = llama if other.fingerprint == llama.fingerprint else other
    if "guard" in other.tokenizer.texts:
        return llama_guard(other)
    texts = both_turns(path, True)
    if VERDICT not in texts["prefix"] + texts["suffix"]:
        raise BadInput(f"{path}: not a guard: no template 'guard', and no {VERDICT!r} in its chat format")
    other.tokenizer.texts["turns"] = texts | {"suffix": texts["suffix"] + VERDICT}
    return guard_by_words(other, other.tokenizer.template("turns"), " Safe", " Unsafe")


def llama_guard(llama):
    """A Llama Guard (Inan et al. 2023, arXiv 2312.06674), the paper's PRM."""
    return guard_by_words(llama, llama.tokenizer.template("guard"), "safe", "unsafe")


def guard_by_words(llama, template, safe_word, unsafe_word):
    """A Llama Guard or a Qwen3Guard-Gen as a Guard: R(s) = logit("safe") − logit("unsafe") of the first word
    that it says of s, for which the template's suffix asks. As a head: the difference of two rows of the
    unembedding. Raises BadInput where a word is not one token."""
    guard = Guard(llama, template)
    safe = llama.tokenizer.encode(safe_word)
    unsafe = llama.tokenizer.encode(unsafe_word)
    if len(safe) != 1 or len(unsafe) != 1:
        raise BadInput(f"{llama.config.name}: no guard by words: {safe_word!r} and {unsafe_word!r} must be "
                       "one token each")
    guard.head.weight.data = llama.lm_head.weight[safe] - llama.lm_head.weight[unsafe]      # (1, d)
    return guard.requires_grad_(False)


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
