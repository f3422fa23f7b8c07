"""
The machine that bench.py and beside_transformers.py measure on.
"""

import platform
import time

import torch

from plumbing.fast import AMX


def describe_machine():
    """System, threads, the processor's kind and torch's version, as text."""
    kind = torch.backends.cpu.get_cpu_capability() + (", AMX" if AMX else "")
    return (f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {kind}, "
            f"torch {torch.__version__}")


def bandwidth(device):
    """Bytes a second at which this machine reads memory: the best of ten sums over 512 MB."""
    x = torch.ones(2 ** 27, device=device)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - started))
    return best


def weight_bytes(llama):
    """Bytes of the weights that a step reads: all but the embedding, unless that is the head too."""
    embedding = llama.model.embed_tokens.weight
    return sum(p.nbytes for p in llama.parameters() if p is not embedding or p is llama.lm_head.weight)
