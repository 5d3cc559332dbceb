"""Evaluation that gives the same number at any world size: every example once, every rank as many forward passes."""

from typing import Any

import torch
import torch.distributed as torch_dist
from datasets import Dataset
from torch import Tensor

from distprune import dist
from distprune.batches import eval_batches, in_order
from distprune.tasks.base import Batch, Task


def forward(engine: Any, batch: Batch) -> Tensor:
    """Return a model's logits for a batch, without the labels' own loss. Collective at ZeRO-3."""
    logits: Tensor = engine(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return logits


@torch.no_grad()
def evaluate(engine: Any, task: Task, data: Dataset, batch_size: int) -> dict[str, float]:
    """Return the task's metrics of a model over a data set, the same on every rank.

    Collective: every rank calls it.

    Args:
        engine: a DeepSpeed engine; left in the mode it was in.
        task: gives batches and metrics.
        data: tokenised examples.
        batch_size: examples in a forward pass on one rank.
    """
    world = dist.detect()
    was_training = engine.module.training
    engine.eval()
    logits, labels, indices, valid = [], [], [], []
    for rows in eval_batches(data["length"], batch_size, world.rank, world.size):
        batch = {
            name: tensor.to(engine.device) for name, tensor in task.collate(data.__getitems__(rows.indices)).items()
        }
        logits.append(forward(engine, batch).float())
        labels.append(batch["labels"])
        indices += rows.indices
        valid += rows.valid
    engine.train(was_training)

    order, real = dist.gather_rows(torch.tensor(indices)), dist.gather_rows(torch.tensor(valid))
    every_logit = in_order(dist.gather_rows(torch.cat(logits)), order, real)
    every_label = in_order(dist.gather_rows(torch.cat(labels)), order, real)
    measured = [task.metrics(every_logit, every_label) if dist.is_main() else {}]
    # Processors of other kinds may round otherwise, and ranks branch on the metrics.
    torch_dist.broadcast_object_list(measured)
    return measured[0]
