"""
Checkpoints of the Hugging Face hub: folders as they are there, with weights in safetensors.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from model import Llama
from plumbing.config import STREAM_GUARD, read_config
from plumbing.errors import BadInput
from plumbing.fast import speed_up
from plumbing.files import read_json, reading
from plumbing.tokenizer import Tokenizer

DEFAULT = Path(__file__).resolve().parents[1] / "data" / "smollm2"      # the default checkpoint

def load_llama(folder, dtype=torch.float32, device="cpu", heads=None):
    """The Llama of a checkpoint in the Hugging Face layout (one file, or shards), frozen. The default weights
    are fetched and converted first, if they are not here yet. Raises BadInput, which names file or tensor,
    for anything missing, extra or misshapen, and for a device that this machine does not have. heads: a dict
    that takes the tensors of a Qwen3Guard-Stream's heads."""
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
    if read_json(folder / "config.json").get("architectures") == [STREAM_GUARD]:
        own = {name for name in weights if name.startswith(("model.", "lm_head."))}
        others = {name: weights.pop(name) for name in weights.keys() - own}
        if heads is not None:
            heads |= others
        if "model.embed_tokens.weight" in weights:          # it has no unembedding of its own, and needs none
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
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
    config.end_of_turn = end_of_turn(model)
    return speed_up(model)


def end_of_turn(llama):
    """Of the tokens that end a sequence, the one that ends a turn: the control token after the user's text in
    the chat format, or tokenizer_config.json's eos_token, or else the first. None where there is none."""
    ends = llama.config.eos_token_ids
    wanted = llama.template.infix[:1] if llama.template else []
    if llama.tokenizer:
        wanted.append(llama.tokenizer.eos_token)
    return next((token for token in [*wanted, *ends] if token in ends), None)


def identity(llama):
    """12 hex digits of all that decides what a checkpoint says: weights, vocabulary, chat format, ends. They
    are the same wherever the folder is, and others when something in it was replaced."""
    texts = llama.tokenizer.texts if llama.tokenizer else {}
    content = [llama.fingerprint, llama.vocabulary, texts, llama.config.eos_token_ids]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def prepare_default():
    """Fetch and convert the default weights, unless they are here. Raises BadInput where that fails."""
    if all((DEFAULT / name).exists() for name in ("model.safetensors", "tokenizer.json")):
        return
    print("The default weights are not here yet: running data/smollm2/prepare.py", file=sys.stderr)
    if subprocess.run([sys.executable, DEFAULT / "prepare.py"]).returncode:
        raise BadInput("the default weights could not be prepared; choose others with "
                       "--policy and --mrm_base (train_mrm.py: --base)")


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
