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
    if "TORCHELASTIC_RUN_ID" not in os.environ:                 # which torchrun sets
        return 0, 1
    take_gpu(args)
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # one may validate while others wait
    return dist.get_rank(), dist.get_world_size()


def take_gpu(args):
    """Under torchrun, each process has a GPU of its own, where they compute on CUDA."""
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"


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
