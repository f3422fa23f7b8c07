"""
The language model: a Llama in plain PyTorch. The network stands first, how a checkpoint is loaded after it.

Every network of this repository (policy, guard, MRM) is this class with other weights. It reads checkpoints
in the Hugging Face layout: a folder with config.json and *.safetensors. Modules carry the tensor names of
that layout, so loading needs no table of names.

Sources:
- Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
- RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
- rotary embedding (RoPE): Su et al. 2021, arXiv 2104.09864
- grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245

Shapes: B sequences, T tokens each, d = hidden_size, V = vocab_size.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from files import BadInput, read_json, reading
from tokenizer import Tokenizer

import torch                                    # after files, which says why
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
DTYPES = ["float32", "float64", "bfloat16", "float16"]      # what --dtype takes


@dataclass
class LlamaConfig:
    """The fields of config.json that a Llama needs, under their Hugging Face names."""
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
    eos_token_ids: tuple = ()              # every id that ends a sequence
    name: str = ""                         # which checkpoint this is, for messages

    @property
    def linear_params(self):
        """Weights that every token is multiplied with: all layers' projections, not embedding and head."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads     # of q and o, of k and v
        rows = heads * self.head_dim + 3 * self.intermediate_size
        return self.num_hidden_layers * self.hidden_size * rows


