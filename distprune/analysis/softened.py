"""A teacher run over training rows, for what it says over the temperature."""

from typing import Any

import numpy as np
import torch

from distprune import dist
from distprune.analysis.temperature import Softness, softness
from distprune.engines.evaluate import logits_of_rows
from distprune.tasks.base import Task


def soften(engine: Any, task: Task, temperatures: list[float], rows: int, batch_size: int, seed: int) -> list[Softness]:
    """Return the means over training rows for each temperature, the same on every rank. Collective.

    Args:
        engine: the teacher's.
        task: gives the rows.
        temperatures: ascending.
        rows: how many are drawn; all where there are no more.
        batch_size: rows in a forward pass on one rank.
        seed: draws them.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(task.train))[:rows])
    data = task.train.select(drawn)
    sums, count = torch.zeros(len(temperatures), 3, dtype=torch.float64), 0
    for _, logits in logits_of_rows(engine, task, data, batch_size):
        found = torch.stack([softness(logits[None], each) for each in temperatures])
        sums += found.sum(1)
        count += found.shape[1]
    total, *every = dist.all_sum([float(count), *sums.flatten().tolist()])
    means = (torch.tensor(every, dtype=torch.float64) / total).view(-1, 3).tolist()
    return [Softness(each, *values) for each, values in zip(temperatures, means, strict=True)]
