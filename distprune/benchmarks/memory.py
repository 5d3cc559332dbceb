"""The peak of a rank's resident memory in training steps, beside what the plan says of it."""

from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from distprune import dist, turns
from distprune.benchmarks.models import random_batch, write_random_model
from distprune.config import Config, PruningConfig
from distprune.engines.build import build_frozen, build_student, decay_groups
from distprune.errors import UserError
from distprune.models.weights import skeleton
from distprune.planning import memory
from distprune.planning.activations import count
from distprune.planning.memory import Need
from distprune.planning.shapes import layout_of, shapes_of
from distprune.planning.subject import stand_in
from distprune.pruning.targets import targets_of
from distprune.timing import peak_bytes
from distprune.training.distill import distillation_loss
from distprune.training.setup import build_pruner


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that took most, above what a process held after its imports."""

    ranks: int
    dtype: str
    stage: int
    teacher: int | None
    measured: int
    estimated: int
    parts: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self)


def measure(
    folder: Path, model: str, section: dict[str, Any], batch_size: int, length: int, steps: int, teacher: int | None
) -> Memory:
    """Measure a student that is pruned in each step. Collective: every rank calls it.

    Args:
        folder: where the random model is written.
        model: a name of `distprune.benchmarks.models.SHAPES`.
        section: DeepSpeed's options of the student.
        batch_size: examples in a step over all ranks.
        length: tokens of each.
        steps: how many; the moments are there from the second on.
        teacher: ZeRO stage of one that is run beside the student; None: none is.

    Raises:
        UserError: where the system does not tell, or the memory is a GPU's.
    """
    if dist.on_gpu():
        raise UserError("bench memory measures the CPU's memory; allowed: DS_ACCELERATOR=cpu in the environment")
    world = dist.detect()
    turns.write_on_main(lambda: write_random_model(folder, model), folder)
    micro_batch = batch_size // world.size
    frozen = None if teacher is None else section | {"zero_optimization": {"stage": teacher}}
    mine = peak_bytes(lambda: _train(folder, section, frozen, batch_size, length, steps), torch.device("cpu"))
    peaks = dist.gather([mine])
    if None in peaks:
        raise UserError("this system does not tell a process's highest memory; allowed: bench memory on Linux")
    measured = max(peak for peak in peaks if peak is not None)
    need = _need(folder, section, frozen, micro_batch, length)
    estimate = memory.peak(need).device
    dtype = str(need.layout.dtype).removeprefix("torch.")
    stage, total = need.layout.stage, estimate.total()
    return Memory(world.size, dtype, stage, teacher, measured, total, dict(estimate))


def _train(
    folder: Path, section: dict[str, Any], frozen: dict[str, Any] | None, batch_size: int, length: int, steps: int
) -> None:
    """Take some steps. Collective: every rank calls it."""
    world, config = dist.detect(), Config()
    config.train.batch_size, config.deepspeed.student, config.pruning.sparsity = batch_size, section, 0.8
    micro_batch = batch_size // world.size
    teacher = None
    if frozen is not None:
        teacher = build_frozen(frozen, folder, AutoModelForSequenceClassification, {}, micro_batch)
    student, _ = build_student(config, folder, AutoModelForSequenceClassification, {}, micro_batch)
    pruner = build_pruner(config, student)
    batch = random_batch(micro_batch, length, world.rank)
    for step in range(steps):
        logits = student(**batch).logits
        if teacher is None:
            loss = _loss(logits)
        else:
            with torch.no_grad():
                target = teacher(**batch).logits
            loss = distillation_loss(logits, target, config.distillation.temperature).mean()
        student.backward(loss)
        pruner.after_backward(Fraction(4 * (step + 1), 5 * steps))
        student.step()


def _loss(logits: Tensor) -> Tensor:
    return cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))


def _need(folder: Path, section: dict[str, Any], frozen: dict[str, Any] | None, micro_batch: int, length: int) -> Need:
    """Return what a plan of the same run is made from."""
    world = dist.detect().size
    model, _ = skeleton(folder, AutoModelForSequenceClassification, {})
    shapes = shapes_of(model, decay_groups(model, 0.0), targets_of(PruningConfig(), model))
    layout = layout_of("the student", section, world)
    teacher = None
    if frozen is not None:
        dense, _ = skeleton(folder, AutoModelForSequenceClassification, {})
        teacher = shapes_of(dense.requires_grad_(False), [], ()), layout_of("the teacher", frozen, world)
    student = stand_in(model, layout.dtype).train()
    batch = random_batch(1, length, seed=0)
    activations = count(student, lambda: _loss(student(**batch).logits))
    return Need(shapes, layout, teacher, activations, micro_batch, on_gpu=False)
