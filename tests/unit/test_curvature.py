"""Gradients that are taken for a score alone."""

from types import SimpleNamespace
from typing import Any

from distprune.training.curvature import estimate
from tests.unit.micro_batches import Noted, config


def noted(step: int, seed: int = 42, rank: int = 0, ranks: int = 1) -> Noted:
    task = Noted(rank, ranks)
    pruner: Any = SimpleNamespace(learn=lambda: None)
    estimate(config(seed), task.setup, pruner, step, lambda: None)
    return task


def test_each_sample_draws_anew_and_a_run_that_goes_on_draws_the_same() -> None:
    found = noted(7).drawn
    assert len(found) == 24
    assert len({draw for draw, _ in found}) == 12, "one for the micro-batches of a sample"
    assert found == noted(7).drawn
    assert found != noted(8).drawn
    other = noted(7, seed=43)
    assert other.drawn != found
    assert set(other.seeds).isdisjoint(noted(7).seeds)


def test_the_samples_beyond_an_epoch_are_of_another_order() -> None:
    rows = [sorted((*first, *second)) for (_, first), (_, second) in zip(*[iter(noted(7).drawn)] * 2, strict=True)]
    epochs = list(zip(rows[::2], rows[1::2], strict=True))
    assert all(sorted(one + other) == list(range(8)) for one, other in epochs)
    assert len({str(sorted(epoch)) for epoch in epochs}) > 1


def test_the_ranks_take_different_rows_of_a_batch() -> None:
    alone, first, second = noted(7).drawn, noted(7, rank=0, ranks=2).drawn, noted(7, rank=1, ranks=2).drawn
    for number in range(12):
        of_both = [row for drawn in (first, second) for _, rows in drawn[2 * number : 2 * number + 2] for row in rows]
        assert sorted(of_both) == sorted(row for _, rows in alone[2 * number : 2 * number + 2] for row in rows)


def test_the_run_goes_on_with_its_dropout() -> None:
    assert noted(7).modes == [False, True]
