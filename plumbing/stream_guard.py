"""
Qwen3Guard (Qwen Team 2025, arXiv 2510.14276): guards that anyone can have, in the vocabulary of Qwen3.

Stream is a Qwen3 with heads that judge every token: a search's call reads one new token. Its sibling Gen
answers in words (plumbing/guards.py).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import RMSNorm
from mrm import Guard
from plumbing.checkpoint import load_llama
from plumbing.errors import BadInput
from plumbing.templates import both_turns

SAFE, UNSAFE = 0, 1                     # of the head's three classes; 2, "controversial", does not enter R


class StreamGuard(Guard):
    """R(s) = logit(safe) − logit(unsafe), by a head on every token of the reply: two matrices, an
    RMSNorm between them."""

    def __init__(self, llama, template, heads):
        nn.Module.__init__(self)                # not Guard's: that one has another head
        self.llama = llama
        self.template = template
        inner = heads["risk_level_category_pre.weight"].shape[0]
        self.pre = heads["risk_level_category_pre.weight"]                      # (inner, d)
        self.norm = RMSNorm(inner, llama.config.rms_norm_eps)
        self.norm.weight = nn.Parameter(heads["risk_level_category_layernorm.weight"], requires_grad=False)
        self.classes = heads["risk_level_head.weight"]                          # (3, inner)

    def reward(self, hidden):
        """R of the sequences that end at these hidden states: (..., d) -> (...)."""
        logits = F.linear(self.norm(F.linear(hidden, self.pre)), self.classes)  # (..., 3)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits[..., SAFE] - logits[..., UNSAFE]


def load_stream_guard(folder, dtype, device):
    """The guard of a Qwen3Guard-Stream's folder. It reads a conversation in the folder's own chat format."""
    heads = {}
    llama = load_llama(folder, dtype, device, heads)        # puts the other tensors into `heads`
    inner = len(heads.get("risk_level_category_layernorm.weight", ()))
    for name, shape in (("risk_level_category_pre.weight", (inner, llama.config.hidden_size)),
                        ("risk_level_category_layernorm.weight", (inner,)),
                        ("risk_level_head.weight", (3, inner))):
        found = tuple(heads[name].shape) if name in heads else None
        if found != shape:
            raise BadInput(f"{folder}: the head's tensor {name} has shape {found}, expected {shape}")
    # It judges the reply's last token, so it reads nothing after that.
    llama.tokenizer.texts["turns"] = both_turns(folder, False) | {"suffix": ""}
    return StreamGuard(llama, llama.tokenizer.template("turns"), heads).requires_grad_(False)
