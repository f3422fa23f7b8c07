"""
A training run that was interrupted goes on: its checkpoint, beside the adapter that it will write.
"""

import io

import torch

from mrm import trained_tensors
from plumbing.adapters import fill
from plumbing.errors import BadInput
from plumbing.files import reading, write_file


def save_checkpoint(path, args, step, reward_model, optimizer):
    checkpoint = {"args": run_identity(args), "step": step, "model": trained_tensors(reward_model),
                  "optimizer": optimizer.state_dict()}
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_file(path, content.getvalue())


def load_checkpoint(path, args, reward_model, optimizer):
    """Restore model and optimizer: the step to go on with. Raises BadInput for another run's checkpoint."""
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint to resume from")
    with reading(path, "a checkpoint of train_mrm.py"):
        checkpoint = torch.load(path, map_location=args.device, weights_only=True)
        for key, value in run_identity(args).items():
            if checkpoint["args"].get(key) != value:
                raise BadInput(f"{path} is of a run with --{key} {checkpoint['args'].get(key)}, not {value}")
        step = checkpoint["step"]
        trained = checkpoint["model"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    fill(reward_model, path, trained, f"rank {args.rank}")
    return step


def run_identity(args):
    """The arguments that must be equal for a run to be the same run."""
    free = "resume stop_after out device command eval_every eval_replies log_every accumulate".split()
    return {key: value for key, value in vars(args).items() if key not in free}
