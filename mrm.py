"""
Reward models: the guard R(s), one reward for a sequence, and the multifurcation reward model M(s), one reward
for every next token at once. Source: Qiu et al. 2025, "Saffron-1", arXiv 2506.06444, called "the paper"
below.

    guard   R(s)   = w · h(s) + b0              a scalar, the log-odds that s is safe: R(s) < 0 means unsafe
    MRM     M(s)_a = gain · (h(s) · W_a) + b_a  ≈ R(s·a), W the frozen unembedding, b a trained bias

s is a conversation with an unfinished reply. h(s) is the final hidden state of its last token, by a frozen
Llama with LoRA; guard and MRM have a LoRA each. Both read a conversation as: beginning-of-sequence
"\\n\\nUser:" prompt "\\n\\nAgent:" reply. (A Llama Guard has a template of its own.)

The order is the paper's: the PRM, here called guard (Section 2), M (4.1), the parts of its loss (4.2; their
sum is train_mrm.mrm_loss), V_unseen (4.3). Then LoRA.
plumbing/guards.py has guards of other kinds and vocabularies, Llama Guard among them.

Shapes: n sequences or positions, m siblings, d = hidden_size, V = vocab_size, r = LoRA rank.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import Reader
from plumbing.errors import check_finite
from trie_cache import TrieCache


class Guard(nn.Module):
    """R(s): a scalar head on every token, so that one forward pass scores every prefix of a reply."""
    kind = "guard"
    shared_pass = None          # set by plumbing/shared.py: one forward pass for policy and guard

    def __init__(self, llama, template):
        super().__init__()
        self.llama = llama
        self.template = template
        self.head = nn.Linear(llama.config.hidden_size, 1, dtype=llama.dtype, device=llama.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def reward(self, hidden):
        """R of the sequences that end at these hidden states: (..., d) -> (...). Where the template has a
        suffix, as a Llama Guard's, they end with it."""
        wide = torch.promote_types(hidden.dtype, torch.float32)         # bfloat16 would round R to 1/64
        return F.linear(hidden.to(wide), self.head.weight.to(wide), self.head.bias.to(wide)).squeeze(-1)

    def score(self, prompt, replies):
        """R of n replies to a Prompt, a token list each: (n,). Raises BadInput for what is not finite."""
        context = prompt.reward_tokens(self.template)
        sequences = [context + reply + self.template.suffix for reply in replies]
        return check_finite(self.reward(TrieCache(self.llama)(sequences)), "the guard gives rewards")

    def reader(self, prompt):
        """What a search asks about a prompt's replies (engine.Reader): it answers with R."""
        context = prompt.reward_tokens(self.template)
        return Reader(self.llama, context, self.template.suffix, "rewards", self.reward)


