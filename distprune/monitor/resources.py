"""What a run uses."""

import psutil
import torch

from distprune import dist


def memory_mib() -> float:
    """Return this rank's memory in MiB: the peak on its GPU, or what the process holds now on a CPU."""
    if dist.on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
