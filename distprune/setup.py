"""From a configuration to everything a run is made of, every mistake of the user's found before the first step."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from distprune import dist
from distprune.batches import check_batch_size
from distprune.config import Config
from distprune.durations import parse
from distprune.engine import build_frozen, build_student
from distprune.errors import UserError
from distprune.lr import LrSchedule, lr_schedule
from distprune.pruning.pruner import Pruner
from distprune.pruning.schedule import sparsity_ladder
from distprune.pruning.targets import find_targets
from distprune.shards import shards_of
from distprune.tasks import build_task
from distprune.tasks.base import Task
from distprune.weights import resolve


@dataclass
class Setup:
    """A run that is ready to train."""

    world: dist.World
    task: Task
    student: Any
    teacher: Any | None
    pruner: Pruner | None
    plan: "Plan"
    new_weights: list[str]


@dataclass(frozen=True)
class Plan:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    eval_every: int
    ladder: dict[int, Fraction]
    lr: LrSchedule

    @property
    def last_pruning(self) -> int:
        """The step of the last pruning; -1 where there is none. States after it are at the target sparsity."""
        return max(self.ladder, default=-1)


def make_plan(config: Config, examples: int) -> Plan:
    """Turn the configuration's times into steps.

    Args:
        config: the run's configuration.
        examples: number of training examples.

    Raises:
        UserError: where there is no whole batch, or the schedule does not fit the run.
    """
    steps_per_epoch = examples // config.train.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, but there are only {examples} training examples; "
            f"allowed: at most {examples}"
        )
    total = round(Fraction(str(config.train.epochs)) * steps_per_epoch)
    return Plan(
        steps_per_epoch,
        total,
        max(1, parse(config.train.eval_every, "train.eval_every").steps(steps_per_epoch)),
        sparsity_ladder(config.pruning, steps_per_epoch, total),
        lr_schedule(config.lr, steps_per_epoch, total),
    )


def prepare(config: Config) -> Setup:
    """Build tokenizer, data, student, teacher and pruner. Collective: every rank calls it.

    Raises:
        UserError: on every rank, where any part of the configuration does not fit the others.
    """
    world = dist.detect()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    micro_batch = config.train.batch_size // (world.size * config.train.accumulation)
    directory = local_model(config.model.path, config.model.revision)
    task = load_task(config, directory)

    def check() -> Plan:
        check_batch_size(config.train.batch_size, world.size, config.train.accumulation)
        return make_plan(config, len(task.train))

    plan = dist.agree(check)
    teacher = None
    if config.distillation.hardness > 0:
        teacher = _teacher(config, task, micro_batch)
    student, fresh = build_student(config, directory, task.auto_class, task.model_options(), micro_batch)
    pruner = None
    if plan.ladder:
        names = dist.agree(lambda: find_targets(student.module, config.pruning.include, config.pruning.exclude))
        pruner = Pruner(dist.agree(lambda: shards_of(student, names)), student.basic_optimizer)
    torch.manual_seed(config.train.seed * 1_000_003 + world.rank)
    return Setup(world, task, student, teacher, pruner, plan, fresh)


def local_model(path: str, revision: str | None) -> Path:
    """Return a model's directory on this node; local rank 0 downloads. Collective: every rank calls it."""

    def find() -> Path:
        with dist.local_first():
            return resolve(path, revision)

    return dist.agree(find)


def load_task(config: Config, directory: Path) -> Task:
    """Load and tokenise the data, once per node. Collective: every rank calls it."""

    def build() -> Task:
        with dist.local_first():
            return build_task(config, load_tokenizer(config.model.tokenizer or str(directory)))

    return dist.agree(build)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model directory or on the hub.

    Raises:
        UserError: where there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise UserError(f"there is no tokenizer to be had in {path!r}: {error}".splitlines()[0]) from error
    return tokenizer


def _teacher(config: Config, task: Task, micro_batch: int) -> Any:
    """Collective: every rank calls it."""
    assert config.teacher.path is not None
    directory = local_model(config.teacher.path, config.teacher.revision)
    dist.agree(lambda: task.check_teacher(AutoConfig.from_pretrained(directory), load_tokenizer(str(directory))))
    return build_frozen(config.deepspeed.teacher, directory, task.auto_class, task.model_options(), micro_batch)
