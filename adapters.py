"""
Trained tensors on disk: adapters of this repository, a Llama Guard's folder, the paper's released MRM.

An adapter is a safetensors file: LoRA in float16, head or gain and bias, V_unseen, and what it belongs to.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

from files import BadInput, check, check_keys, read_json, reading, write_file

import torch
from safetensors import safe_open
from safetensors.torch import save

from model import Llama, read_tensors
from mrm import MRM, PROJECTIONS, Guard, add_lora, check_finite, llama_guard, trained_tensors
from tokenizer import Template

DEFAULT = Path(__file__).resolve().parent / "data" / "smollm2"      # the default checkpoint, and its adapters


def default_models():
    """The policy, guard and MRM of this repository: one checkpoint and two adapters on it."""
    policy = load_llama(DEFAULT)
    adapter = lambda kind: load_adapter(DEFAULT / f"{kind}.safetensors", policy, kind)
    return policy, adapter("guard"), adapter("mrm")


def load_llama(folder, dtype=torch.float32, device="cpu"):
    """Llama.load. The default weights are fetched and converted first, if they are not here yet. Raises
    BadInput where that fails."""
    if Path(folder).resolve() == DEFAULT and not all(
            (DEFAULT / name).exists() for name in ("model.safetensors", "tokenizer.json")):
        print("The default weights are not here yet: running data/smollm2/prepare.py", file=sys.stderr)
        if subprocess.run([sys.executable, DEFAULT / "prepare.py"]).returncode:
            raise BadInput("the default weights could not be prepared; choose others with "
                           "--policy and --mrm_base (train_mrm.py: --base)")
    return Llama.load(folder, dtype, device)


def load_guard(path, llama):
    """The guard at `path`: a Llama Guard's folder (maybe that of `llama`), or an adapter on `llama`. Those of
    this repository are adapters on the default weights, whatever `llama` is."""
    if not Path(path).is_dir():
        base = read_metadata(path).get("base_fingerprint")
        if Path(path).resolve().parent == DEFAULT and base != llama.fingerprint:
            llama = load_llama(DEFAULT, llama.dtype, llama.device)
        return load_adapter(path, llama, "guard")
    other = Llama.load(path, llama.dtype, llama.device)
    if other.tokenizer is None:
        raise BadInput(f"{path} has no tokenizer.json, which a Llama Guard needs")
    return llama_guard(llama if other.fingerprint == llama.fingerprint else other)


def load_mrm(path, llama):
    """The MRM at `path`: an adapter on `llama`, or a folder in the layout of the released weights, which is
    read in the reward template of the vocabulary."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "mrm")
    if llama.tokenizer is None:
        raise BadInput(f"{llama.config.name} has no tokenizer.json, which the MRM {path} needs")
    return load_released_mrm(path, llama, llama.tokenizer.template("reward"))


def save_adapter(reward_model, path, rank, alpha, targets, first_layer, command):
    """Write an adapter, with the settings of its LoRA and the command that made it."""
    llama, template = reward_model.llama, reward_model.template
    metadata = {"kind": "mrm" if isinstance(reward_model, MRM) else "guard", "base": llama.config.name,
                "base_fingerprint": llama.fingerprint, "vocabulary": llama.vocabulary, "rank": rank,
                "alpha": alpha, "targets": targets, "first_layer": first_layer,
                "template": [template.prefix, template.infix], "command": command}
    tensors = {name: (tensor.half() if "lora_" in name else tensor).detach().cpu().contiguous()
               for name, tensor in trained_tensors(reward_model).items()}
    for name, tensor in tensors.items():
        check_finite(tensor, f"the trained {name} has values")
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
                ("was made for the vocabulary", meta["vocabulary"], llama.vocabulary),
                (base, meta["base_fingerprint"], llama.fingerprint)):
            if theirs != ours:
                raise BadInput(f"{path} {what} {theirs}, but here it must be {ours} ({llama.config.name})")
        llama = add_lora(llama, meta["rank"], meta["alpha"], meta["targets"], meta["first_layer"])
        prefix, infix = meta["template"]
        for i in prefix + infix:
            check(i, "a token of the template", int, 0, llama.config.vocab_size - 1)
        model = (MRM if kind == "mrm" else Guard)(llama, Template(prefix, infix))
    return fill(model, path, dict(read_tensors(path)), f"rank {meta['rank']}").requires_grad_(False)


def fill(model, path, found, said):
    """The reward model, its trained tensors set to what was found. Raises BadInput where these do not fit.
    said: what the shapes follow from, for the message."""
    wanted = trained_tensors(model)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise BadInput(f"{path}: tensor {name} is {'missing' if name in wanted else 'not expected'}")
        if wanted[name].shape != found[name].shape:
            raise BadInput(f"{path}: tensor {name} has shape {tuple(found[name].shape)}, "
                           f"expected {tuple(wanted[name].shape)} ({said})")
        wanted[name].data.copy_(check_finite(found[name], f"{path}: the tensor {name} has values"))
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
    with reading(path, "a LoRA config with r, lora_alpha and target_modules"):
        check_keys(config, dict.fromkeys(
            "r lora_alpha target_modules base_model_name_or_path revision auto_mapping inference_mode "
            "task_type lora_dropout layers_pattern megatron_core peft_version".split())
            | {"peft_type": ["LORA"], "bias": ["none"],
               "init_lora_weights": [True, False, "gaussian", "eva"]})      # others change the base too
        rank, alpha = config["r"], config["lora_alpha"]
        first_layer, targets = lora_targets(config["target_modules"], llama)
        llama = add_lora(llama, rank, alpha, targets, first_layer)
    found = {name.replace("base_model.model.", "llama.").replace(".weight", ""): tensor
             for name, tensor in read_tensors(folder / "adapter_model.safetensors")}
    found |= {"gain": torch.ones(()), "bias": read_tensor(folder / "lm_head_bias.pt"),
              "unseen": read_tensor(folder / "unseen_mask.pt")}
    model = MRM(llama, template).requires_grad_(False)
    return fill(model, folder, found, f"rank {rank}, vocabulary {llama.config.vocab_size}")


def lora_targets(modules, llama):
    """(first layer, projections) that PEFT's target_modules mean: ends of names, whole names, or a regular
    expression for whole names. Raises BadInput unless they are the same projections in the last layers."""
    if modules == "all-linear":
        modules = PROJECTIONS
    meant = (lambda whole: re.fullmatch(modules, whole)) if isinstance(modules, str) else (
        lambda whole: any(f".{whole}".endswith(f".{module}") for module in modules))
    found = [name.split(".") for name, _ in llama.named_modules()       # model.layers.3.self_attn.q_proj
             if name.rpartition(".")[2] in PROJECTIONS and meant(name)]
    targets = sorted({name[-1] for name in found})
    first_layer = min((int(name[2]) for name in found), default=0)
    if not found or len(found) < len(targets) * (llama.config.num_hidden_layers - first_layer):
        raise BadInput(f"target_modules = {str(modules)[:80]}: expected the same projections in all layers, "
                       "or in all after some layer")
    return first_layer, targets


def read_tensor(path):
    """A file that holds one plain tensor; anything that could run code is refused."""
    with reading(path, "a plain tensor"):
        tensor = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(type(tensor).__name__)
    return tensor
