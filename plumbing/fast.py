"""
The same numbers, sooner: products that are fast on a CPU, and one forward pass for two models.

checkpoint.load_llama calls `speed_up`; what loads a reward model for a policy calls `share_pass`.

Shapes: T tokens, d_in and d_out a projection's sizes, K = ranks of all LoRA together.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mrm import PROJECTIONS, LoRALinear, part_of, shallow_copy


def speed_up(llama):
    """Replace every nn.Linear of a Llama by a PackedLinear with the same weight."""
    for module in list(llama.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return llama


class PackedLinear(nn.Module):
    """y = x Wᵀ + b. On a CPU without gradients, oneDNN multiplies by a packed W. With few rows a product
    costs what reading W costs, and a packed W is read two to three times as fast."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = weight                                                    # (d_out, d_in)
        self.bias = bias                                                        # (d_out,), or None

    def forward(self, x):                                                       # (..., d_in)
        if (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
                or not packable(x.dtype) or self.weight.is_inference()):    # whose changes are not counted
            return F.linear(x, self.weight, self.bias)                          # (..., d_out)
        return torch.ops.mkldnn._linear_pointwise(x, packed(self.weight), self.bias, "none", [], "")


def packable(dtype):
    """Whether oneDNN, torch's library for x86 and ARM processors, is there and multiplies this type well."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight):
    """A copy of a weight in the blocked order that oneDNN reads fastest, made at first use and again after
    the weight was changed. It is kept as a field of the weight: models that share a weight share its copy.

    A change is seen if torch counts it (as of weight.mul_(2) under no_grad), or if it changes one of eight
    samples of the weight. So weight.data.mul_(2) is seen; weight.data[3, 5] = 1 is not."""
    state = (weight.data_ptr(), weight._version)
    if getattr(weight, "packed_state", None) != state or not torch.equal(weight.samples, weight.sampled):
        weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weight.packed_state = state
        weight.samples = weight.detach().flatten()[::max(1, weight.numel() // 8)]       # a view of the weight
        weight.sampled = weight.samples.clone()
    return weight.packed


# ------------------------------------------------------------------------------------------------------------
# one pass for two models

def share_pass(policy, reward_model):
    """The reward model, whose searches read for both models in one pass if they differ in LoRA only: one is
    an `add_lora` of the other, or both of a third."""
    llama = getattr(reward_model, "llama", None)
    if llama is not None and llama is not policy and same_base(policy, llama):
        reward_model.shared_pass = SharedPass([policy, llama])
    return reward_model


def same_base(a, b):
    return a.model.embed_tokens.weight is b.model.embed_tokens.weight


class SharedPass:
    """Llamas that differ in LoRA only, as one: a pass reads the base weights once for the tokens of all. It
    is a copy of them in which each projection that some of them adapt is a SharedLinear."""

    def __init__(self, llamas):
        self.llamas = llamas
        self.llama = shallow_copy(llamas[0])
        self.device = self.llama.device
        lora = [[m for m in llama.modules() if isinstance(m, LoRALinear)] for llama in llamas]
        ranks = [len(ms[0].lora_A) if ms else 0 for ms in lora]
        owner = [i for i, rank in enumerate(ranks) for _ in range(rank)]
        self.owner = torch.tensor(owner, device=self.device)        # whose each of the K ranks is: (K,)
        self.mask = OwnRanks()
        for block, *blocks in zip(self.llama.model.layers, *(llama.model.layers for llama in llamas)):
            for name in PROJECTIONS:
                linears = [getattr(part_of(b, name), name) for b in blocks]
                if any(isinstance(linear, LoRALinear) for linear in linears):
                    setattr(part_of(block, name), name, SharedLinear(linears, ranks, self.mask))

    def __call__(self, tokens, positions, cache):
        """As Llama's forward, with B = 1. cache: a trie_cache.Pass, whose tries say whose the tokens are."""
        reader = [self.llamas.index(trie.model) for trie in cache.tries for _ in trie.waiting]
        reader = torch.tensor(reader, device=self.device)                                       # (T,)
        self.mask.values = (reader[:, None] == self.owner).to(self.llama.dtype)                 # (T, K)
        return self.llama(tokens, positions, cache)


class OwnRanks:
    """The mask that all SharedLinear of a SharedPass see: which of the K ranks are each token's, (T, K)."""
    values = None


class SharedLinear(nn.Module):
    """y = x Wᵀ + (mask ⊙ x Aᵀ) Bᵀ, where A and B hold the LoRA of all Llamas, zeros for those that have none
    here."""

    def __init__(self, linears, ranks, mask):
        super().__init__()
        self.mask = mask
        self.linear = next(linear.linear for linear in linears if isinstance(linear, LoRALinear))
        d_out, d_in = self.linear.weight.shape
        zeros = self.linear.weight.new_zeros
        A = []
        B = []
        for linear, rank in zip(linears, ranks):
            adapted = isinstance(linear, LoRALinear)
            A.append(linear.lora_A if adapted else zeros(rank, d_in))
            B.append(linear.scale * linear.lora_B if adapted else zeros(d_out, rank))
        self.A = torch.cat(A)                                                                   # (K, d_in)
        self.B = torch.cat(B, dim=1)                                                            # (d_out, K)

    def forward(self, x):                                                                       # (1, T, d_in)
        low = F.linear(x, self.A) * self.mask.values                                           # (1, T, K)
        return self.linear(x) + F.linear(low, self.B)                                          # (1, T, d_out)
