"""
Checkpoints of training, from which an interrupted run goes on. They lie beside the adapter to be.
"""

import hashlib
import io
import json

import torch

from mrm import trained_tensors
from plumbing.adapters import fill
from plumbing.checkpoint import identity
from plumbing.errors import BadInput
from plumbing.files import reading, write_file


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
    """What must be equal for a run to be the same run: the arguments that decide it, and the content of base
    and data, wherever they are."""
    free = "resume stop_after out device command eval_every eval_replies log_every accumulate guard".split()
    run = {key: value for key, value in vars(args).items() if key not in free}
    digest = hashlib.sha256()
    for e in training:
        digest.update(json.dumps([e.source, e.context, e.reply, e.targets, e.siblings]).encode())
    return run | {"base": identity(llama), "data": digest.hexdigest()[:12]}
