"""
One forward pass for two models that differ in LoRA only: the base weights are read once for both.

What loads a reward model for a policy calls `share_pass`.

Shapes: T tokens, d_in and d_out the sizes of a projection, K = ranks of all LoRA together.
"""

import torch

from mrm import LoRALinear, shallow_copy
from plumbing.fast import speed_up, without_lora


def share_pass(policy, reward_model):
    """The same reward model. If its Llama and the policy differ in LoRA only, it now has a `shared_pass`, by
    which searches read for both at once. That copies the LoRA: share again after it was trained."""
    llama = getattr(reward_model, "llama", None)
    if llama is not None and llama is not policy and same_base(policy, llama):
        reward_model.shared_pass = SharedPass([policy, llama])
    return reward_model


def same_base(a, b):
    """Whether two Llamas have the very same weights, LoRA aside."""
    return base_weights(a) == base_weights(b)


def base_weights(llama):
    return {id(p) for name, p in llama.named_parameters() if "lora_" not in name}


class SharedPass:
    """Several Llamas that differ in LoRA only. A pass reads the base weights once, for the tokens of all. It
    is by a copy of them whose layers have the LoRA of all."""

    def __init__(self, llamas):
        self.llamas = llamas
        self.llama = speed_up(shallow_copy(llamas[0]))
        self.device = self.llama.device
        self.readers = Readers()
        for block, *blocks in zip(self.llama.model.layers, *(llama.model.layers for llama in llamas)):
            attentions = [b.self_attn for b in blocks]
            mlps = [b.mlp for b in blocks]
            block.self_attn.lora = self.join(attentions, ["q_proj", "k_proj", "v_proj"])
            block.mlp.lora = self.join(mlps, ["gate_proj", "up_proj"])
            for part, parts, name in ((block.self_attn, attentions, "o_proj"),
                                      (block.mlp, mlps, "down_proj")):
                setattr(part, name, without_lora(getattr(part, name)))
                getattr(part, name).lora = self.join(parts, [name])

    def join(self, parts, names):
        """The JointLoRA of projections that read the same input, in the same part of each Llama; None where
        no Llama has LoRA there."""
        linears = [[getattr(part, name) for name in names] for part in parts]
        if any(isinstance(linear, LoRALinear) for own in linears for linear in own):
            return JointLoRA(linears, self.readers)

    def __call__(self, tokens, positions, cache):
        """As Llama's forward, with B = 1. cache: a trie_cache.Pass, whose tries say whose the tokens are."""
        assert not torch.is_autocast_enabled(self.device.type), "a search computes in its models' own type"
        reader = torch.tensor([self.llamas.index(trie.model) for trie in cache.tries])
        self.readers.begin(reader.repeat_interleave(torch.tensor(cache.sizes)).to(self.device))
        return self.llama(tokens, positions, cache)


class Readers:
    """Whose each token of the pass under way is: the same object for all JointLoRA of a SharedPass."""

    def begin(self, reader):                                                            # ints (T,)
        self.reader = reader
        self.masks = {}

    def mask(self, owner, dtype):
        """1 where the Llama that reads a token owns a rank, else 0: (T, K). owner: a tuple of K ints."""
        if owner not in self.masks:
            owners = torch.tensor(owner, device=self.reader.device)
            self.masks[owner] = (self.reader[:, None] == owners).to(dtype)
        return self.masks[owner]


class JointLoRA:
    """(mask ⊙ (x A)) B, where A and B hold the LoRA of all Llamas for projections that read the same x."""

    @torch.no_grad()
    def __init__(self, linears, readers):           # linears[i]: these projections in Llama i
        self.readers = readers
        sizes = [without_lora(linear).out_features for linear in linears[0]]
        A, B, owner = [], [], []
        for i, own in enumerate(linears):
            for j, linear in enumerate(own):
                if isinstance(linear, LoRALinear):
                    rows = linear.lora_B.new_zeros(len(linear.lora_A), sum(sizes))
                    rows.split(sizes, dim=-1)[j].copy_(linear.scale * linear.lora_B.T)
                    A.append(linear.lora_A.T)
                    B.append(rows)
                    owner += [i] * len(rows)
        self.A = torch.cat(A, dim=1)                                                            # (d_in, K)
        self.B = torch.cat(B)                                                                   # (K, d_out)
        self.owner = tuple(owner)

    def add_to(self, y, x):
        """In place, to the projections y of x: (1, T, d_out), (1, T, d_in)."""
        low = torch.mm(x[0], self.A) * self.readers.mask(self.owner, x.dtype)                   # (T, K)
        y[0].addmm_(low, self.B)
