"""
The language model: a Llama in plain PyTorch, its checkpoint loader and its tokenizer.

Every network of this repository (policy, guard, MRM) is this class with other weights. It reads checkpoints in
the Hugging Face layout: a folder with config.json and *.safetensors. Modules carry the tensor names of that
layout, so loading needs no table of names.

Sources:
- Llama: Touvron et al. 2023, arXiv 2302.13971; Llama 3: Grattafiori et al. 2024, arXiv 2407.21783
- RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467
- rotary embedding (RoPE): Su et al. 2021, arXiv 2104.09864
- grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245; SwiGLU: Shazeer 2020, arXiv 2002.05202

Shapes: B sequences, T tokens each, d = hidden_size, V = vocab_size.
"""

import argparse
import base64
import codecs
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open


class BadInput(ValueError):
    """Something the user gave (a file, an argument, a prompt) cannot be used. Command lines print it and exit 2."""


DTYPES = ["float32", "float64", "bfloat16", "float16"]      # what --dtype takes


def at_least_1(text):
    """For argparse: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and the epilog of --help as it is written."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists all options)\n")


def read_json(path):
    """The JSON object in a file. Raises BadInput when the file is absent or is not a JSON object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path):
    """(line number, object) of each line of a file of JSON objects. Raises BadInput, with the line number, for a
    line that is none, and when the file cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BadInput(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {number}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def write_file(path, write):
    """Write a file by write(path) under a temporary name, and rename it: what was there stays until all is there."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------
# configuration

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

    @classmethod
    def load(cls, folder):
        """Read folder/config.json. Raises BadInput for an absent or broken file and for an architecture that is
        not a plain Llama."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
        if architecture not in ("LlamaForCausalLM", "llama"):
            raise BadInput(f"{path}: architecture {architecture!r} is not supported, only LlamaForCausalLM is")
        for key, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if raw.get(key, plain) != plain:
                raise BadInput(f"{path}: {key} = {raw[key]!r} is not supported, only {plain!r} is")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling")   # newer files use the first name
        kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
        if kind not in ("default", "llama3"):
            raise BadInput(f"{path}: rope type {kind!r} is not supported, only 'default' and 'llama3' are")
        if kind == "llama3":
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                if key not in rope:
                    raise BadInput(f"{path}: the field {key} of the rope scaling is missing")
        eos = raw.get("eos_token_id")
        try:
            config = cls(
                vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"], num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=raw["num_attention_heads"],
                num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                max_position_embeddings=raw["max_position_embeddings"],
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=(rope or {}).get("rope_theta") or raw.get("rope_theta", 10000.0),
                rope_scaling=rope if kind == "llama3" else None,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
                name=raw.get("_name_or_path") or Path(folder).resolve().name)
        except KeyError as key:
            raise BadInput(f"{path}: the field {key} is missing") from None
        if config.num_attention_heads % config.num_key_value_heads:
            raise BadInput(f"{path}: num_attention_heads = {config.num_attention_heads} is no multiple of "
                           f"num_key_value_heads = {config.num_key_value_heads}")
        return config

    @property
    def linear_params(self):
        """Weights that every token is multiplied with (all layers' projections, without embedding and head)."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


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
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)   # turns within the first context
    blend = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    blend = blend.clamp(0, 1)                                                   # 0: stretched, 1: as it was
    return blend * frequency + (1 - blend) * frequency / s["factor"]


# ---------------------------------------------------------------------------------------------------------------
# the network

