"""Exchanges carried out one after the other, together, alone, and by ranks that do not agree."""

import pytest
import torch

from distprune.pruning.exchange import Exchange, Request, over_ranks, summed, together
from tests.unit.simulated import answer


def gathered(rank: int, rounds: int, operation: str = "sum", width: int = 1) -> Exchange[list[int]]:
    """Ask for numbers that tell the rank, the round and the place; return what was sent, in one list."""
    found: list[int] = []
    for turn in range(rounds):
        values = torch.arange(width) + 100 * turn + 10**4 * (rank + 1)
        found += (yield Request(values, operation)).tolist()  # type: ignore[arg-type]
    return found


def by_itself(ranks: int, *arguments: object) -> list[int]:
    results, _ = answer([gathered(rank, *arguments) for rank in range(ranks)])  # type: ignore[arg-type]
    assert all(each == results[0] for each in results)
    return results[0]


def test_sums_and_maxima_over_ranks() -> None:
    assert by_itself(3, 2, "sum", 2) == [60_000, 60_003, 60_300, 60_303]
    assert by_itself(3, 2, "max", 2) == [30_000, 30_001, 30_100, 30_101]


@pytest.mark.parametrize(
    "several",
    [
        [(2, "sum", 3)],
        [(1, "sum", 3), (4, "sum", 1), (0, "sum", 1), (2, "sum", 2)],
        [(2, "max", 2), (3, "sum", 1), (2, "max", 1)],
    ],
)
def test_together_each_gets_its_own_numbers_in_the_rounds_of_the_longest(several: list[tuple[int, str, int]]) -> None:
    results, sent = answer([together([gathered(rank, *each) for each in several]) for rank in range(3)])
    assert results == [[by_itself(3, *each) for each in several]] * 3
    assert sent == 8 * sum(rounds * width for rounds, _, width in several)


def test_together_sends_in_one_round_what_is_asked_for_at_a_time() -> None:
    exchange = together([gathered(0, 3, "sum", 2), gathered(0, 1, "sum", 5)])
    request = next(exchange)
    assert request.values.shape == (7,)
    assert exchange.send(request.values).values.shape == (2,)
    assert answer([together([])]) == ([[]], 0)


def test_a_process_without_a_group_is_the_only_rank() -> None:
    values = torch.tensor([[3, 4]])
    found = over_ranks(summed(values), torch.device("cpu"))
    assert torch.equal(found, values)
    found.zero_()
    assert values.any(), "an exchange may write to what it was sent"


@pytest.mark.parametrize("other", [(2, "max", 2), (2, "sum", 3), (1, "sum", 2), (3, "sum", 2)])
def test_ranks_that_ask_for_different_things_are_noticed(other: tuple[int, str, int]) -> None:
    with pytest.raises(AssertionError, match=r"ranks ask for different things|ranks ended before the others"):
        answer([gathered(0, 2, "sum", 2), gathered(1, *other)])
