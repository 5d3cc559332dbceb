"""What a training step minimises: the task's loss, and what the teacher has to say."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distprune.config import DistillationConfig
from distprune.distill import attention_loss, distillation_loss, hidden_loss, layer_pairs, mix
from distprune.errors import UserError
from distprune.tasks.base import Batch, Task
from distprune.teachers.choose import Teacher


class Losses(NamedTuple):
    """Scalars, fp32: the total, and its parts before they are weighted; 0 where there is no such part."""

    total: Tensor
    task: Tensor
    distillation: Tensor
    hidden: Tensor
    attention: Tensor


class Objective:
    """The loss of a batch: ``mix(task, distillation) + hidden weight * hidden + attention weight * attention``."""

    def __init__(self, task: Task, teacher: Teacher | None, config: DistillationConfig):
        self._task, self._teacher, self._config = task, teacher, config
        self._options = {
            name: True
            for name, weight in (("output_hidden_states", config.hidden), ("output_attentions", config.attention))
            if weight > 0
        }

    def losses(self, student: Any, batch: Batch, rows: list[int]) -> Losses:
        """Run the student, and the teacher where it is live. Collective at ZeRO-3.

        Args:
            student: its engine.
            batch: on its device.
            rows: the training rows that the batch holds.

        Raises:
            UserError: hidden states or attention of the two do not fit each other.
        """
        outputs = self._task.run(student, batch, **self._options)
        logits = self._task.logits(outputs, batch)
        task_loss, zero = self._task.loss(logits, batch), logits.new_zeros((), dtype=torch.float32)
        if self._teacher is None:
            return Losses(task_loss, task_loss, zero, zero, zero)
        target = self._teacher.outputs(batch, rows, **self._options)
        distilled = distillation_loss(logits, target.logits, self._config.temperature)
        hidden, attention = self._features(outputs, target.outputs, batch) if self._options else (zero, zero)
        total = mix(task_loss, distilled, self._config.hardness)
        total = total + self._config.hidden * hidden + self._config.attention * attention
        return Losses(total, task_loss, distilled, hidden, attention)

    def _features(self, student: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        config = self._config
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten(0, -2)
        zero = torch.zeros((), device=mask.device)
        hidden, attention = zero, zero
        if config.hidden > 0:
            ours, theirs = student.hidden_states[1:], teacher.hidden_states[1:]  # the first is the embeddings' output
            pairs = layer_pairs(config.layers, len(ours), len(theirs))
            _refuse_unequal("hidden states of", ours[0].shape[-1], theirs[0].shape[-1], "distillation.hidden")
            hidden = torch.stack([hidden_loss(ours[a], theirs[b], mask) for a, b in pairs]).mean()
        if config.attention > 0:
            ours, theirs = student.attentions, teacher.attentions
            pairs = layer_pairs(config.layers, len(ours), len(theirs))
            _refuse_unequal("attention heads:", ours[0].shape[1], theirs[0].shape[1], "distillation.attention")
            attention = torch.stack([attention_loss(ours[a], theirs[b], mask) for a, b in pairs]).mean()
        return hidden, attention


def _refuse_unequal(what: str, ours: int, theirs: int, key: str) -> None:
    if ours != theirs:
        raise UserError(
            f"the student has {what} {ours} and the teacher {what} {theirs}; allowed with {key}: as many of both"
        )
