"""A teacher that is run beside the student."""

from typing import Any

import torch
from torch import Tensor

from distprune.evaluate import evaluate
from distprune.shards import held_bytes
from distprune.tasks.base import Batch, Task


class LiveTeacher:
    """A teacher that is run for every batch, replicated or sharded as its engine is."""

    def __init__(self, engine: Any, task: Task):
        self.engine, self._task = engine, task

    def logits(self, batch: Batch, rows: list[int]) -> Tensor:
        """Return the teacher's logits for a batch. Collective at ZeRO-3.

        Args:
            batch: on the engine's device.
            rows: the training rows that it holds.
        """
        with torch.no_grad():
            return self._task.forward(self.engine, batch)

    def measure(self, batch_size: int) -> dict[str, float]:
        """Return its metrics on the evaluation data. Collective: every rank calls it."""
        return evaluate(self.engine, self._task, batch_size)

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that it holds on this rank."""
        return held_bytes(self.engine)
