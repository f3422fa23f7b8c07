"""
What a training starts from: an adapter (--init), or the checkpoint of an interrupted run (--resume), which
lies beside the adapter to be.
"""

import hashlib
import io
import json

import torch

from mrm import trained_tensors
from plumbing.adapters import fill, load_adapter, read_metadata
from plumbing.checkpoint import identity
from plumbing.errors import BadInput
from plumbing.files import content_hash, reading, write_file


def load_to_train(path, llama, kind, rank, alpha, targets, first_layer):
    """The Guard or MRM of an adapter file, to be trained further. Raises BadInput as load_adapter does, and
    where its LoRA is another than that."""
    reward_model = load_adapter(path, llama, kind)
    meta = read_metadata(path)
    asked = {"rank": rank, "alpha": alpha, "targets": targets, "first_layer": first_layer}
    for name, ours in asked.items():
        if meta[name] != ours:
            raise BadInput(f"--init {path} was trained with the {name} {meta[name]}, but here it is {ours}")
    for tensor in trained_tensors(reward_model).values():
        tensor.requires_grad_(tensor.is_floating_point())           # V_unseen is not trained
    return reward_model


def save_checkpoint(path, run, step, reward_model, optimizer):
    """run: the `run_identity`."""
    checkpoint = {"args": run, "step": step, "model": trained_tensors(reward_model),
                  "optimizer": optimizer.state_dict()}
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_file(path, content.getvalue())


def load_checkpoint(path, run, reward_model, optimizer):
    """Restore model and optimizer: the step to go on with. Raises BadInput for another run's checkpoint."""
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint to resume from")
    with reading(path, "a checkpoint of train_mrm.py"):
        checkpoint = torch.load(path, map_location=reward_model.llama.device, weights_only=True)
        for key, value in run.items():
            if checkpoint["args"].get(key) != value:
                raise BadInput(f"{path} is of a run with --{key} {checkpoint['args'].get(key)}, not {value}")
        step = checkpoint["step"]
        trained = checkpoint["model"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    fill(reward_model, path, trained, f"rank {run['rank']}")
    return step


def run_identity(args, llama, training):
    """What must be equal for a run to be the same run: the arguments that decide it, and the content of base,
    data and initial adapter, wherever they are."""
    free = "resume stop_after out device command eval_every eval_replies log_every accumulate guard".split()
    run = {key: value for key, value in vars(args).items() if key not in free}
    digest = hashlib.sha256()
    for e in training:
        digest.update(json.dumps([e.source, e.context, e.reply, e.targets, e.siblings]).encode())
    init = content_hash(args.init) if args.init else None
    return run | {"base": identity(llama), "data": digest.hexdigest()[:12], "init": init}
