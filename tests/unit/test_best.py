from fractions import Fraction
from math import nan
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks.text_classification import TextClassification
from distprune.training.best import Best
from distprune.training.train import Trainer


class Errors(TextClassification):
    """A task whose metric is an error."""

    lower_is_better = ("mae",)


merit = object.__new__(TextClassification).merit


def test_the_first_metric_decides() -> None:
    best = Best()
    assert best.update({"f1": 0.5, "accuracy": 0.9}, 10, merit)
    assert best.update({"f1": 0.6, "accuracy": 0.1}, 20, merit)
    assert not best.update({"f1": 0.55, "accuracy": 1.0}, 30, merit)
    assert (best.metrics, best.step, best.evaluations_since) == ({"f1": 0.6, "accuracy": 0.1}, 20, 1)


def test_a_first_evaluation_is_the_best_however_bad() -> None:
    best = Best()
    assert best.update({"matthews": -1.0}, 5, merit)
    assert (best.step, best.evaluations_since) == (5, 0)


def test_a_metric_that_is_not_a_number_is_the_worst() -> None:
    best = Best()
    assert best.update({"nll": nan}, 5, merit)
    assert best.update({"nll": 9.0}, 10, merit)
    assert not best.update({"nll": nan}, 15, merit)
    assert best.step == 10


def test_the_least_error_is_the_best_of_a_task_that_names_it() -> None:
    best, merit_of_errors = Best(), object.__new__(Errors).merit
    assert [best.update({"mae": value}, step, merit_of_errors) for step, value in enumerate([4.0, 2.0, 3.0])] == [
        True,
        True,
        False,
    ]
    assert best.step == 1


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12))
def test_is_the_earliest_of_the_highest(values: list[float]) -> None:
    best = Best()
    improved = [best.update({"accuracy": value}, step, merit) for step, value in enumerate(values)]
    place = values.index(max(values))
    assert (best.metrics, best.step) == ({"accuracy": values[place]}, place)
    assert best.evaluations_since == len(values) - 1 - place
    assert improved == [value > max(values[:step], default=-1.0) for step, value in enumerate(values)]


def test_a_state_whose_pruning_no_step_has_carried_is_not_at_the_target() -> None:
    trainer: Any = object.__new__(Trainer)
    trainer.config = Config()
    trainer.config.pruning.sparsity = 0.9
    pruner = SimpleNamespace(carried=True, sparsity_asked=Fraction("0.9"))
    trainer.setup = SimpleNamespace(pruner=pruner)
    assert trainer.at_target
    pruner.carried = False
    assert not trainer.at_target
    with pytest.raises(UserError, match="the step of the last pruning was skipped"):
        trainer.write_final()
    pruner.carried, pruner.sparsity_asked = True, Fraction("0.8")
    assert not trainer.at_target
