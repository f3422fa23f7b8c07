"""
Trained tensors on disk: adapters of this repository, a Llama Guard's folder, the paper's released MRM.

An adapter is a safetensors file: LoRA in float16, head or gain and bias, V_unseen, and what it belongs to.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from files import BadInput, read_json, reading, write_file

import torch
from safetensors import safe_open
from safetensors.torch import save

from model import Llama, read_tensors
from mrm import MRM, Guard, add_lora, llama_guard, trained_tensors
from tokenizer import Template

DEFAULT = Path(__file__).resolve().parent / "data" / "smollm2"      # the default checkpoint, and its adapters


def default_models():
    """The policy, guard and MRM of this repository: one checkpoint and two adapters on it."""
    policy = load_llama(DEFAULT)
    adapter = lambda kind: load_adapter(DEFAULT / f"{kind}.safetensors", policy, kind)
    return policy, adapter("guard"), adapter("mrm")


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """Llama.load. The default weights are fetched and converted first, if they are not here yet."""
    if Path(folder).resolve() == DEFAULT and not (DEFAULT / "model.safetensors").exists():
        print("The default weights are not here yet: running data/smollm2/prepare.py", file=sys.stderr)
        if subprocess.run([sys.executable, DEFAULT / "prepare.py"]).returncode:
            raise BadInput("the default weights could not be prepared; --policy and --mrm_base take others")
    return Llama.load(folder, dtype, device)


def load_guard(path, llama):
    """The guard at `path`: an adapter on `llama`, or a Llama Guard's folder (maybe that of `llama`)."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "guard")
    other = Llama.load(path, llama.dtype, llama.device)
    if vocabulary_of(other) != vocabulary_of(llama) or not other.tokenizer:
        raise BadInput(f"{path} and {llama.config.name} have different vocabularies; they must share one")
    return llama_guard(llama if other.fingerprint == llama.fingerprint else other)


def load_mrm(path, llama):
    """The MRM at `path`: an adapter on `llama`, or a folder in the layout of the released weights, which is
    read in the reward template of the vocabulary."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "mrm")
    if llama.tokenizer is None:
        raise BadInput(f"{llama.config.name} has no vocabulary, so {path} has no template to be read in")
    return load_released_mrm(path, llama, llama.tokenizer.template("reward"))


def vocabulary_of(llama):
    return llama.tokenizer.fingerprint if llama.tokenizer else ""


def save_adapter(reward_model, path, rank, alpha, targets, first_layer, command):
    """Write an adapter, with the settings of its LoRA and the command that made it."""
    llama, template = reward_model.llama, reward_model.template
    metadata = {"kind": "mrm" if isinstance(reward_model, MRM) else "guard", "base": llama.config.name,
                "base_fingerprint": llama.fingerprint, "vocabulary": vocabulary_of(llama), "rank": rank,
                "alpha": alpha, "targets": targets, "first_layer": first_layer,
                "template": [template.prefix, template.infix], "command": command}
    tensors = {name: (tensor.half() if "lora_" in name else tensor).detach().cpu().contiguous()
               for name, tensor in trained_tensors(reward_model).items()}
    write_file(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def read_metadata(path):
    """The metadata of an adapter or a corpus. Raises BadInput for a file that is damaged or not ours."""
    with reading(path, "a readable adapter"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    with reading(path, "an adapter of this repository"):
        return {key: json.loads(value) for key, value in metadata.items()}


def load_adapter(path, llama, kind):
    """The Guard (kind "guard") or MRM ("mrm") of an adapter file on `llama`, whose weights it shares; frozen.
    Raises BadInput, with both values named, for an adapter of another kind, base model, vocabulary or
    rank."""
    meta = read_metadata(path)
    with reading(path, "an adapter of this repository"):
        base = f"was made for the base model {meta['base']}, fingerprint"
        for what, theirs, ours in (
                ("is an adapter of kind", meta["kind"], kind),
                ("was made for the vocabulary", meta["vocabulary"], vocabulary_of(llama)),
                (base, meta["base_fingerprint"], llama.fingerprint)):
            if theirs != ours:
                raise BadInput(f"{path} {what} {theirs}, but here it must be {ours} ({llama.config.name})")
        llama = add_lora(llama, meta["rank"], meta["alpha"], meta["targets"], meta["first_layer"])
        model = (MRM if kind == "mrm" else Guard)(llama, Template(*meta["template"]))
    return fill(model, path, dict(read_tensors(path)), f"rank {meta['rank']}").requires_grad_(False)


def fill(model, path, found, said):
    """The reward model, its trained tensors set to what was found. Raises BadInput where these do not fit."""
    wanted = trained_tensors(model)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise BadInput(f"{path}: tensor {name} is {'missing' if name in wanted else 'not expected'}")
        if wanted[name].shape != found[name].shape:
            raise BadInput(f"{path}: tensor {name} has shape {tuple(found[name].shape)}, "
                           f"expected {tuple(wanted[name].shape)} ({said})")
        wanted[name].data.copy_(found[name])
    return model


def guard_id(path, guard):
    """12 hex digits that tell a guard from others: of an adapter's file, or of a Llama Guard's weights."""
    return (guard.llama.fingerprint if Path(path).is_dir() else
            hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12])


def load_released_mrm(folder, llama, template):
    """The MRM of a folder in the layout of the paper's released weights: adapter_config.json and
    adapter_model.safetensors (PEFT's LoRA), lm_head_bias.pt and unseen_mask.pt (plain tensors), frozen.
    Raises BadInput for a missing or damaged file and for kinds of LoRA other than the plain one."""
    folder, path = Path(folder), Path(folder) / "adapter_config.json"
    config = read_json(path)
    for key, plain in {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False,
                       "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
                       "modules_to_save": None, "layers_to_transform": None}.items():
        if config.get(key, plain) != plain:
            raise BadInput(f"{path}: {key} = {config[key]!r} is not supported, only {plain!r} is")
    with reading(path, "a LoRA config with r, lora_alpha and target_modules"):
        rank, alpha, targets = config["r"], config["lora_alpha"], sorted(config["target_modules"])
    found = {name.replace("base_model.model.", "llama.").replace(".weight", ""): tensor
             for name, tensor in read_tensors(folder / "adapter_model.safetensors")}
    found |= {"gain": torch.ones(()), "bias": read_tensor(folder / "lm_head_bias.pt"),
              "unseen": read_tensor(folder / "unseen_mask.pt")}
    model = MRM(add_lora(llama, rank, alpha, targets), template).requires_grad_(False)
    return fill(model, folder, found, f"rank {rank}, vocabulary {llama.config.vocab_size}")


def read_tensor(path):
    """A file that holds one plain tensor; anything that could run code is refused."""
    with reading(path, "a plain tensor"):
        tensor = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(type(tensor).__name__)
    return tensor
