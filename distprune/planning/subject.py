"""What a plan is made of: the run's student, teacher and longest examples, without their weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from distprune.config import Config
from distprune.engines.batches import check_batch_size
from distprune.engines.build import checkpoint_activations, decay_groups
from distprune.errors import UserError
from distprune.planning.activations import Activations, count, most_at_once
from distprune.planning.hours import measure
from distprune.planning.memory import Need
from distprune.planning.shapes import Layout, Shapes, layout_of, shapes_of
from distprune.pruning.scores import Score, build_score
from distprune.pruning.targets import targets_of
from distprune.tasks.base import Batch, Task
from distprune.teachers.choose import is_cached
from distprune.teachers.live import LiveTeacher
from distprune.training.fit import check_model, check_teacher, check_zeros, prunes
from distprune.training.objective import Objective, put_out_features
from distprune.training.plan import Plan, make_plan
from distprune.training.setup import load_task, local_model

_MORE = "a machine with more"
_SPREAD = 0.02
"""Standard deviation of the weights that stand in for the real ones; speed and sizes do not depend on it."""


@dataclass(frozen=True)
class Subject:
    """A run that is to be planned; the models' parameters are on the meta device."""

    config: Config
    plan: Plan
    task: Task
    student: PreTrainedModel
    shapes: Shapes
    layout: Layout
    teacher: PreTrainedModel | None
    teacher_layout: Layout
    is_cached: bool
    """Whether the teacher's outputs are."""

    @property
    def teacher_shapes(self) -> tuple[Shapes, Layout] | None:
        """Sizes and layout of a teacher that is run; None where there is none, or its outputs are cached."""
        if self.teacher is None or self.is_cached:
            return None
        return shapes_of(self.teacher, [], ()), self.teacher_layout

    @property
    def micro_batch(self) -> int:
        """Examples in a forward pass on one rank."""
        return self.config.train.batch_size // (self.layout.world * self.config.train.accumulation)

    @property
    def score(self) -> Score:
        """What weights are pruned by."""
        return build_score(self.config.pruning.score, self.config.train.seed, self.config.fisher)

    @property
    def score_gradients(self) -> int:
        """Global batches that go forward and backward for the score alone, before prunings."""
        return self.config.fisher.samples * len(self.plan.ladder) if self.shapes.prunable and self.score.learns else 0

    def longest(self, data: Dataset, examples: int) -> Batch:
        """Return the batch of the rows with the most tokens."""
        lengths = data["length"][:]
        rows = sorted(range(len(lengths)), key=lengths.__getitem__)[-examples:]
        return self.task.collate(data.__getitems__(rows))

    def activations(self) -> Activations:
        """Count the activations of the longest example, on this machine, with weights that stand in."""
        model, batch = stand_in(self.student, self.layout.dtype), self.longest(self.task.train, 1)
        model.train()
        return count(model, self._loss(model, batch))

    def _loss(self, model: Any, batch: Batch) -> Callable[[], Tensor]:
        """Return what computes the loss of a batch, with the part of a teacher that is run."""
        teacher = None
        if self.teacher is not None and not self.is_cached:
            teacher = LiveTeacher(stand_in(self.teacher, self.teacher_layout.dtype).eval(), self.task)
        objective = Objective(self.task, teacher, self.config.distillation)
        return lambda: objective.losses(model, batch, []).total

    def outputs(self, model: PreTrainedModel, layout: Layout, *data: Dataset) -> int:
        """Return the most bytes at once in the forward pass of an evaluation's batch, counted as activations are."""
        filled = stand_in(model, layout.dtype).eval()

        def of(rows: Dataset) -> int:
            batch = self.longest(rows, 1)
            one = most_at_once(filled, lambda: self.task.predictions(self.task.forward(filled, batch), batch))
            return one * min(self.config.train.eval_batch_size, len(rows))

        return max(map(of, data))

    def need(self, on_gpu: bool) -> Need:
        """Return everything that a rank's memory depends on."""
        held = self.score.bytes_held if self.shapes.prunable else 0
        evaluated = self.task.evaluations().values()
        teaching, cached = 0, None
        if self.teacher is not None:
            of_cache = [self.task.train] if self.is_cached else []
            teaching = self.outputs(self.teacher, self.teacher_layout, *evaluated, *of_cache)
            cached = (shapes_of(self.teacher, [], ()), self.teacher_layout) if self.is_cached else None
        return Need(
            self.shapes,
            self.layout,
            self.teacher_shapes,
            self.activations(),
            self.micro_batch,
            on_gpu,
            held,
            self.outputs(self.student, self.layout, *evaluated),
            teaching,
            cached,
        )

    def examples_per_s(self) -> float:
        """Measure a rank's micro batch of the longest examples, on this machine's CPU in one process."""
        model = stand_in(self.student, self.layout.dtype).train()
        # A gradient and two moments of each.
        _check_memory(3 * sum(self.shapes.trained) * self.layout.dtype.itemsize, f"{_MORE}, or --examples-per-s")
        batch = self.longest(self.task.train, self.micro_batch)
        groups = decay_groups(model, self.config.optimizer.weight_decay)
        return measure(model, self._loss(model, batch), groups, self.micro_batch)


def subject_of(config: Config, world: int) -> Subject:
    """Load what a plan needs: the data and the models' configurations.

    Args:
        config: of the run.
        world: ranks that it is planned for.

    Raises:
        UserError: where they do not fit each other.
    """
    if world < 1:
        raise UserError(f"--world is {world}; allowed: at least 1")
    check_batch_size(config.train.batch_size, world, config.train.accumulation)
    layout = layout_of("deepspeed.student", config.deepspeed.student, world)
    teacher_layout = layout_of("deepspeed.teacher", config.deepspeed.teacher, world)
    directory = local_model(config.model.path, config.model.revision)
    task = load_task(config, directory)
    plan = make_plan(config, len(task.train))
    student = check_model(config, plan, task, directory)
    check_zeros(config, student, directory)
    put_out_features(config.distillation, student)
    if config.model.activation_checkpointing:
        checkpoint_activations(student)
    names = targets_of(config.pruning, student) if prunes(config, plan) else []
    shapes = shapes_of(student, decay_groups(student, config.optimizer.weight_decay), names)
    teacher = _teacher(config, task, directory)
    return Subject(config, plan, task, student, shapes, layout, teacher, teacher_layout, is_cached(config, task))


def _teacher(config: Config, task: Task, student: Path) -> PreTrainedModel | None:
    if not config.distillation.teaches:
        return None
    assert config.teacher.path is not None
    teacher = check_teacher(config, local_model(config.teacher.path, config.teacher.revision), task, student)
    put_out_features(config.distillation, teacher)
    return teacher.requires_grad_(False)


def stand_in(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """Give a model on the meta device random weights, in place; tied ones stay tied.

    Raises:
        UserError: this machine has no memory for them.
    """
    _check_memory(sum(each.numel() for each in model.parameters() if each.is_meta) * dtype.itemsize, _MORE)
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, meta in list(module._parameters.items()):
            if meta is not None and meta.is_meta:
                if id(meta) not in real:
                    values = torch.empty(meta.shape, dtype=dtype).normal_(0, _SPREAD)
                    real[id(meta)] = nn.Parameter(values, meta.requires_grad)
                module._parameters[name] = real[id(meta)]
    return model


def _check_memory(needed: int, allowed: str) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"a plan takes {needed / 1e9:.1f} GB on this machine, with {free / 1e9:.1f} to give; allowed: {allowed}"
        )
