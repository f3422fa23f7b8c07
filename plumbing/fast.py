"""
The same numbers as model.py but for rounding, sooner on a CPU: projections that read the same input are one
product, and products are by oneDNN.

checkpoint.load_llama calls `speed_up`. plumbing/shared.py makes one forward pass for two models.

Shapes: d_in and d_out the sizes of a projection.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Attention
from mrm import LoRALinear

AMX = torch.cpu.get_capabilities().get("amx_tile", False)       # newer Intel processors


def speed_up(llama):
    """Make each Linear, Attention and MLP of a Llama a fast one, around the same weights."""
    fast = {nn.Linear: FastLinear, Attention: FastAttention, MLP: FastMLP}
    for module in llama.modules():
        if type(module) in fast:
            module.__class__ = fast[type(module)]           # the same object, with methods of its subclass
    return llama


class FastLinear(nn.Linear):
    lora = None                     # in a SharedPass: the JointLoRA of this projection in all of its Llamas

    def forward(self, x):                                                       # (..., d_in) -> (..., d_out)
        return super().forward(x) if must_be_plain(x) else side_by_side(x, [self], self.lora)[0]


class FastAttention(Attention):
    lora = None                     # the same of q_proj, k_proj and v_proj

    def qkv(self, x):
        return side_by_side(x, [self.q_proj, self.k_proj, self.v_proj], self.lora)


class FastMLP(MLP):
    lora = None                     # the same of gate_proj and up_proj

    def gate_up(self, x):
        return side_by_side(x, [self.gate_proj, self.up_proj], self.lora)


def side_by_side(x, linears, lora=None):
    """Projections of the same x by one product, each by a Linear or a LoRALinear: (..., d_in) -> (..., d_out)
    of each. lora: a JointLoRA, which takes the place of their own."""
    bases = [without_lora(linear) for linear in linears]
    if must_be_plain(x) or any(type(linear) is not FastLinear for linear in bases):     # or one of a fork
        return [linear(x) for linear in linears]
    y = product(x, bases)                                                       # (..., sum of d_out)
    if lora is not None:
        lora.add_to(y, x)
    parts = y.split([linear.out_features for linear in bases], dim=-1)          # views of y
    for linear, part in zip(linears, parts):
        if isinstance(linear, LoRALinear) and lora is None:
            part += linear.scale * F.linear(F.linear(x, linear.lora_A), linear.lora_B)      # in y's memory
    return parts


def without_lora(linear):
    return linear.linear if isinstance(linear, LoRALinear) else linear


def must_be_plain(x):
    """Whether gradients or autocast, which training has, ask for the operations of model.py."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)


def product(x, linears):
    """x Wᵀ + b of some Linear, side by side: (..., d_in) -> (..., sum of d_out)."""
    weights = [linear.weight for linear in linears]
    if not packs(x, weights):
        products = [F.linear(x, linear.weight, linear.bias) for linear in linears]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return torch.ops.mkldnn._linear_pointwise(x, packed(weights), bias, "none", [], "")


def packs(x, weights):
    """Whether to multiply by a packed copy. With few rows a product costs what reading W costs, and a packed
    W is read faster. (docs/speed.md has the figures.)"""
    if x.device.type != "cpu" or not packable(x.dtype):
        return False
    if any(weight.is_inference() for weight in weights):        # changes of such a tensor are not counted
        return False
    # Where there is AMX, one row by W as it is costs no more, and needs no copy.
    return not (AMX and x.dtype == torch.float32 and x.numel() == x.shape[-1])


def packable(dtype):
    """Whether oneDNN, torch's library for x86 and ARM processors, is there and multiplies this type well."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weights):
    """A copy of some weights, one below the other, in the blocked order that oneDNN reads fastest. It is made
    at first use, and again after one of them was changed. It is kept as a field of the first one: models that
    share weights share it. It takes as much memory as the weights.

    A change is seen if torch counts it (as of weight.mul_(2) under no_grad), or if it changes one of eight
    samples of the weight. So weight.data.mul_(2) is seen; weight.data[3, 5] = 1 is not."""
    first = weights[0]
    state = [(weight.data_ptr(), weight._version) for weight in weights]
    if getattr(first, "packed_state", None) != state or not all(
            torch.equal(samples, sampled) for samples, sampled in first.packed_samples):
        first.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach(), None)
        first.packed_state = state
        samples = [w.detach().flatten()[::w.numel() // 8 + 1] for w in weights]     # views of the weights
        first.packed_samples = [(some, some.clone()) for some in samples]
    return first.packed
