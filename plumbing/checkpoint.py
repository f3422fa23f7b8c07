"""
Checkpoints of the Hugging Face hub: config.json, and weights in safetensors.

load_llama reads folders as they are there: Llama, Qwen2, Qwen3, and Mistral for texts no longer than its
window. What would change the numbers and is not computed here is refused by its name.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from model import Llama, LlamaConfig
from plumbing.errors import BadInput
from plumbing.fast import speed_up
from plumbing.files import check, check_keys, read_field, read_json, reading
from plumbing.tokenizer import Tokenizer

DEFAULT = Path(__file__).resolve().parents[1] / "data" / "smollm2"      # the default checkpoint

# Keys of config.json without a field of LlamaConfig: they do not affect the result, or are read apart. All
# others must be null, false or empty.
NEUTRAL = """rope_parameters eos_token_id sliding_window use_sliding_window
    architectures model_type _name_or_path torch_dtype dtype transformers_version bos_token_id
    pad_token_id unk_token_id initializer_range attention_dropout use_cache pretraining_tp max_window_layers
    layer_types is_decoder is_llama_config tokenizer_class auto_map task_specific_params
    transformers.js_config unsloth_version unsloth_fixed keys_to_ignore_at_inference
    _attn_implementation_autoset return_dict id2label label2id max_length""".split()


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """The Llama of a checkpoint in the Hugging Face layout (one file, or shards), frozen. The default weights
    are fetched and converted first, if they are not here yet. Raises BadInput, which names file or tensor,
    for anything missing, extra or misshapen, and for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"device {device!r} cannot be used on this machine; cpu always can") from None
    folder = Path(folder)
    if folder.resolve() == DEFAULT:
        prepare_default()
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; expected one with config.json and model.safetensors")
    config = read_config(folder)
    with torch.device("meta"):                                              # shapes only, no memory
        model = Llama(config)
    weights, model.fingerprint = read_weights(folder, config, dtype, device)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for Llama: ")
        raise BadInput(f"{folder}, as config.json describes it: {said[:300]}") from None
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
    return speed_up(model)


def prepare_default():
    """Fetch and convert the default weights, unless they are here. Raises BadInput where that fails."""
    if all((DEFAULT / name).exists() for name in ("model.safetensors", "tokenizer.json")):
        return
    print("The default weights are not here yet: running data/smollm2/prepare.py", file=sys.stderr)
    if subprocess.run([sys.executable, DEFAULT / "prepare.py"]).returncode:
        raise BadInput("the default weights could not be prepared; choose others with "
                       "--policy and --mrm_base (train_mrm.py: --base)")


def read_config(folder, path=None):
    """The LlamaConfig of a folder: config.json (or `path`), and the ids that end a sequence in
    generation_config.json too. Raises BadInput for an absent or broken file, and for what this Llama does not
    compute."""
    path = path or folder / "config.json"
    raw = read_json(path)
    ends = [raw.get("eos_token_id")]
    if (folder / "generation_config.json").exists():
        ends.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    with reading(path, "the config.json of a language model"):
        architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
        family = architecture.removesuffix("ForCausalLM").lower()
        if family not in ("llama", "mistral", "qwen2", "qwen3") or raw.get("model_type", family) != family:
            raise BadInput(f"architecture {architecture!r} is not supported, only LlamaForCausalLM, "
                           "MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are")
        length = read_field(raw, "max_position_embeddings", int, 1, 2 ** 31)
        window = read_field(raw, "sliding_window", int, 1, 2 ** 31, None)
        if family == "mistral" and "sliding_window" not in raw:
            window = 4096                                   # what that means in transformers
        if window and raw.get("use_sliding_window", family == "mistral"):
            length = min(length, window)                    # in a shorter text, the window is not in effect
        width = read_field(raw, "hidden_size", int, 1, 2 ** 20)
        heads = read_field(raw, "num_attention_heads", int, 1, 2 ** 16)
        all_heads = heads if family == "llama" else ...             # the default, where there is one
        kv_heads = read_field(raw, "num_key_value_heads", int, 1, 2 ** 16, all_heads)
        head_dim = 128 if family == "qwen3" else width // heads     # the default
        scaling, theta = read_rope(raw)
        config = LlamaConfig(
            vocab_size=read_field(raw, "vocab_size", int, 1, 2 ** 24), hidden_size=width,
            intermediate_size=read_field(raw, "intermediate_size", int, 1, 2 ** 20),
            num_hidden_layers=read_field(raw, "num_hidden_layers", int, 1, 1000), num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=length,
            head_dim=read_field(raw, "head_dim", int, 1, 2 ** 16, head_dim),
            rms_norm_eps=read_field(raw, "rms_norm_eps", float, 0, 1, 1e-6),
            rope_theta=theta, rope_scaling=scaling,
            tie_word_embeddings=read_field(raw, "tie_word_embeddings", bool, default=False),
            eos_token_ids=tuple(dict.fromkeys(
                i for ids in ends for i in (ids if isinstance(ids, list) else [ids]) if i is not None)),
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
            name=read_field(raw, "_name_or_path", str, default="") or folder.resolve().name)
        own = {"qkv_bias", "qk_norm", "eos_token_ids", "name"}      # fields of ours, not of config.json
        known = [*NEUTRAL, *(vars(config).keys() - own)]
        check_keys(raw, dict.fromkeys(known) | {"hidden_act": ["silu"]})
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
    keys = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    check_keys({"rope type": kind}, {"rope type": ["default", "llama3"]})
    check_keys(rope, dict.fromkeys(["type", "rope_type", "rope_theta"] + keys * (kind == "llama3")))
    theta = read_field(rope, "rope_theta", float, 1, 1e30, read_field(raw, "rope_theta", float, 1, 1e30, 1e4))
    if kind == "default":
        return None, theta
    return {key: read_field(rope, key, float, 1e-9, 1e12) for key in keys}, theta


def read_weights(folder, config, dtype, device):
    """({name: tensor}, fingerprint) of a checkpoint. As in transformers, one file comes before shards."""
    single = folder / "model.safetensors"
    found = {}
    first_rows = {}
    for path in [single] if single.exists() else sorted(folder.glob("model-*-of-*.safetensors")) or [single]:
        for name, tensor in read_tensors(path):
            if not tensor.is_floating_point():
                raise BadInput(f"{path}: tensor {name} has the type {tensor.dtype}, expected floating point")
            if name in found:
                raise BadInput(f"{path}: tensor {name} stands in another file of the folder too")
            if not name.endswith("rotary_emb.inv_freq"):                # old files carry what we compute
                first_rows[name] = (tensor[:1] if tensor.dim() else tensor).float().numpy().tobytes()
                found[name] = tensor.to(device, dtype)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in found:
        embedding = found["model.embed_tokens.weight"]
        if not torch.equal(found.setdefault("lm_head.weight", embedding), embedding):
            raise BadInput(f"{folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding")
        first_rows.pop("lm_head.weight", None)
    return found, hashlib.sha256(b"".join(row for _, row in sorted(first_rows.items()))).hexdigest()[:12]


def read_tensors(path):
    """Yield (name, tensor) of a safetensors file, one at a time. Raises BadInput when the file is damaged."""
    with reading(path, "a readable safetensors file"), safe_open(path, framework="pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)
