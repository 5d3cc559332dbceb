"""What a training step minimises: the task's loss, and what the teacher has to say."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from distprune.config import DistillationConfig
from distprune.errors import UserError
from distprune.tasks.base import Batch, Task
from distprune.teachers.choose import Teacher
from distprune.training.distill import attention_loss, distillation_loss, hidden_loss, layer_pairs


class Losses(NamedTuple):
    """Scalars, fp32: the total, and its parts before they are weighted; 0 where there is no such part."""

    total: Tensor
    task: Tensor
    distillation: Tensor
    hidden: Tensor
    attention: Tensor


class Objective:
    """The loss of a batch: ``(1 - hardness) * task + hardness * distillation``, and features times their weights."""

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
        """
        outputs = self._task.run(student, batch, **self._options)
        logits = self._task.logits(outputs, batch)
        task_loss, zero = self._task.loss(logits, batch), logits.new_zeros((), dtype=torch.float32)
        if self._teacher is None:
            return Losses(task_loss, task_loss, zero, zero, zero)
        target = self._teacher.outputs(batch, rows, **self._options)
        divergences = distillation_loss(logits, target.logits, self._config.temperature)
        distilled = self._task.mean_over_rows(divergences, batch)
        hidden, attention = self._features(outputs, target.outputs, batch) if self._options else (zero, zero)
        total = torch.lerp(task_loss, distilled, self._config.hardness)
        total = total + self._config.hidden * hidden + self._config.attention * attention
        return Losses(total, task_loss, distilled, hidden, attention)

    def _features(self, student: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        config = self._config
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten(0, -2)
        hidden = attention = torch.zeros((), device=mask.device)
        if config.hidden > 0:
            # The first is the embeddings' output.
            ours, theirs = ((model.hidden_states or ())[1:] for model in (student, teacher))
            hidden = _over_layers(hidden_loss, config, ours, theirs, mask)
        if config.attention > 0:
            attention = _over_layers(attention_loss, config, student.attentions, teacher.attentions, mask)
        return hidden, attention


def _over_layers(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    config: DistillationConfig,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
) -> Tensor:
    """Return the mean of a loss over the student's layers and those of the teacher's that they follow."""
    tokens = mask.shape[-1]
    for model, states in (("student", student), ("teacher", teacher)):
        if not states or any(state is None or tokens not in state.shape[1:3] for state in states):
            raise UserError(
                f"the {model} does not put out what each layer has for each token; allowed with such a model: "
                "distillation.hidden=0 and distillation.attention=0"
            )
    pairs = layer_pairs(config.layers, len(student), len(teacher))
    return torch.stack([loss(student[ours], teacher[theirs], mask) for ours, theirs in pairs]).mean()


def check_features(config: DistillationConfig, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Refuse models whose hidden states or attention cannot be compared, where that is asked for.

    Raises:
        UserError: another width, or number of heads; layers that the models do not have.
    """
    for key, weight, what, name in (
        ("distillation.hidden", config.hidden, "hidden states of", "hidden_size"),
        ("distillation.attention", config.attention, "attention heads:", "num_attention_heads"),
    ):
        ours, theirs = getattr(student, name, None), getattr(teacher, name, None)
        if weight > 0 and (ours is None or ours != theirs):
            raise UserError(
                f"the student has {what} {ours} and the teacher {what} {theirs}; allowed with {key}: as many of both"
            )
    if config.hidden > 0 or config.attention > 0:
        for model in (student, teacher):
            if model.is_encoder_decoder:
                raise UserError(
                    f"a {model.model_type} has two stacks of layers; allowed with it: distillation.hidden=0 and "
                    "distillation.attention=0"
                )
        layer_pairs(config.layers, student.num_hidden_layers, teacher.num_hidden_layers)


def put_out_features(config: DistillationConfig, *models: PreTrainedModel) -> None:
    """Have models put out what is distilled of them: only one way to compute attention puts it out."""
    for model in models if config.attention > 0 else ():
        model.set_attn_implementation("eager")
