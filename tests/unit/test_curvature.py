"""Gradients that are taken for a score alone."""

from types import SimpleNamespace
from typing import Any

import torch

from distprune.config import Config
from distprune.training.curvature import estimate


class Rows(dict[str, Any]):
    """Training data whose rows are their numbers."""

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


class Task:
    """Notes what it is asked to draw."""

    def __init__(self) -> None:
        self.train = Rows(length=[1] * 8)
        self.drawn: list[tuple[int, tuple[int, ...]]] = []

    def collate(self, rows: list[int], draw: int) -> dict[str, torch.Tensor]:
        self.drawn.append((draw, tuple(rows)))
        return {}

    def run(self, engine: Any, batch: Any) -> None: ...

    def logits(self, outputs: Any, batch: Any) -> None: ...

    def loss(self, logits: Any, batch: Any) -> None: ...


def draws(step: int) -> list[tuple[int, tuple[int, ...]]]:
    task, config = Task(), Config()
    config.fisher.samples, config.train.batch_size, config.train.accumulation = 12, 4, 2
    engine = SimpleNamespace(
        train=lambda *_: None,
        module=torch.nn.Linear(1, 1),
        backward=lambda _: None,
        set_gradient_accumulation_boundary=lambda _: None,
        device=torch.device("cpu"),
    )
    setup: Any = SimpleNamespace(student=engine, task=task, world=SimpleNamespace(rank=0, size=1))
    pruner: Any = SimpleNamespace(learn=lambda: None)
    estimate(config, setup, pruner, step, lambda: None)
    return task.drawn


def test_each_sample_draws_anew_and_a_run_that_goes_on_draws_the_same() -> None:
    found = draws(7)
    assert len(found) == 24
    assert len({draw for draw, _ in found}) == 12, "one for the micro-batches of a sample"
    assert found == draws(7)
    assert found != draws(8)