def rotary_frequencies(config):
    """RoPE's angular frequency of each pair of dimensions, in radians a position: float64 (head_dim / 2,).

    Llama 3 stretches the long wavelengths: those above original_context / low_freq_factor by `factor`, those
    below original_context / high_freq_factor not at all, and those between by a blend of both.
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
        d, h = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, h
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(d, config.num_attention_heads * h)
        self.k_proj = Linear(d, config.num_key_value_heads * h)
        self.v_proj = Linear(d, config.num_key_value_heads * h)
        self.o_proj = Linear(config.num_attention_heads * h, d)

    def forward(self, x, cos, sin, cache):                                      # x: (B, T, d)
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
        qk = rotate(split(torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1)), cos, sin)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        v = split(self.v_proj(x))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))                        # (B, T, d)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
    """A decoder-only transformer. Calling it gives hidden states; `logits` turns those into scores of tokens.

    A new one has no weights: `Llama.load` gives it those of a checkpoint, its `tokenizer` and `template` (the
    chat format), where the folder has a vocabulary, and a `fingerprint`, a hash of the first row of every
    weight: adapters are tied to it, whatever the folder's name.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()                      # only so that names begin with "model." as in the files
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        self.model.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.tokenizer = self.template = None
        self.fingerprint = ""

    def forward(self, tokens, positions=None, cache=None):
        """Final hidden states, after the last norm: (B, T, d).

        tokens: ints (B, T). positions: ints (B, T), by default 0..T-1. cache: an object whose `attend(layer,
        q, k, v)` does the attention of these tokens, with whatever it has kept of earlier ones, from q (B,
        heads, T, head_dim) and k, v (B, kv_heads, T, head_dim) to (B, heads, T, head_dim); by default, each
        token looks at itself and those before it in its row.
        """
        x = self.model.embed_tokens(tokens)                                     # (B, T, d)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=x.device)[None]    # (1, T)
        exact = torch.promote_types(x.dtype, torch.float32)
        frequencies = rotary_frequencies(self.config).to(x.device, exact)       # (head_dim/2,)
        angles = positions[:, None, :, None].to(exact) * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)           # (B, 1, T, head_dim/2)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        return self.model.norm(x)

    def logits(self, hidden):
        """Scores of the next token: (..., d) -> (..., V)."""
        return self.lm_head(hidden)

    device = property(lambda self: self.model.norm.weight.device)
    dtype = property(lambda self: self.model.norm.weight.dtype)

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu"):
        """The Llama of a checkpoint in the Hugging Face layout (one file, or shards with an index), frozen.

        Raises BadInput, which names file and tensor, for anything missing, extra or misshapen, and for a
        device that this machine does not have."""
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise BadInput(f"device {device!r} cannot be used on this machine; cpu always can") from None
        folder = Path(folder)
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder; expected one with config.json and model.safetensors")
        config = read_config(folder)
        with torch.device("meta"):                                              # shapes only, no memory
            model = cls(config)
        weights, model.fingerprint = read_weights(folder, model, dtype, device)
        model.load_state_dict(weights, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.requires_grad_(False)
        if (folder / "vocab.tiktoken").exists():
            model.tokenizer = Tokenizer(folder)
            if model.tokenizer.size > config.vocab_size:
                raise BadInput(f"{folder}: the vocabulary has {model.tokenizer.size} tokens, "
                               f"config.json says vocab_size = {config.vocab_size}")
            model.template = model.tokenizer.template("chat")
        return model


# ------------------------------------------------------------------------------------------------------------
# checkpoints

def read_config(folder):
    """The LlamaConfig of folder/config.json. Raises BadInput for an absent or broken file and for an
    architecture that is not a plain Llama."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    if architecture not in ("LlamaForCausalLM", "llama"):
        raise BadInput(f"{path}: architecture {architecture!r} is not supported, only LlamaForCausalLM is")
    for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, plain) != plain:
            raise BadInput(f"{path}: {key} = {raw[key]!r} is not supported, only {plain!r} is")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}        # newer files use the first name
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadInput(f"{path}: rope type {kind!r} is not supported, only 'default' and 'llama3' are")
    needed = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind == "llama3" and not needed <= rope.keys():
        raise BadInput(f"{path}: the rope scaling lacks {', '.join(sorted(needed - rope.keys()))}")
    eos = raw.get("eos_token_id")
    try:
        config = LlamaConfig(
            **{key: raw[key] for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings")},
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            rope_scaling=rope if kind == "llama3" else None,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            name=raw.get("_name_or_path") or Path(folder).resolve().name)
    except KeyError as key:
        raise BadInput(f"{path}: the field {key} is missing") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadInput(f"{path}: num_attention_heads is no multiple of num_key_value_heads")
    return config


def read_weights(folder, model, dtype, device):
    """(name to tensor, fingerprint) of a checkpoint for this model."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    found, first_rows = {}, {}
    for path in checkpoint_files(folder):
        for name, tensor in read_tensors(path):
            if name.endswith("rotary_emb.inv_freq"):                         # old files carry what we compute
                continue
            if name == "lm_head.weight" and model.config.tie_word_embeddings:   # a copy of the embedding
                continue
            if name not in wanted:
                raise BadInput(f"{path}: tensor {name} does not belong to a Llama of this config.json")
            if tensor.shape != wanted[name]:
                raise BadInput(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                               f"config.json asks for {tuple(wanted[name])}")
            first_rows[name] = tensor[0].float().numpy().tobytes()              # before rounding to dtype
            found[name] = tensor.to(device, dtype)
    for name in wanted.keys() - found.keys():
        raise BadInput(f"{folder}: tensor {name} is missing from the safetensors files")
    return found, hashlib.sha256(b"".join(first_rows[name] for name in sorted(found))).hexdigest()[:12]


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: the shards that the index names, or the single file."""
    index, paths = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists():
        with reading(index, "an index with a weight_map from tensor names to file names"):
            paths = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    for path in paths:
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
    return paths


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file, one at a time. Raises BadInput when the file is damaged."""
    with reading(path, "a readable safetensors file"), safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


# ------------------------------------------------------------------------------------------------------------
# products that are fast on a CPU

class Linear(nn.Module):
    """y = x Wᵀ, without bias. On a CPU, where no gradient is asked for, by oneDNN on a packed W: with few
    rows a product costs what reading W costs, and a packed W is read two to three times as fast."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x):                                                       # (..., d_in)
        if (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
                or not packable(x.dtype)):
            return F.linear(x, self.weight)                                     # (..., d_out)
        return torch.ops.mkldnn._linear_pointwise(x, packed(self.weight), None, "none", [], "")


def packable(dtype):
    """Whether oneDNN, torch's library for x86 and ARM processors, is there and multiplies this type well."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight):
    """A copy of a weight in the blocked order that oneDNN reads fastest, made at first use and again after
    the weight was changed. It is kept as a field of the weight: models that share a weight share its copy."""
    state = (weight.data_ptr(), weight._version)
    if getattr(weight, "packed_state", None) != state:
        weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weight.packed_state = state
    return weight.packed