def packable(dtype):
    """Whether oneDNN, torch's library for x86 and ARM processors, is there and multiplies this type well."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight):
    """A copy of a weight in the blocked order that oneDNN reads fastest, made at first use and again after the weight
    was changed. It is kept as a field of the weight: models that share a weight share its copy."""
    state = (weight.data_ptr(), weight._version)
    if getattr(weight, "packed_state", None) != state:
        weight.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        weight.packed_state = state
    return weight.packed


class Linear(nn.Linear):
    """y = x Wᵀ, without bias. On a CPU, where no gradient is asked for, by oneDNN on a packed W: with few rows a
    product costs what reading W costs, and a packed W is read two to three times as fast."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self):
        if self.weight.device.type != "meta":       # there, nothing can be drawn, and to try costs a second of imports
            super().reset_parameters()

    def forward(self, x):                                                       # (..., d_in)
        if (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu"
                or not packable(x.dtype)):
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed(self.weight), None, "none", [], "")     # (..., d_out)


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
    """Apply RoPE: dimensions i and i + head_dim/2 of each head are one pair, turned by the token's angle. x: (...,
    head_dim); cos and sin: of shapes that broadcast to (..., head_dim/2)."""
    a, b = x.chunk(2, dim=-1)                                                   # (B, heads, T, head_dim/2) each
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

    `tokenizer` and `template` (the chat format) are set by `load` when the folder has a vocabulary.
    `fingerprint` is a hash of the first row of every weight: adapters are tied to it, whatever the folder's name.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()                      # only so that names begin with "model." as in the files
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size,
                                               _weight=torch.zeros(config.vocab_size, config.hidden_size))
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # On the meta device, where `load` builds its model, there are no numbers; it sets them itself.
        self.frequencies = None if torch.get_default_device().type == "meta" else rotary_frequencies(config)
        self.tokenizer = self.template = None
        self.fingerprint = ""

    def forward(self, tokens, positions=None, cache=None):
        """Final hidden states, after the last norm: (B, T, d).

        tokens: ints (B, T). positions: ints (B, T), by default 0..T-1. cache: an object whose `attend(layer, q, k, v)`
        does the attention of these tokens, with whatever it has kept of earlier ones, from q (B, heads, T, head_dim)
        and k, v (B, kv_heads, T, head_dim) to (B, heads, T, head_dim); by default, each token looks at itself and
        those before it in its row.
        """
        x = self.model.embed_tokens(tokens)                                     # (B, T, d)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=x.device)[None]    # (1, T)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = positions[:, None, :, None].to(exact) * self.frequencies.to(x.device, exact)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)           # (B, 1, T, head_dim/2)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        return self.model.norm(x)

    def logits(self, hidden):
        """Scores of the next token: (..., d) -> (..., V)."""
        return self.lm_head(hidden)

    @property
    def device(self):
        return self.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.norm.weight.dtype

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu"):
        """Load a Llama checkpoint in the Hugging Face layout (one file, or shards with an index), frozen.

        Raises BadInput, with the file and the tensor named, for anything missing, extra or misshapen, and for a
        device that this machine does not have.
        """
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise BadInput(f"device {device!r} cannot be used on this machine: cpu always can, cuda where torch finds "
                           "such a processor") from None
        folder = Path(folder)
        if not folder.is_dir():
            raise BadInput(f"{folder}: no such folder; expected one with config.json and model.safetensors")
        config = LlamaConfig.load(folder)
        with torch.device("meta"):                                              # shapes only, no memory
            model = cls(config)
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found, first_rows = {}, {}
        for path in checkpoint_files(folder):
            for name, tensor in read_tensors(path):
                if name.endswith("rotary_emb.inv_freq"):                        # old files carry what we compute
                    continue
                if name == "lm_head.weight" and config.tie_word_embeddings:     # a copy of the embedding
                    continue
                if name not in wanted:
                    raise BadInput(f"{path}: tensor {name} does not belong to a Llama of this config.json")
                if tensor.shape != wanted[name]:
                    raise BadInput(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                                   f"config.json asks for {tuple(wanted[name])}")
                first_rows[name] = tensor[0].float().numpy().tobytes()          # before rounding to dtype
                found[name] = tensor.to(device, dtype)
        for name in wanted:
            if name not in found:
                raise BadInput(f"{folder}: tensor {name} is missing from the safetensors files")
        model.fingerprint = hashlib.sha256(b"".join(first_rows[name] for name in sorted(found))).hexdigest()[:12]
        model.load_state_dict(found, strict=False, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.frequencies = rotary_frequencies(config)
        model.requires_grad_(False)
        if (folder / "vocab.tiktoken").exists():
            model.tokenizer = Tokenizer(folder)
            if model.tokenizer.size > config.vocab_size:
                raise BadInput(f"{folder}: the vocabulary has {model.tokenizer.size} tokens, "
                               f"config.json says vocab_size = {config.vocab_size}")
            model.template = model.tokenizer.template("chat")
        return model


def checkpoint_files(folder):
    """The safetensors files of a checkpoint: the shards that the index names, or the single file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise BadInput(f"{index}: expected a weight_map from tensor names to file names")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise BadInput(f"{folder / name}: no such file")
    return [folder / name for name in names]


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file, one at a time. Raises BadInput when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None


# ---------------------------------------------------------------------------------------------------------------
# text

@dataclass
class Template:
    """The tokens around a conversation: prefix + user + infix + reply. A guard that is asked for its verdict in words
    reads the suffix after that."""
    prefix: list
    infix: list
    suffix: list = field(default_factory=list)

    def __call__(self, user, reply=()):
        return [*self.prefix, *user, *self.infix, *reply]


@dataclass
class Prompt:
    """What a search is asked: the user's tokens, and the opening that the reply is forced to begin with.

    The policy always reads the prefill. The guard and the MRM read it as the beginning of the reply, unless
    hide_prefill is set. It is never part of a result's tokens.
    """
    user: list
    prefill: list = field(default_factory=list)
    hide_prefill: bool = False

    def policy_tokens(self, template):
        return template(self.user, self.prefill)

    def reward_tokens(self, template):
        return template(self.user, () if self.hide_prefill else self.prefill)


class Tokenizer:
    """Byte-pair encoding by tiktoken on a local vocabulary; nothing is downloaded.

    folder holds vocab.tiktoken (one line for each token: base64 of its bytes, its rank) and tokenizer_config.json, of which
    these fields are read: `pattern` (the pre-tokenizer's regular expression), `special_tokens` (text to id) and
    `templates` (name to {"prefix": text, "infix": text}, in which control tokens count as such).
    Raises BadInput when one of the files is absent or broken.
    """

    def __init__(self, folder):
        path, config_path = Path(folder) / "vocab.tiktoken", Path(folder) / "tokenizer_config.json"
        self.path = config_path
        config = read_json(config_path)
        try:
            data = path.read_bytes()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())}
            self.special = dict(config["special_tokens"])
            self.templates = config["templates"]
            self.size = max(*ranks.values(), *self.special.values()) + 1
            # tiktoken stops the program at a byte that has no token (SmolLM2 lacks 21 that are rare or no UTF-8):
            # such a byte gets an id beyond the vocabulary here, and `encode` leaves it out.
            absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
            ranks |= {byte: self.size + i for i, byte in enumerate(absent)}
            self.encoding = tiktoken.Encoding(path.stem, pat_str=config["pattern"], mergeable_ranks=ranks,
                                              special_tokens=self.special)
        except KeyError as key:
            raise BadInput(f"{config_path}: the field {key} is missing") from None
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: not a readable vocabulary ({error})") from None
        self.fingerprint = hashlib.sha256(data).hexdigest()[:12]    # equal for equal vocabularies
        self.control = set(self.special.values())

    def encode(self, text):
        """Token ids of plain text: what looks like a control token is ordinary text here. Bytes that have no token
        are left out. Raises BadInput for text that is not Unicode (an argument with undecodable bytes)."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput("the text is not valid Unicode: it has unpaired surrogates")
        return [token for token in self.encoding.encode_ordinary(text) if token < self.size]

    def template(self, name):
        """The Template of that name. Its texts are the repository's own, so control tokens are allowed."""
        try:
            parts = self.templates[name]
            parts["prefix"], parts["infix"]
        except (KeyError, TypeError):
            raise BadInput(f"{self.path}: no template {name!r} with a prefix and an infix") from None
        return Template(*(self.encoding.encode(text, allowed_special="all")
                          for text in (parts["prefix"], parts["infix"], parts.get("suffix", ""))))

    def prompt(self, user, prefill="", hide_prefill=False):
        """A Prompt, tokenized piece by piece. Raises BadInput for an empty text."""
        prompt = Prompt(self.encode(user), self.encode(prefill), hide_prefill)
        if not user.strip() or not prompt.user:
            raise BadInput("the prompt is empty; expected some text")
        return prompt

    def decode(self, tokens):
        """The text of token ids, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.pieces(tokens))

    def token_bytes(self, token):
        """The bytes that a token stands for: none for a control token, nor for one that pads the head."""
        silent = token in self.control or token >= self.size
        return b"" if silent else self.encoding.decode_single_token_bytes(token)

    def pieces(self, tokens):
        """The text that each token adds, such that the pieces joined are the whole text. A character whose bytes
        are spread over several tokens comes with the last of them: a stream never shows half a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self.token_bytes(token)) for token in tokens]
        tail = decoder.decode(b"", final=True)
        return pieces[:-1] + [pieces[-1] + tail] if pieces else pieces
