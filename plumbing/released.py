"""
The MRM that the paper's authors released: PEFT's LoRA, a bias and V_unseen, in one folder.
"""

import re
from pathlib import Path

import torch

from mrm import MRM, PROJECTIONS, add_lora
from plumbing.adapters import check_lora, fill, load_adapter
from plumbing.checkpoint import read_tensors
from plumbing.errors import BadInput
from plumbing.files import check_keys, read_json, reading


def load_mrm(path, llama):
    """The MRM at `path`: an adapter on `llama`, or a folder in the layout of the released weights, which is
    read in the reward template of the vocabulary."""
    if not Path(path).is_dir():
        return load_adapter(path, llama, "mrm")
    if llama.tokenizer is None:
        raise BadInput(f"{llama.config.name} has no tokenizer.json, which the MRM {path} needs")
    return load_released_mrm(path, llama, llama.tokenizer.template("reward"))


def load_released_mrm(folder, llama, template):
    """The MRM of a folder in the layout of the paper's released weights: adapter_config.json and
    adapter_model.safetensors (PEFT's LoRA), lm_head_bias.pt and unseen_mask.pt (plain tensors), frozen.
    Raises BadInput for a missing or damaged file and for kinds of LoRA other than the plain one."""
    folder = Path(folder)
    path = folder / "adapter_config.json"
    config = read_json(path)
    with reading(path, "a LoRA config with r, lora_alpha and target_modules"):
        check_keys(config, dict.fromkeys(
            "r lora_alpha target_modules base_model_name_or_path revision auto_mapping inference_mode "
            "task_type lora_dropout layers_pattern megatron_core peft_version".split())
            | {"peft_type": ["LORA"], "bias": ["none"],
               "init_lora_weights": [True, False, "gaussian", "eva"]}       # others change the base too
            | ({} if config.get("use_qalora") else {"qalora_group_size": None}))        # its switch is off
        rank = config["r"]
        alpha = config["lora_alpha"]
        first_layer, targets = lora_targets(config["target_modules"], llama)
        check_lora(rank, alpha, targets, first_layer, llama.config)
    found = {name.replace("base_model.model.", "llama.").replace(".weight", ""): tensor
             for name, tensor in read_tensors(folder / "adapter_model.safetensors")}
    found |= {"gain": torch.ones(()), "bias": read_tensor(folder / "lm_head_bias.pt"),
              "unseen": read_tensor(folder / "unseen_mask.pt")}
    mrm = MRM(add_lora(llama, rank, alpha, targets, first_layer), template)
    fill(mrm, folder, found, f"rank {rank}, vocabulary {llama.config.vocab_size}")
    return mrm.requires_grad_(False)


def lora_targets(modules, llama):
    """(first layer, projections) that PEFT's target_modules mean: ends of names, whole names, or a regular
    expression for whole names. Raises BadInput unless they are the same projections in the last layers."""
    if modules == "all-linear":
        modules = PROJECTIONS

    def meant(whole):
        if isinstance(modules, str):
            return re.fullmatch(modules, whole)
        return any(f".{whole}".endswith(f".{module}") for module in modules)

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
