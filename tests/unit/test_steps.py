"""The rows and seeds of a step, and what one that DeepSpeed refuses comes to."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from distprune.errors import UserError
from distprune.training.objective import Losses, Objective
from distprune.training.steps import backward, take_step
from tests.unit.micro_batches import Noted, config


def engine_that_raises(error: Exception) -> SimpleNamespace:
    def fail() -> None:
        raise error

    return SimpleNamespace(step=fail)


def test_the_smallest_scale_of_the_loss_is_one_sentence() -> None:
    error = Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    with pytest.raises(UserError, match=r"^fp16's gradients are not finite at step 7, .*; allowed: a lower lr\.peak"):
        take_step(engine_that_raises(error), 7)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        take_step(engine_that_raises(RuntimeError("a defect")), 7)


class Seeds:
    """Stands in for the objective."""

    def __init__(self, task: Noted) -> None:
        self.task = task

    def losses(self, engine: Any, batch: Any, rows: list[int]) -> Losses:
        self.task.run(engine, batch)
        return Losses(*torch.zeros(len(Losses._fields)))


def noted(step: int, seed: int = 42, rank: int = 0, ranks: int = 1) -> Noted:
    task = Noted(rank, ranks)
    backward(task.setup, cast("Objective", Seeds(task)), config(seed).train, [3, 1, 2, 0], step)
    return task


def test_what_is_drawn_of_a_batch_is_new_in_each_step_and_the_same_for_all_of_it() -> None:
    (first, second), other_rank = ({draw for draw, _ in noted(step).drawn} for step in (0, 1)), noted(0, 42, 1, 2)
    assert len(first) == len(second) == 1
    assert first != second
    assert {draw for draw, _ in other_rank.drawn} == first
    assert {draw for draw, _ in noted(0, seed=43).drawn} != first


def test_dropout_is_another_for_each_micro_batch_rank_step_and_seed_and_the_same_again() -> None:
    every = [noted(0), noted(1), noted(0, 43), noted(0, rank=1, ranks=2)]
    seeds = [seed for task in every for seed in task.seeds]
    assert len(set(seeds)) == len(seeds) == 8
    assert noted(0).seeds == every[0].seeds
