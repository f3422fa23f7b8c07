"""
Trained tensors on disk, and the models of this repository.

An adapter is a safetensors file: LoRA in float16 (half the size), the guard's head or the MRM's gain, bias
and V_unseen, and what it belongs to.
"""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from mrm import MRM, PROJECTIONS, Guard, add_lora, trained_tensors
from plumbing.checkpoint import DEFAULT, load_llama, read_tensors
from plumbing.errors import BadInput, check_finite
from plumbing.shared import share_pass
from plumbing.files import check, reading, write_file
from plumbing.tokenizer import Template


def default_models():
    """The policy, guard and MRM of this repository: one checkpoint and two adapters on it."""
    policy = load_llama(DEFAULT)
    guard = load_adapter(DEFAULT / "guard.safetensors", policy, "guard")
    mrm = load_adapter(DEFAULT / "mrm.safetensors", policy, "mrm")
    return policy, share_pass(policy, guard), share_pass(policy, mrm)


def save_adapter(reward_model, path, rank, alpha, targets, first_layer, command):
    """Write an adapter, with the settings of its LoRA and the command that made it."""
    llama = reward_model.llama
    template = reward_model.template
    metadata = {"kind": reward_model.kind, "base": llama.config.name,
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
        lora = [meta[key] for key in ("rank", "alpha", "targets", "first_layer")]
        check_lora(*lora, llama.config)
        prefix, infix = meta["template"]
        for i in prefix + infix:
            check(i, "a token of the template", int, 0, llama.config.vocab_size - 1)
    reward_model = {"guard": Guard, "mrm": MRM}[kind](add_lora(llama, *lora), Template(prefix, infix))
    fill(reward_model, path, dict(read_tensors(path)), f"rank {meta['rank']}")
    return reward_model.requires_grad_(False)


def check_lora(rank, alpha, targets, first_layer, config):
    """Raises BadInput for what mrm.add_lora cannot do with a Llama of this config."""
    check(rank, "LoRA's rank", int, 1, config.hidden_size)
    check(alpha, "LoRA's alpha", float, 0, 1e6)
    check(first_layer, "LoRA's first layer", int, 0, config.num_hidden_layers - 1)
    if not targets or not set(targets) <= set(PROJECTIONS):
        raise BadInput(f"LoRA's targets cannot be {targets}: expected some of {', '.join(PROJECTIONS)}")


def fill(model, path, found, said):
    """The reward model, its trained tensors set to those that were found. Raises BadInput where these do not
    fit. said: for the message, what the shapes follow from."""
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


def check_vocabulary(policy, other, for_mrm=True):
    """Raises BadInput unless both Llamas have one vocabulary, for an MRM also heads of one size: M(s) is a
    reward for each token of the policy's. (guards.guard_for takes a guard across.)"""
    same_size = policy.config.vocab_size == other.config.vocab_size
    if policy.vocabulary and other.vocabulary:
        fit = policy.vocabulary == other.vocabulary and (same_size or not for_mrm)
    else:                                                   # of one that has no tokenizer, the size is known
        fit = same_size
    if not fit:
        raise BadInput(f"the policy {policy.config.name} and the reward model on {other.config.name} have "
                       "different vocabularies; an MRM must share the policy's. data/safety_rewards/"
                       "prepare.py --policy DIR, then train_mrm.py --objective mrm --base DIR make one; pass "
                       "it with --mrm PATH --mrm_base DIR")
