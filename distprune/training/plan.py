"""A run in optimizer steps, from its configuration and the number of examples."""

from dataclasses import dataclass
from fractions import Fraction

from distprune.config import Config
from distprune.durations import multiples, parse, whole
from distprune.errors import UserError
from distprune.pruning.schedule import regrowths, sparsity_ladder
from distprune.training.lr import LrSchedule, lr_schedule

MOST_STEPS = 99_999_999
"""Of a run: names of checkpoints have eight digits, which is also their order."""


@dataclass(frozen=True)
class Plan:
    """The run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    evaluations: frozenset[int]
    ladder: dict[int, Fraction]
    regrowths: dict[int, float]
    lr: LrSchedule


def make_plan(config: Config, examples: int) -> Plan:
    """Turn the configuration's times into steps.

    Args:
        config: the run's configuration.
        examples: number of training examples.

    Raises:
        UserError: where there is no whole batch, or the schedule does not fit the run.
    """
    steps_per_epoch = examples // config.train.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"train.batch_size is {config.train.batch_size}, but there are only {examples} training examples; "
            f"allowed: at most {examples}"
        )
    total = whole(Fraction(str(config.train.epochs)) * steps_per_epoch)
    if total == 0:
        raise UserError(f"train.epochs is {config.train.epochs}, less than one optimizer step; allowed: more")
    if total > MOST_STEPS:
        raise UserError(
            f"train.epochs is {config.train.epochs}, {total:,} optimizer steps; allowed: up to {MOST_STEPS:,}"
        )
    eval_every = parse(config.train.eval_every, "train.eval_every").exact(steps_per_epoch)
    return Plan(
        steps_per_epoch,
        total,
        frozenset({*multiples(eval_every, total), total}),
        sparsity_ladder(config.pruning, steps_per_epoch, total),
        regrowths(config.regrowth, steps_per_epoch, total),
        lr_schedule(config.lr, steps_per_epoch, total),
    )
