"""Training steps in interleaved pairs: with masks and without, and with a teacher and without."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from distprune import dist, turns
from distprune.benchmarks.models import random_batch, write_random_model
from distprune.config import Config
from distprune.engines.build import build_frozen, build_student
from distprune.timing import seconds
from distprune.training.distill import distillation_loss
from distprune.training.setup import build_pruner


@dataclass(frozen=True)
class Steps:
    """Seconds of training steps on rank 0, and ratios of pairs that follow each other."""

    model: str
    device: str
    ranks: int
    threads: int
    dtype: str
    stage: int
    batch_size: int
    length: int
    dense: list[float]
    masked: list[float]
    taught: list[float]
    """With masks, and with a teacher's forward pass and the distillation loss."""
    masking: float
    """Seconds that the masks take in a step, by themselves."""

    @property
    def masked_ratio(self) -> dict[str, float]:
        """Masked over dense."""
        return _ratio(self.masked, self.dense)

    @property
    def taught_ratio(self) -> dict[str, float]:
        """With a teacher over without."""
        return _ratio(self.taught, self.masked)

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self) | {"masked_ratio": self.masked_ratio, "taught_ratio": self.taught_ratio}


def _ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Return the median ratio of pairs, and its 95 % interval by the bootstrap."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": median(ratios), "low": medians[50], "high": medians[1949]}


def measure(folder: Path, model: str, section: dict[str, Any], batch_size: int, length: int, repeat: int) -> Steps:
    """Measure steps of a student at 80 % sparsity. Collective: every rank calls it.

    Args:
        folder: where the random model is written.
        model: a name of `distprune.benchmarks.models.SHAPES`.
        section: DeepSpeed's options of the student; the teacher has them too, at ZeRO-3.
        batch_size: examples in a step over all ranks.
        length: tokens of each.
        repeat: how many pairs.
    """
    world = dist.detect()
    config = Config()
    config.train.batch_size = batch_size
    config.deepspeed.student = section
    config.pruning.sparsity = 0.8
    turns.write_on_main(lambda: write_random_model(folder, model), folder)
    micro_batch = batch_size // world.size
    student, _ = build_student(config, folder, AutoModelForSequenceClassification, {}, micro_batch)
    frozen = section | {"zero_optimization": {"stage": 3}}
    teacher = build_frozen(frozen, folder, AutoModelForSequenceClassification, {}, micro_batch)
    pruner = build_pruner(config, student)
    pruner.prune(Fraction(4, 5))
    masked_of, nothing = pruner.masked_of, dict.fromkeys(pruner.masked_of, 0)
    batch = random_batch(micro_batch, length, world.rank, student.device)
    labels = torch.arange(micro_batch, device=student.device) % 2
    masking: list[float] = []

    def loss_of(taught: bool) -> Tensor:
        logits = student(**batch).logits
        if not taught:
            return cross_entropy(logits.float(), labels)
        with torch.no_grad():
            target = teacher(**batch).logits
        return distillation_loss(logits, target, 5.5).mean()

    def step(masked: bool, taught: bool) -> float:
        pruner.masked_of = masked_of if masked else nothing  # without a masked weight it does nothing

        def work() -> None:
            student.backward(loss_of(taught))
            masking.append(seconds(pruner.after_backward, student.device))
            student.step()

        return seconds(work, student.device)

    dense, masked, taught = _in_turn(
        [lambda: step(False, False), lambda: step(True, False), lambda: step(True, True)], repeat
    )
    pruner.masked_of = masked_of
    weights = seconds(lambda: pruner._after_optimizer_step(student.basic_optimizer), student.device)
    gradients = median(masking[3:][1::3])  # of what is in the middle: the masked student without a teacher
    dtype = next(student.module.parameters()).dtype
    stage = int(student.zero_optimization_stage())
    return Steps(
        model,
        student.device.type if isinstance(student.device, torch.device) else str(student.device),
        world.size,
        torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
        stage,
        batch_size,
        length,
        dense,
        masked,
        taught,
        weights + gradients,
    )


def _in_turn(kinds: list[Callable[[], float]], repeat: int) -> list[list[float]]:
    """Return ``repeat`` times of each kind, taken in turn; to and fro, so that a drift does not count."""
    times: list[list[float]] = [[kind()] for kind in kinds]
    for number in range(repeat):
        order = list(range(len(kinds)))
        for place in order if number % 2 == 0 else reversed(order):
            times[place].append(kinds[place]())
    return [each[1:] for each in times]  # the first warms up
