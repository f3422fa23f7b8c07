"""
The language model: a Llama in plain PyTorch.

Every network of this repository (policy, guard, MRM) is this class with other weights. It computes Llama,
Qwen2, Qwen3, and Mistral for texts no longer than its window. Modules have the names of the tensors in
folders of the Hugging Face hub, so plumbing/checkpoint.py, which loads those, needs no table of names.

Sources:
- Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
- RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
- rotary embedding: Su et al. 2021, arXiv 2104.09864; grouped queries: Ainslie et al. 2023, arXiv 2305.13245
- Mistral: arXiv 2310.06825; Qwen2: arXiv 2407.10671; Qwen3: arXiv 2505.09388

Shapes: B sequences, T tokens each, d = hidden_size, V = vocab_size; heads queries share kv_heads keys.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class LlamaConfig:
    """What a Llama needs of config.json, under the names that it has there; the last five are ours."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None       # None, or Llama 3's scaling
    tie_word_embeddings: bool = False
    qkv_bias: bool = False                 # Qwen2: q, k and v have a bias
    qk_norm: bool = False                  # Qwen3: the heads of q and k are normed
    eos_token_ids: tuple = ()              # every id that ends a sequence
    end_of_turn: int | None = None         # the one of these that ends a turn: labelled replies end with it
    name: str = ""                         # which checkpoint this is, for messages

    @property
    def linear_params(self):
        """How many weights each token is multiplied with: all layers' projections, not embedding and head."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads     # of q and o, of k and v
        rows = heads * self.head_dim + 3 * self.intermediate_size
        return self.num_hidden_layers * self.hidden_size * rows


def rotary_frequencies(config):
    """RoPE's angular frequency of each pair of dimensions, in radians a position: float64 (head_dim / 2,).

    Llama 3 stretches the long wavelengths. With C = original_max_position_embeddings: those above C /
    low_freq_factor by `factor`, those below C / high_freq_factor not at all, those between by a blend.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    if config.rope_scaling is None:
        return frequency
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)   # within the first context
    blend = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    blend = blend.clamp(0, 1)                                                   # 0: stretched, 1: as it was
    return blend * frequency + (1 - blend) * frequency / s["factor"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in float32 at least."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def rotate(x, cos, sin):
    """Apply RoPE: dimensions i and i + head_dim/2 of each head are one pair, turned by the token's angle. x:
    (..., head_dim); cos and sin: of shapes that broadcast to (..., head_dim/2)."""
    a, b = x.chunk(2, dim=-1)                                                 # (B, heads, T, head_dim/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: num_attention_heads queries share num_key_value_heads keys and values."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.hidden_size
        kv_width = config.num_key_value_heads * config.head_dim                 # of all keys, of all values
        self.layer = layer                                                      # its number, for the cache
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.q_proj.out_features, d, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:                                                        # Qwen3
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache):                  # x: (B, T, d); cos, sin: (B, 1, T, head_dim/2)
        q, k, v = self.qkv(x)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)                # (B, heads, T, head_dim)
        k = k.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)                # (B, kv_heads, T, head_dim)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)                # (B, kv_heads, T, head_dim)
        if self.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))                        # (B, T, d)

    def qkv(self, x):                                       # plumbing/fast.py makes one product of them
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):                                                       # (B, T, d) -> (B, T, d)
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)

    def gate_up(self, x):                                   # plumbing/fast.py makes one product of them
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on normed input and added to what came in."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A decoder-only transformer. Calling it gives hidden states; `logits` turns these into logits. A new one
    has random weights. plumbing/checkpoint.py loads those of a folder, and sets `fingerprint` (a hash by
    which adapters know their base) and, with a vocabulary, `tokenizer` and `template` (the chat format)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()                      # only so that names begin with "model." as in the files
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.tokenizer = None
        self.template = None
        self.fingerprint = ""

    def forward(self, tokens, positions=None, cache=None):
        """Final hidden states, after the last norm: (B, T, d).

        tokens: ints (B, T). positions: ints (B, T), by default 0..T-1 for every row. cache: an object such as
        trie_cache.Pass. Its `attend(layer, q, k, v)` does the attention of these tokens, with what it has
        kept of earlier ones: q (B, heads, T, head_dim), k and v (B, kv_heads, T, head_dim) -> (B, heads, T,
        head_dim). Without one, each token looks at itself and those before it in its row.
        """
        x = self.model.embed_tokens(tokens)                                     # (B, T, d)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=x.device)[None]    # (1, T)
        exact = torch.promote_types(x.dtype, torch.float32)
        frequencies = rotary_frequencies(self.config).to(x.device, exact)       # (head_dim/2,)
        angles = positions[:, None, :, None].to(exact) * frequencies            # (B, 1, T, head_dim/2)
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        return self.model.norm(x)

    def logits(self, hidden):
        """Logits of the next token: (..., d) -> (..., V)."""
        return self.lm_head(hidden)

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    @property
    def vocabulary(self):
        """What tells its vocabulary from others: the tokenizer's fingerprint, or "" without one."""
        return self.tokenizer.fingerprint if self.tokenizer else ""
