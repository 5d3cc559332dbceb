"""How long a run takes, from a throughput that is given or measured here."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distprune.timing import seconds

STEPS = 3
"""At most so many steps are timed, after one that is not."""
ENOUGH = 60.0
"""Seconds of steps after which no further one begins; a first step that takes as long is timed itself."""


def hours(batches: int, batch_size: int, examples_per_s: float) -> float:
    """Return the hours that batches take: of optimizer steps, and of gradients for a score, which count as much."""
    return batches * batch_size / examples_per_s / 3600


def measure(model: nn.Module, loss: Callable[[], Tensor], groups: list[dict[str, object]], examples: int) -> float:
    """Return the examples a second of plain training steps in this process, with AdamW and without DeepSpeed.

    Args:
        model: in training mode, on the device that it is measured on.
        loss: of the batch, a teacher's forward pass included.
        groups: the optimizer's.
        examples: in the batch.
    """
    optimizer, taken = torch.optim.AdamW(groups, lr=0.0, fused=True), list[float]()

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.zero_grad()

    while len(taken) <= STEPS and sum(taken) < ENOUGH:
        taken.append(seconds(step, next(model.parameters()).device))
    timed = taken[1:] or taken
    return len(timed) * examples / sum(timed)
