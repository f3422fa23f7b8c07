"""
Several processes at one task, as torchrun starts them.
"""

import datetime
import os
import signal
import sys

import torch.distributed as dist


def join_processes(args, backend):
    """Under torchrun, meet the other processes. Returns (which one this is, how many there are)."""
    rank, processes = place_among_processes(args)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        timeout = datetime.timedelta(days=7)                    # one may validate while others wait
        dist.init_process_group(backend, timeout=timeout)
    return rank, processes


def place_among_processes(args):
    """Under torchrun (which sets this variable, as others set RANK too): which process this is, and how many
    there are. Each has a GPU of its own, where they compute on CUDA."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def is_first():
    """Whether this is the process that prints, validates and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait():
    """Until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def log(text):
    """Print, in one process of those that work together."""
    if is_first():
        print(text, flush=True)


def run_beside_others(work, advice):
    """Run work() as one of several processes. torchrun ends the others when one has died: let them say so,
    with some advice."""
    died = f"another process has died, or torchrun was stopped; {advice}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(died))
    try:
        work()
    except RuntimeError as error:
        sys.exit(f"process {dist.get_rank()} of {dist.get_world_size()} stops: "
                 f"{str(error).strip().splitlines()[0]}\n"
                 f"If this says that a connection was closed, another process has died; {advice}")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)             # gloo's threads stay, and one that needs Python while it ends would abort
