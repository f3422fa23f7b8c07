"""
The language model: a Llama in plain PyTorch. The network stands first, how a checkpoint is loaded after it.

Every network of this repository (policy, guard, MRM) is this class with other weights. It reads folders as
they are on the Hugging Face hub: Llama, Qwen2, Qwen3, and Mistral for texts no longer than its window.
Modules have the names of the tensors in these folders, so loading needs no table of names.

Sources:
- Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
- RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467; SwiGLU: Shazeer 2020, arXiv 2002.05202
- rotary embedding (RoPE): Su et al. 2021, arXiv 2104.09864
- grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245
- Mistral: arXiv 2310.06825; Qwen2: arXiv 2407.10671; Qwen3: arXiv 2505.09388

Shapes: B sequences, T tokens each, d = hidden_size, V = vocab_size.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from files import BadInput, check, check_keys, field, read_json, reading
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
    qkv_bias: bool = False                 # Qwen2: q, k and v have a bias
    qk_norm: bool = False                  # Qwen3: the heads of q and k are normed
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
        self.q_proj = Linear(d, config.num_attention_heads * h, config.qkv_bias)
        self.k_proj = Linear(d, config.num_key_value_heads * h, config.qkv_bias)
        self.v_proj = Linear(d, config.num_key_value_heads * h, config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * h, d)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(h, config.rms_norm_eps), RMSNorm(h, config.rms_norm_eps)

    def forward(self, x, cos, sin, cache):                                      # x: (B, T, d)
        split = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
        qk = split(torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1))   # (B, heads + kv_heads, T, head_dim)
        if hasattr(self, "q_norm"):                                             # Qwen3
            q, k = qk.split((self.heads, self.kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
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
    vocabulary = property(lambda self: self.tokenizer.fingerprint if self.tokenizer else "")

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
        if (folder / "tokenizer.json").exists():
            model.tokenizer = Tokenizer(folder)
            if model.tokenizer.size > config.vocab_size:
                raise BadInput(f"{folder}: the vocabulary has {model.tokenizer.size} tokens, "
                               f"config.json says vocab_size = {config.vocab_size}")
            if "chat" in model.tokenizer.texts:
                model.template = model.tokenizer.template("chat")
        return model


# ------------------------------------------------------------------------------------------------------------
# checkpoints

# Keys of config.json that do not affect the result. All others must be read, or null, false or empty.
NEUTRAL = """architectures model_type _name_or_path torch_dtype dtype transformers_version bos_token_id
    pad_token_id unk_token_id initializer_range attention_dropout use_cache pretraining_tp max_window_layers
    layer_types is_decoder is_llama_config tokenizer_class auto_map task_specific_params
    transformers.js_config unsloth_version unsloth_fixed keys_to_ignore_at_inference
    _attn_implementation_autoset return_dict id2label label2id max_length""".split()


def read_config(folder, path=None):
    """The LlamaConfig of a folder: config.json (or `path`), and the ids that end a sequence in
    generation_config.json too. Raises BadInput for an absent or broken file, and for what this Llama does not
    compute."""
    path, generation = path or folder / "config.json", folder / "generation_config.json"
    raw = read_json(path)
    also = read_json(generation).get("eos_token_id") if generation.exists() else None
    with reading(path, "the config.json of a language model"):
        architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
        family = architecture.removesuffix("ForCausalLM").lower()
        if family not in ("llama", "mistral", "qwen2", "qwen3") or raw.get("model_type", family) != family:
            raise BadInput(f"architecture {architecture!r} is not supported, only LlamaForCausalLM, "
                           "MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are")
        integer = lambda name, high, default=...: field(raw, name, int, 1, high, default)
        width, heads = integer("hidden_size", 2 ** 20), integer("num_attention_heads", 2 ** 16)
        length, window = integer("max_position_embeddings", 2 ** 31), integer("sliding_window", 2 ** 31, None)
        if family == "mistral" and "sliding_window" not in raw:
            window = 4096                                   # what that means in transformers
        if window and raw.get("use_sliding_window", family == "mistral"):
            length = min(length, window)                    # in a shorter text, the window is not in effect
        scaling, theta = read_rope(raw)
        kv_heads = integer("num_key_value_heads", 2 ** 16, heads if family == "llama" else ...)
        config = LlamaConfig(
            vocab_size=integer("vocab_size", 2 ** 24), hidden_size=width,
            intermediate_size=integer("intermediate_size", 2 ** 20),
            num_hidden_layers=integer("num_hidden_layers", 1000), num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=length,
            head_dim=integer("head_dim", 2 ** 16, 128 if family == "qwen3" else width // heads),
            rms_norm_eps=field(raw, "rms_norm_eps", float, 0, 1, 1e-6),
            rope_theta=theta, rope_scaling=scaling,
            tie_word_embeddings=field(raw, "tie_word_embeddings", bool, default=False),
            eos_token_ids=tuple(dict.fromkeys(
                i for ids in (raw.get("eos_token_id"), also)
                for i in (ids if isinstance(ids, list) else [ids]) if i is not None)),
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
            name=field(raw, "_name_or_path", str, default="") or folder.resolve().name)
        own = {"qkv_bias", "qk_norm", "eos_token_ids", "name"}      # fields of ours, not of config.json
        read = [*(vars(config).keys() - own), "rope_parameters", "eos_token_id", "sliding_window",
                "use_sliding_window"]
        check_keys(raw, dict.fromkeys(NEUTRAL + read) | {"hidden_act": ["silu"]})
        if heads % kv_heads or config.head_dim % 2:
            raise BadInput("num_attention_heads is not a multiple of num_key_value_heads, or head_dim is odd")
        for i in config.eos_token_ids:
            check(i, "eos_token_id (here or in generation_config.json)", int, 0, config.vocab_size - 1)
    return config


def read_rope(raw):
    """(Llama 3's scaling or None, theta) of a config.json. Newer files have both in `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope != (raw.get("rope_scaling") or rope):
        raise BadInput("rope_parameters and rope_scaling are not the same")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    check_keys({"rope type": kind}, {"rope type": ["default", "llama3"]})
    check_keys(rope, dict.fromkeys(["type", "rope_type", "rope_theta"] + scaling * (kind == "llama3")))
    return ({key: field(rope, key, float, 1e-9, 1e12) for key in scaling} if kind == "llama3" else None,
            field(rope, "rope_theta", float, 1, 1e30, field(raw, "rope_theta", float, 1, 1e30, 1e4)))


def read_weights(folder, model, dtype, device):
    """(name to tensor, fingerprint) of a checkpoint for this model."""
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    found, first_rows, tied = {}, {}, model.config.tie_word_embeddings
    for path in checkpoint_files(folder):
        for name, tensor in read_tensors(path):
            if name.endswith("rotary_emb.inv_freq"):                         # old files carry what we compute
                continue
            shape = wanted.get("model.embed_tokens.weight" if tied and name == "lm_head.weight" else name)
            if shape is None:
                raise BadInput(f"{path}: tensor {name} does not belong to a model of this config.json")
            if tensor.shape != shape or not tensor.is_floating_point():
                raise BadInput(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, type {tensor.dtype}, "
                               f"config.json asks for {tuple(shape)} of floating point")
            if name in wanted:
                first_rows[name] = tensor[0].float().numpy().tobytes()          # before rounding to dtype
            found[name] = tensor.to(device, dtype)
    for name in wanted.keys() - found.keys():
        raise BadInput(f"{folder}: tensor {name} is missing from the safetensors files")
    head = found.pop("lm_head.weight", None) if tied else None
    if head is not None and not torch.equal(head, found["model.embed_tokens.weight"]):
        raise BadInput(f"{folder}: config.json has tie_word_embeddings = true, but lm_head.weight in the "
                       "safetensors files is not the embedding")
    return found, hashlib.sha256(b"".join(first_rows[name] for name in sorted(found))).hexdigest()[:12]


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: the single file, or else (as in transformers) the index's."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.exists() or not index.exists():
        return [single]
    raw = read_json(index)
    with reading(index, "an index with a weight_map from tensor names to file names"):
        names = sorted(set(raw["weight_map"].values()))
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise BadInput("the weight_map may name only safetensors files in the same folder")
    return [folder / name for name in names]


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file, one at a time. Raises BadInput when the file is damaged."""
    with reading(path, "a readable safetensors file"), safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


# ------------------------------------------------------------------------------------------------------------
# products that are fast on a CPU

class Linear(nn.Module):
    """y = x Wᵀ, for Qwen2's q, k, v with a bias. On a CPU without gradients, oneDNN multiplies by a
    packed W. With few rows a product costs what reading W costs, and a packed W is read two to three times as
    fast."""

    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x):                                                       # (..., d_in)
        if (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
                or not packable(x.dtype)):
            return F.linear(x, self.weight, self.bias)                          # (..., d_out)
        return torch.ops.mkldnn._linear_pointwise(x, packed(self.weight), self.bias, "none", [], "")


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
