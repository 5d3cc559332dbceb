"""Evaluation that gives the same number at any world size: every example once, every rank as many forward passes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset

from distprune import dist, turns
from distprune.engines.batches import eval_batches, in_order
from distprune.errors import UserError
from distprune.monitor.records import RESERVED
from distprune.tasks.base import Batch, Task


def evaluate(
    engine: Any, task: Task, batch_size: int, before_batch: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the task's metrics of a model over all its evaluation data, the same on every rank.

    Collective: every rank calls it.

    Args:
        engine: a DeepSpeed engine; left in the mode it was in.
        task: gives batches and metrics.
        batch_size: rows in a forward pass on one rank.
        before_batch: called on every rank before each forward pass; what it raises ends the evaluation.
    """
    measured: dict[str, float] = {}
    for prefix, data in task.evaluations().items():
        metrics = _evaluate(engine, task, data, batch_size, before_batch)
        measured |= {prefix + name: value for name, value in metrics.items()}
    return measured


@torch.no_grad()
def logits_of_rows(engine: Any, task: Task, data: Dataset, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield this rank's share of the rows, each with its place in the data and its logits, fp32, on the CPU.

    Collective: every rank calls it, and takes all that it yields.

    Args:
        engine: a DeepSpeed engine, in the mode that it is in.
        task: gives batches, and takes logits apart.
        data: of the task.
        batch_size: rows in a forward pass on one rank.
    """
    world = dist.detect()
    for share in eval_batches(data["length"], batch_size, world.rank, world.size):
        batch = task.collate(data.__getitems__(share.indices))
        logits = task.split(task.forward(engine, on_device(batch, engine)).float().cpu(), batch)
        for row, is_valid, part in zip(share.indices, share.valid, logits, strict=True):
            if is_valid:
                yield row, part


def on_device(batch: Batch, engine: Any) -> Batch:
    """Return a batch on an engine's device."""
    return {name: tensor.to(engine.device) for name, tensor in batch.items()}


@torch.no_grad()
def _evaluate(
    engine: Any, task: Task, data: Dataset, batch_size: int, before_batch: Callable[[], None]
) -> dict[str, float]:
    """Collective: every rank calls it."""
    world = dist.detect()
    was_training = engine.module.training
    engine.eval()
    predictions, indices, valid = [], [], []
    for rows in eval_batches(data["length"], batch_size, world.rank, world.size):
        before_batch()
        batch = on_device(task.collate(data.__getitems__(rows.indices)), engine)
        predictions.append(task.predictions(task.forward(engine, batch), batch))
        indices += rows.indices
        valid += rows.valid
    engine.train(was_training)

    order, real = dist.gather_rows(torch.tensor(indices)), dist.gather_rows(torch.tensor(valid))
    every = in_order(dist.gather_rows(torch.cat(predictions)), order, real)
    # Processors of other kinds may round otherwise, and ranks branch on the metrics.
    return turns.on_main(lambda: _checked(task.metrics(every, data)))


def _checked(metrics: Any) -> dict[str, float]:
    """Return what a task, maybe of another package, calls metrics, as numbers.

    Raises:
        UserError: it is none, or has a name that a run's records have for something else.
    """
    try:
        numbers = {name: float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError):
        numbers = {}
    if not numbers or numbers.keys() & RESERVED:
        raise UserError(
            f"the task's metrics are {metrics!r}; allowed: numbers by their names, which are none of "
            f"{', '.join(sorted(RESERVED))}"
        )
    return numbers
