"""One optimizer step of a student's engine: the gradients of a global batch, and what DeepSpeed makes of them."""

import math
from typing import Any

import torch

from distprune.config import TrainConfig
from distprune.engines.batches import rank_part, stream_seed
from distprune.engines.evaluate import on_device
from distprune.errors import UserError
from distprune.tasks.base import Batch
from distprune.training.objective import Objective
from distprune.training.setup import Setup


def backward(
    setup: Setup, objective: Objective, train: TrainConfig, batch: list[int], step: int
) -> tuple[list[float], Batch]:
    """Give the student the gradients of a global batch. Collective: every rank calls it.

    Args:
        setup: of the run.
        objective: what the gradients are of.
        train: says how many micro-batches a rank takes the batch in, and with the step how chance falls.
        batch: row numbers, the same on every rank.
        step: optimizer steps that are done.

    Returns:
        This rank's `Losses`, means over its micro-batches; and its first micro-batch with a loss that is not finite,
        or else its last.
    """
    student, task, world = setup.student, setup.task, setup.world
    parts = rank_part(batch, world.rank, world.size, train.accumulation)
    draw = stream_seed(train.seed, step, [])
    micro_batches, losses = [], []
    for number, rows in enumerate(parts):
        if number > 0:
            student.step()  # within a step: DeepSpeed counts micro-batches
        micro_batches.append(on_device(task.collate(task.train.__getitems__(rows), draw), student))
        torch.manual_seed(stream_seed(train.seed, step, rows))
        found = objective.losses(student, micro_batches[-1], rows)
        student.backward(found.total)
        losses.append(torch.stack([loss.detach() for loss in found]))
    values = torch.stack(losses).tolist()  # one wait for the device
    means = [sum(value / len(parts) for value in column) for column in zip(*values, strict=True)]
    suspects = (batch for batch, row in zip(micro_batches, values, strict=True) if not all(map(math.isfinite, row)))
    return means, next(suspects, micro_batches[-1])


def take_step(student: Any, step: int) -> bool:
    """Let a student's engine take a step; return whether it did: fp16 finds its loss's scale by leaving some out.

    Raises:
        UserError: fp16's gradients are not finite at the smallest scale, or those of another type are not.
    """
    try:
        student.step()
    except Exception as error:  # DeepSpeed's has no kind of its own
        if "loss scale" not in str(error):
            raise
        raise UserError(
            f"fp16's gradients are not finite at step {step}, at the smallest scale of the loss; allowed: a lower "
            "lr.peak, or bf16 or fp32 in place of fp16"
        ) from error
    if student.was_step_applied():
        return True
    if not student.fp16_enabled():
        raise UserError(
            f"the loss is finite at step {step} and its gradients are not, so that no step can be taken; allowed: "
            "finite gradients (a lower lr.peak, or fp32 in place of bf16, may help)"
        )
    return False
