"""What a checkpoint costs: the time that training stands still for it, over a plain write of the same bytes."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from distprune import dist, turns
from distprune.benchmarks.models import random_batch, write_random_model
from distprune.checkpoints.pieces import packed
from distprune.checkpoints.saver import Saver
from distprune.checkpoints.state import owned_tensors, state_of
from distprune.config import Config
from distprune.engines.build import build_student
from distprune.timing import seconds
from distprune.training.setup import build_pruner


@dataclass(frozen=True)
class Checkpoints:
    """Seconds on the slowest rank, a number for each repetition."""

    model: str
    ranks: int
    stage: int
    bytes: int
    """Of all ranks' tensors."""
    plain: list[float]
    """A write of the same bytes, and an fsync."""
    waiting: list[float]
    """A save that is waited for: copied, written, flushed, read back and named."""
    beside: list[float]
    """What training stands still for a save beside it."""
    step: list[float]
    """The forward and backward pass that the copying has for itself."""

    def ratio(self, name: str) -> float:
        """Return the median, over repetitions, of a time over the plain write's."""
        return float(median(a / b for a, b in zip(getattr(self, name), self.plain, strict=True)))

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self) | {"waiting_ratio": self.ratio("waiting"), "beside_ratio": self.ratio("beside")}


def measure(folder: Path, model: str, section: dict[str, Any], repeat: int) -> Checkpoints:
    """Measure saves of a student at 80 % sparsity, each beside a plain write. Collective: every rank calls it.

    Args:
        folder: on the disk that is to be measured.
        model: a name of `distprune.benchmarks.models.SHAPES`.
        section: DeepSpeed's options of the student.
        repeat: how often.
    """
    world = dist.detect()
    config = Config()
    config.train.batch_size = 8 * world.size
    config.deepspeed.student = section
    turns.write_on_main(lambda: write_random_model(folder / "model", model), folder)
    student, _ = build_student(config, folder / "model", AutoModelForSequenceClassification, {}, 8)
    pruner = build_pruner(config, student)
    saver = Saver(folder, keep=1, describe=lambda _: None)
    batch = random_batch(8, 128, world.rank, student.device)

    def forward_and_backward() -> None:
        student.backward(student(**batch).logits.float().square().sum())

    def save(step: int) -> None:
        saver.save(step, owned_tensors(student, pruner), state_of(student, pruner), None, pruner.unmasked)

    def save_and_wait(step: int) -> None:
        save(step)
        saver.finish()

    forward_and_backward()
    pruner.after_backward(Fraction(4, 5))
    student.step()  # from here on there are moments
    own = owned_tensors(student, pruner)
    written = {key: packed(key, tensor.cpu()) for key, tensor in own.items()}
    rows = []
    for number in range(repeat + 1):
        plain = _slowest(lambda: _write_plainly(written, folder / f"plain-{world.rank}"))
        waiting = _slowest(partial(save_and_wait, 2 * number))
        begun = _slowest(partial(save, 2 * number + 1))
        working = _slowest(forward_and_backward)
        copied = _slowest(saver.before_change)
        pruner.after_backward()
        student.step()
        while dist.all_sum([float(saver.busy)])[0]:
            pass
        named = _slowest(lambda: saver.settle(0.0))
        rows.append((plain, waiting, begun + copied + named, working))
    saver.finish()
    columns = [list(column) for column in zip(*rows[1:], strict=True)]  # the first warms up
    size = int(dist.all_sum([float(sum(tensor.nbytes for tensor in written.values()))])[0])
    return Checkpoints(model, world.size, student.zero_optimization_stage(), size, *columns)


def _slowest(work: Callable[[], object]) -> float:
    """Return the seconds of the rank that takes longest; all begin together. Collective: every rank calls it."""
    dist.barrier()
    return max(dist.gather([seconds(work, dist.detect().device)]))


def _write_plainly(tensors: dict[str, Tensor], path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
