"""A teacher run over training rows, for what it says over the temperature."""

from typing import Any

import numpy as np

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
    sums = {each: Softness(each) for each in temperatures}
    for _, logits in logits_of_rows(engine, task, data, batch_size):
        for each in temperatures:
            sums[each] += softness(logits[None], each)
    return [Softness(each, *dist.all_sum(sums[each].sums())).mean() for each in temperatures]
