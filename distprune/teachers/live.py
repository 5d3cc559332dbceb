"""A teacher that is run beside the student."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distprune.engines.evaluate import evaluate
from distprune.tasks.base import Batch, Task
from distprune.zero.engine import held_bytes


class Taught(NamedTuple):
    """A teacher's logits for a batch, and, where more was asked for, all that its model put out."""

    logits: Tensor
    outputs: Any = None


class LiveTeacher:
    """A teacher that is run for every batch, replicated or sharded as its engine is."""

    def __init__(self, engine: Any, task: Task):
        self.engine, self._task = engine, task

    def outputs(self, batch: Batch, rows: list[int], **options: bool) -> Taught:
        """Return the teacher's outputs for a batch. Collective at ZeRO-3.

        Args:
            batch: on the engine's device.
            rows: the training rows that it holds.
            options: of the model's forward pass.
        """
        with torch.no_grad():
            outputs = self._task.run(self.engine, batch, **options)
            return Taught(self._task.logits(outputs, batch), outputs if options else None)

    def measure(self, batch_size: int) -> dict[str, float]:
        """Return its metrics on the evaluation data. Collective: every rank calls it."""
        return evaluate(self.engine, self._task, batch_size)

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that it holds on this rank."""
        return held_bytes(self.engine)
