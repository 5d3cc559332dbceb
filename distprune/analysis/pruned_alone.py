"""A model run as a run's student would be, sharded or not, with parts of it pruned alone by a run's own pruner."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

import torch

from distprune import dist
from distprune.analysis.components import Part, measure_parts
from distprune.config import Config, DistillationConfig, PruningConfig, RegrowthConfig
from distprune.engines.batches import eval_batches
from distprune.engines.build import set_learning_rate
from distprune.engines.evaluate import on_device
from distprune.training.setup import Setup, build_pruner, prepare

REPEAT = 7
"""Forward passes that are timed."""

T = TypeVar("T")


def dense_setup(config: Config) -> Setup:
    """Return a run's student with a learning rate of 0, all of it trained. Collective: every rank calls it.

    Args:
        config: of the run; what only its training needs is taken out, so that any number of ranks fits its batch.

    Raises:
        UserError: on every rank, where any part of the configuration does not fit the others.
    """
    config.task.more_validation = []
    config.model.dropout, config.model.freeze = 0.0, []
    config.train.batch_size, config.train.accumulation = dist.detect().size, 1
    config.pruning, config.regrowth, config.distillation = PruningConfig(), RegrowthConfig(), DistillationConfig()
    setup = prepare(config)
    set_learning_rate(setup.student, 0.0)
    return setup


def costs_of(config: Config, setup: Setup, layers: bool) -> list[Part]:
    """Return what the parts cost on the first evaluation batch, the same on every rank. Collective: all call it.

    Args:
        config: of the run.
        setup: of `dense_setup`.
        layers: whether each layer's attention and feed-forward come after the components.
    """
    student, task = setup.student, setup.task
    rows = eval_batches(task.validation["length"], config.train.eval_batch_size, 0, 1)[0].indices
    batch = on_device(task.collate(task.validation.__getitems__(rows)), student)
    was_training = student.module.training
    student.eval()
    with torch.no_grad():
        parts = measure_parts(
            student.module,
            lambda: task.forward(student, batch),
            batch["input_ids"].numel(),
            student.device,
            REPEAT,
            layers,
        )
    student.train(was_training)
    sums = dist.all_sum([part.latency_share for part in parts])
    return [replace(part, latency_share=total / setup.world.size) for part, total in zip(parts, sums, strict=True)]


def pruned_alone(
    config: Config, setup: Setup, matrices: Sequence[str], sparsities: Sequence[float], measure: Callable[[], T]
) -> list[T]:
    """Return what is measured with nothing but some matrices pruned by magnitude; the model is then as it was.

    Collective: every rank calls it.

    Args:
        config: of the run; its pruning section does not matter.
        setup: of `dense_setup`.
        matrices: names of the parameters, pruned together.
        sparsities: ascending.
        measure: called at each of them.
    """
    pruning = PruningConfig(include=[f"^{re.escape(name)}$" for name in matrices])
    pruner = build_pruner(replace(config, pruning=pruning), setup.student)
    dense = [shard.master.clone() for shard in pruner.shards]
    measured = []
    for sparsity in sparsities:
        _backward(setup)
        pruner.after_backward(Fraction(str(sparsity)))
        setup.student.step()
        measured.append(measure())
    pruner.detach()
    for shard, values in zip(pruner.shards, dense, strict=True):
        shard.master.copy_(values)
    _backward(setup)
    setup.student.step()
    return measured


def _backward(setup: Setup) -> None:
    """Let DeepSpeed have gradients that are all zero, for a step that only carries the fp32 weights everywhere.

    Collective: every rank calls it.
    """
    batch = on_device(setup.task.collate(setup.task.train.__getitems__([0])), setup.student)
    setup.student.backward(setup.task.forward(setup.student, batch).float().sum() * 0.0)
