"""
config.json of the Hugging Face hub: Llama, Qwen2, Qwen3, and Mistral for texts no longer than its window.
What would change the numbers and is not computed here is refused by its name.
"""

import re

from model import LlamaConfig
from plumbing.errors import BadInput
from plumbing.files import check, check_keys, read_field, read_json, reading

# Keys of config.json without a field of LlamaConfig: they do not affect the result, or are read apart. All
# others must be null, false or empty.
NEUTRAL = """rope_parameters eos_token_id sliding_window use_sliding_window
    architectures model_type _name_or_path torch_dtype dtype transformers_version bos_token_id
    pad_token_id unk_token_id initializer_range attention_dropout use_cache pretraining_tp max_window_layers
    layer_types is_decoder is_llama_config tokenizer_class auto_map task_specific_params
    transformers.js_config unsloth_version unsloth_fixed keys_to_ignore_at_inference
    _attn_implementation_autoset _attn_implementation attn_implementation use_sdpa use_flash_attention
    return_dict id2label label2id max_length""".split()

# Qwen3Guard-Stream: the architecture's name, and the keys of its heads.
STREAM_GUARD = "Qwen3ForGuardModel"
OF_HEADS = re.compile(r"guard_inner_size|num_(query_)?(category|risk_level)|(query|response)_\w+_map")

# Keys that are neutral with the library's own default: they choose how to sample, or parts that no Llama has.
DEFAULTS = {"top_k": [50], "top_p": [1.0], "temperature": [1.0], "repetition_penalty": [1.0],
            "num_beams": [1], "num_beam_groups": [1], "num_return_sequences": [1], "length_penalty": [1.0],
            "typical_p": [1.0], "partial_rotary_factor": [1.0], "hidden_act": ["silu"]}


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
        if architecture == STREAM_GUARD:                    # a Qwen3 with heads, which stream_guard.py reads
            family = "qwen3"
            raw = {key: value for key, value in raw.items() if not OF_HEADS.fullmatch(key)}
        if family not in ("llama", "mistral", "qwen2", "qwen3") or raw.get("model_type", family) != family:
            raise BadInput(f"architecture {architecture!r} is not supported, only LlamaForCausalLM, "
                           "MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are")
        length = read_field(raw, "max_position_embeddings", int, 1, 2 ** 31)
        window = read_field(raw, "sliding_window", int, 1, 2 ** 31, None)
        if family == "mistral" and "sliding_window" not in raw:
            window = 4096                                   # what that means in transformers
        if window and (family == "mistral" or raw.get("use_sliding_window")):
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
        own = {"qkv_bias", "qk_norm", "eos_token_ids", "end_of_turn", "name"}   # not of config.json
        known = [*NEUTRAL, *(vars(config).keys() - own)]
        check_keys(raw, dict.fromkeys(known) | DEFAULTS)
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
