"""Times of work on any device, and the memory that it took beyond what was there."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch


def wait(device: torch.device) -> None:
    """Return once the device's queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long one call takes, the device's queue emptied before and after."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def fastest(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the shortest time of several calls, after one that warms up."""
    work()
    return min(seconds(work, device) for _ in range(repeat))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Return by how much a call raised the memory in use at its peak; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # what the C library has kept must not serve again
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far (Linux)
        before = psutil.Process().memory_info().rss
        work()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return max(0, int(peak.split()[1]) * 1024 - before)