class MRM(nn.Module):
    """M(s): the rewards of all next tokens at once, the paper's multifurcation reward model (Section 4.1).

    `unseen` marks V_unseen. `gain` is not in the paper: language-model logits are much larger than rewards,
    and one learned number scales them down (train_mrm.py starts it at 0.02). The authors' released weights
    have none, which is gain = 1.
    """
    kind = "mrm"
    shared_pass = None          # as Guard's

    def __init__(self, llama, template):
        super().__init__()
        self.llama = llama
        self.template = template
        vocab_size = llama.config.vocab_size
        like = dict(dtype=llama.dtype, device=llama.device)
        self.gain = nn.Parameter(torch.ones((), **like))
        self.bias = nn.Parameter(torch.zeros(vocab_size, **like))
        self.register_buffer("unseen", torch.zeros(vocab_size, dtype=torch.bool, device=llama.device))

    def next_rewards(self, hidden):
        """M(s): (..., d) -> (..., V)."""
        return self.gain * self.llama.logits(hidden) + self.bias

    def child_rewards(self, hidden, tokens):
        """One entry M(s)_a for each s and a token a after it, no others: (n, d), ints (n,) -> (n,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)         # bfloat16 would round M to 1/64
        unembedding = self.llama.lm_head.weight[tokens].to(wide)                            # (n, d)
        return self.gain.to(wide) * (hidden.to(wide) * unembedding).sum(-1) + self.bias[tokens]

    def conservative_rewards(self, hidden):
        """M_cons(s), the paper's Eq. 7: M(s), and −∞ for the tokens in V_unseen: (..., d) -> (..., V). (The
        search needs few of these: search.candidates leaves V_unseen out, child_rewards gives the rest.)"""
        return self.next_rewards(hidden).masked_fill(self.unseen, -math.inf)

    def reader(self, prompt):
        """What a search asks (engine.Reader): it answers with h(s), from which child_rewards gives M(s)_a."""
        return Reader(self.llama, prompt.reward_tokens(self.template), gives="mrm_hidden")


def partial_supervision_loss(mrm, hidden, tokens, rewards):
    """Partial supervision, the paper's Eq. 5: the mean of (M(s[0:j])_{s_j} − R(s[0:j+1]))² over reply
    positions j.

    hidden: h(s[0:j]) (n, d). tokens: ids of the tokens s_j that really follow (n,). rewards: R(s[0:j+1])
    (n,).
    """
    return F.mse_loss(mrm.child_rewards(hidden, tokens), rewards)


def sibling_loss(mrm, hidden, tokens, rewards, prefixes):
    """Not in the paper: how well M tells the next tokens of one prefix apart. Siblings are tokens a that may
    follow the same s, each labelled with R(s·a). From each error M(s)_a − R(s·a), its mean over the siblings
    of the same s is subtracted; the loss is the mean square of the rest. (R varies much more between prefixes
    than between siblings.)

    hidden: h(s) (m, d). tokens: ids of the tokens a (m,). rewards: R(s·a) (m,). prefixes: which s each one
    follows, as an index from 0 on (m,).
    """
    error = mrm.child_rewards(hidden, tokens) - rewards
    counts = torch.bincount(prefixes)
    mean = torch.zeros_like(counts, dtype=error.dtype).index_add(0, prefixes, error) / counts
    return (error - mean[prefixes]).square().mean()


def unseen_tokens(replies, config, min_count=1):
    """V_unseen (Section 4.3): the tokens that stand fewer than min_count times in the training replies (token
    lists), so that M is not reliable for them. bool (V,). Siblings are not counted, though M learns from them
    too: results/masks.py tries it. End-of-sequence is never unseen: a search must be able to end."""
    tokens = torch.tensor([token for reply in replies for token in reply], dtype=torch.long)
    unseen = torch.bincount(tokens, minlength=config.vocab_size) < min_count
    unseen[list(config.eos_token_ids)] = False
    return unseen


# ------------------------------------------------------------------------------------------------------------
# what is trained: LoRA (Hu et al. 2021, arXiv 2106.09685) and the small head

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRALinear(nn.Module):
    """y = x Wᵀ + (alpha / r) (x Aᵀ) Bᵀ, of which A and B are trained; B starts at zero, so training starts at
    W."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.linear = linear
        self.scale = alpha / rank
        like = dict(dtype=linear.weight.dtype, device=linear.weight.device)
        self.lora_A = nn.Parameter(torch.randn(rank, d_in, **like) / math.sqrt(d_in))       # (r, d_in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, **like))                        # (d_out, r)

    def forward(self, x):                                                                   # (..., d_in)
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(llama, rank, alpha, targets, first_layer=0):
    """A copy of `llama` with LoRA on the target projections of layers first_layer and up. All weights are
    shared with the original, not copied. A is drawn from torch's global generator."""
    assert set(targets) <= set(PROJECTIONS), f"LoRA's targets are some of {PROJECTIONS}, not {targets}"
    llama = shallow_copy(llama)
    for block in llama.model.layers[first_layer:]:
        for name in dict.fromkeys(targets):
            part = part_of(block, name)
            setattr(part, name, LoRALinear(getattr(part, name), rank, alpha))
    return llama


def shallow_copy(module):
    """New modules around the very same parameters: in the copy, one may replace a module, not a parameter."""
    new = copy.copy(module)
    new._modules = {name: shallow_copy(child) for name, child in module._modules.items()}
    return new


def part_of(block, name):
    """The module of a block that has the projection of that name."""
    return block.self_attn if hasattr(block.self_attn, name) else block.mlp


def trained_tensors(reward_model):
    """What an adapter holds, by name: LoRA, the guard's head, the MRM's gain and bias, and its V_unseen."""
    tensors = {name: p for name, p in reward_model.named_parameters()
               if "lora_" in name or not name.startswith("llama.")}
    return tensors | dict(reward_model.named_buffers(recurse=False))
