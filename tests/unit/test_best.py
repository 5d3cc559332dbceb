from math import nan

from hypothesis import given
from hypothesis import strategies as st

from distprune.training.best import Best


def test_the_first_metric_decides() -> None:
    best = Best()
    assert best.update({"f1": 0.5, "accuracy": 0.9}, 10)
    assert best.update({"f1": 0.6, "accuracy": 0.1}, 20)
    assert not best.update({"f1": 0.55, "accuracy": 1.0}, 30)
    assert (best.metrics, best.step, best.evaluations_since) == ({"f1": 0.6, "accuracy": 0.1}, 20, 1)


def test_a_first_evaluation_is_the_best_however_bad() -> None:
    best = Best()
    assert best.update({"matthews": -1.0}, 5)
    assert (best.step, best.evaluations_since) == (5, 0)


def test_a_metric_that_is_not_a_number_is_the_worst() -> None:
    best = Best()
    assert best.update({"nll": nan}, 5)
    assert best.update({"nll": 9.0}, 10)
    assert not best.update({"nll": nan}, 15)
    assert best.step == 10


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12))
def test_is_the_earliest_of_the_highest(values: list[float]) -> None:
    best = Best()
    improved = [best.update({"accuracy": value}, step) for step, value in enumerate(values)]
    place = values.index(max(values))
    assert (best.metrics, best.step) == ({"accuracy": values[place]}, place)
    assert best.evaluations_since == len(values) - 1 - place
    assert improved == [value > max(values[:step], default=-1.0) for step, value in enumerate(values)]
