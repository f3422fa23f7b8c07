"""
The same numbers as model.py, sooner on a CPU: fewer and larger operations.

checkpoint.load_llama calls `speed_up`. plumbing/shared.py makes one forward pass for two models.

Shapes: B sequences, T tokens each, d_in and d_out the sizes of a projection, r = LoRA rank.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mrm import LoRALinear
from model import Block, rotate

# Projections that read the same input: one product computes them side by side.
JOINED = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def speed_up(llama):
    """Make the layers and the unembedding of a Llama fast ones. The weights stay as they are."""
    for block in llama.model.layers:
        block.__class__ = FastBlock             # the same modules, another forward
    llama.lm_head.__class__ = FastLinear
    return llama


class FastBlock(Block):
    """A layer as in model.py, in fewer operations: projections of the same input are one product, queries and
    keys are rotated together. Where there are gradients, it is the plain layer."""
    lora = {}                               # of a SharedPass: the JointLoRA of each of JOINED that has one

    def forward(self, x, cos, sin, cache):                                      # (B, T, d), as in Block
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, cos, sin, cache)
        attention = self.self_attn
        heads = attention.heads, attention.kv_heads
        y = self.project(attention, JOINED[0], norm(self.input_layernorm, x))
        y = y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)   # (B, heads + 2 kv_heads, T, head_dim)
        qk, v = y.split((sum(heads), attention.kv_heads), dim=1)
        if attention.qk_norm:
            q, k = qk.split(heads, dim=1)
            qk = torch.cat((attention.q_norm(q), attention.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split(heads, dim=1)
        x = x + self.project(attention, JOINED[1], attention.attend(q, k, v, cache))
        y = self.project(self.mlp, JOINED[2], norm(self.post_attention_layernorm, x))
        gate, up = y.chunk(2, dim=-1)                                       # (B, T, intermediate_size) each
        return x + self.project(self.mlp, JOINED[3], F.silu(gate).mul_(up))

    def project(self, part, names, x):
        """These projections of x, with LoRA, side by side: (B, T, d_in) -> (B, T, sum of their d_out)."""
        linears = [getattr(part, name) for name in names]
        bases = [base(linear) for linear in linears]
        y = multiply(x, bases)
        if names in self.lora:
            return self.lora[names].add_to(y, x)
        for linear, own in zip(linears, y.split([len(b.weight) for b in bases], dim=-1)):
            if isinstance(linear, LoRALinear):
                own += linear.scale * F.linear(F.linear(x, linear.lora_A), linear.lora_B)
        return y


def base(linear):
    """A projection without LoRA."""
    return linear.linear if isinstance(linear, LoRALinear) else linear


def norm(rms_norm, x):
    """RMSNorm in one operation, where it needs no other type inside."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], rms_norm.weight, rms_norm.eps)
    return rms_norm(x)


class FastLinear(nn.Linear):
    """nn.Linear by `multiply`."""

    def forward(self, x):                                                       # (..., d_in)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return multiply(x, [self])                                              # (..., d_out)


# ------------------------------------------------------------------------------------------------------------
# products

def multiply(x, linears):
    """x Wᵀ + b of some nn.Linear of the same input, side by side: (..., d_in) -> (..., sum of d_out).

    On a CPU, oneDNN multiplies by a packed copy of all W together. With few rows a product costs what reading
    W costs, and a packed W is read faster. Processors with AMX read a W as it is just as fast if there is one
    row (docs/speed.md has both measured), so there it is not packed for that."""
    weights = [linear.weight for linear in linears]
    one_row = x.numel() == x.shape[-1]
    if (x.device.type != "cpu" or not packable(x.dtype) or one_row and torch.cpu._is_amx_tile_supported()
            or weights[0].is_inference()):                                  # whose changes are not counted
        products = [F.linear(x, linear.weight, linear.bias) for linear in linears]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return torch.ops.mkldnn._linear_pointwise(x, packed(weights), bias, "none", [], "")


def packable(dtype):
    """Whether oneDNN, torch's library for x86 and ARM processors, is there and multiplies this type well."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weights):
    """A copy of some weights, one below the other, in the blocked order that oneDNN reads fastest. It is made
    at first use, and again after one of them was changed. It is kept as a field of the first one: models that
    share weights share it.

    A change is seen if torch counts it (as of weight.mul_(2) under no_grad), or if it changes one of eight
    samples of the weight. So weight.data.mul_(2) is seen; weight.data[3, 5] = 1 is not."""
    first = weights[0]
    state = [(weight.data_ptr(), weight._version) for weight in weights]
    if getattr(first, "packed_state", None) != state or not all(
            torch.equal(samples, sampled) for samples, sampled in first.packed_samples):
        first.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach(), None)
        first.packed_state = state
        samples = [w.detach().flatten()[::max(1, w.numel() // 8)] for w in weights]     # views of the weights
        first.packed_samples = [(some, some.clone()) for some in samples]
    return first.packed
