"""Stand-ins for a task and an engine that note which rows they are given, and with which seeds."""

from types import SimpleNamespace
from typing import Any

import torch

from distprune.config import Config


class Rows(dict[str, Any]):
    """Training data whose rows are their numbers."""

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


class Noted:
    """A task and an engine of 8 rows, in batches of 4, on one of some ranks."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.train = Rows(length=[1] * 8)
        self.drawn: list[tuple[int, tuple[int, ...]]] = []
        """What each micro-batch is drawn with, and its rows."""
        self.seeds: list[int] = []
        """torch's, ahead of each forward pass."""
        self.modes: list[bool] = []
        self.engine: Any = SimpleNamespace(
            train=lambda mode=True: self.modes.append(mode),
            module=torch.nn.Linear(1, 1),
            backward=lambda _: None,
            step=lambda: None,
            set_gradient_accumulation_boundary=lambda _: None,
            device=torch.device("cpu"),
        )
        self.setup: Any = SimpleNamespace(student=self.engine, task=self, world=SimpleNamespace(rank=rank, size=ranks))

    def collate(self, rows: list[int], draw: int) -> dict[str, torch.Tensor]:
        self.drawn.append((draw, tuple(rows)))
        return {}

    def run(self, engine: Any, batch: Any) -> None:
        self.seeds.append(torch.initial_seed())

    def logits(self, outputs: Any, batch: Any) -> None: ...

    def loss(self, logits: Any, batch: Any) -> None: ...


def config(seed: int = 42) -> Config:
    """Return a configuration of batches of 4 rows in two micro-batches, and 12 samples of Fisher's matrix."""
    made = Config()
    made.fisher.samples, made.train.batch_size, made.train.accumulation = 12, 4, 2
    made.train.seed = seed
    return made
