"""Selection by a sampled interval: where it hits, where it misses and is exact all the same, and on 1,024 ranks."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distprune.pruning import select
from distprune.pruning.keys import CHUNK, magnitude_keys, ranked
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.scores import Magnitude
from distprune.pruning.select import Cut, select_smallest
from distprune.pruning.slices import Slice
from distprune.pruning.structures.unstructured import Elements
from tests.unit.simulated import answer

N = (1 << 20) + 4321
RANKS = [0, 1, 70, 70, CHUNK + 5, N // 2, N // 2 + 63, N - 10, N]


class Weights:
    """Weights laid end to end, and which of them were pruned before."""

    def __init__(self, weights: Tensor, pruned: Tensor | None = None):
        self.weights = weights
        self.mask = torch.full((len(weights),), KEPT, dtype=torch.int8)
        if pruned is not None:
            self.mask[pruned] = PRUNED
            self.weights = weights.masked_fill(pruned, 0.0)
        self.sorted, self.order = ranked(magnitude_keys(self.weights), self.mask).sort(stable=True)

    def expected(self, k: int) -> Cut:
        key = int(self.sorted[k - 1])
        if k == len(self.sorted) or self.sorted[k] > key:
            return Cut(key + 1, 0)
        return Cut(key, int(self.order[k - 1]) + 1)

    def sources(self, bounds: list[int]) -> list[Elements]:
        return [self._source(start, end) for start, end in pairwise(bounds)]

    def _source(self, start: int, end: int) -> Elements:
        weights, mask = self.weights[start:end], self.mask[start:end]
        bounds = (start, end, start, end)
        slices = [Slice("w", *bounds, 0, mask, lambda: weights)] if start < end else []
        return Elements(slices, Magnitude(), len(self.weights), len(self.weights))


def by_interval(weights: Weights, k: int, bounds: list[int] = RANKS) -> Cut | None:
    """Return what the interval alone gives: None where it does not hold the cut."""
    results, _ = answer([select._select_in_sampled_interval(each, k) for each in weights.sources(bounds)])
    assert len(set(results)) == 1
    return results[0]


def on_ranks(weights: Weights, k: int, bounds: list[int] = RANKS) -> tuple[Cut, int]:
    results, sent = answer([select_smallest(each, k) for each in weights.sources(bounds)])
    assert len(set(results)) == 1
    return results[0], sent


def normal(size: int = N, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fresh() -> Weights:
    return Weights(normal())


@pytest.fixture(scope="module")
def half_pruned() -> Weights:
    """Half of them pruned before, and a tenth zero without being pruned; the others with many ties."""
    chance = torch.rand(N, generator=torch.Generator().manual_seed(1))
    weights = ((normal() * 1000).round() / 1000).masked_fill((chance > 0.5) & (chance < 0.6), 0.0)
    return Weights(weights, chance < 0.5)


# ------------------------------------------------------------------------------ hits


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.8, 0.97, 0.99999])
def test_the_interval_holds_the_cut_of_a_plain_sort(route: str, fresh: Weights, share: float) -> None:
    k = int(share * N)
    assert by_interval(fresh, k) == fresh.expected(k)
    assert by_interval(fresh, k, [0, N]) == fresh.expected(k)


@pytest.mark.parametrize("k", [1, 2, N - 1, N])
def test_at_either_end_the_interval_is_open(fresh: Weights, k: int) -> None:
    assert by_interval(fresh, k) == fresh.expected(k)


@pytest.mark.parametrize("share", [0.62, 0.7, 0.9])
def test_beside_pruned_weights_and_zeros_the_interval_holds_the_cut(
    route: str, half_pruned: Weights, share: float
) -> None:
    k = int(share * N)
    expected = half_pruned.expected(k)
    assert expected.index > 0, "the cut does not fall among ties"
    assert by_interval(half_pruned, k) == expected


def test_sampled_or_not_the_cut_is_the_same(half_pruned: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, zero = int((half_pruned.sorted == 0).sum()), int((half_pruned.sorted <= 1).sum())
    ends = [1, pruned - 1, pruned, pruned + 1, zero - 1, zero, zero + 1, N - 1, N]
    sampled = [on_ranks(half_pruned, k)[0] for k in ends]
    monkeypatch.setattr(select, "_SAMPLED_FROM", N + 1)
    assert by_interval(half_pruned, zero + 1) is None
    assert sampled == [on_ranks(half_pruned, k)[0] for k in ends] == [half_pruned.expected(k) for k in ends]


def test_a_sample_too_large_to_be_held_is_read_twice(fresh: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    sample = Elements.sample

    def watched(source: Elements, every: int) -> Iterator[Tensor] | None:
        reads.append(every)
        return sample(source, every)

    monkeypatch.setattr(Elements, "sample", watched)
    for held, times in ((N, 1), (1, 3)):  # asked for, and read, and read again
        reads.clear()
        monkeypatch.setattr(select, "_SAMPLE_HELD", held)
        assert by_interval(fresh, N // 2, [0, N]) == fresh.expected(N // 2)
        assert len(reads) == times


def test_what_is_inside_are_the_keys_of_kept_weights_and_their_places(route: str) -> None:
    weights = Weights(torch.arange(-9.0, 9.0), torch.arange(18) % 5 == 0)
    low, high = (int(magnitude_keys(torch.tensor([each]))) + 1 for each in (2.0, 6.0))
    parts = [source.split(low, high, 100) for source in weights.sources([0, 7, 18])]
    found = [
        (key, place) for part in parts for key, place in zip(part.keys.tolist(), part.indices.tolist(), strict=True)
    ]
    keys = ranked(magnitude_keys(weights.weights), weights.mask).tolist()
    assert found == [(key, place) for place, key in enumerate(keys) if low <= key < high]
    assert sum(part.below for part in parts) == sum(key < low for key in keys)


# ------------------------------------------------------------------------------ no hits


def test_a_sample_unlike_the_rest_misses_and_the_cut_is_exact(route: str) -> None:
    """What is sampled is ten times larger, or smaller, than the rest."""
    for factor in (10.0, 0.1):
        values = normal().abs() + 1
        every = N // select._sample_size(N)
        runs = values[: N // 64 * 64].view(-1, 64)
        runs[::every] *= factor
        weights = Weights(values)
        for k in (N // 3, N - N // 3):
            assert by_interval(weights, k, [0, N]) is None
            assert on_ranks(weights, k, [0, N])[0] == weights.expected(k)


def test_an_interval_of_too_many_is_given_up_and_the_cut_is_exact(
    route: str, fresh: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_INSIDE_AT_MOST", 1000)
    assert by_interval(fresh, N // 2) is None
    assert on_ranks(fresh, N // 2)[0] == fresh.expected(N // 2)


def test_all_equal_weights_are_too_many_for_one_rank() -> None:
    weights = Weights(torch.full((N,), -0.5))
    assert by_interval(weights, N // 2, [0, N]) is None
    assert on_ranks(weights, N // 2)[0] == weights.expected(N // 2) == Cut(int(weights.sorted[0]), N // 2)


@pytest.mark.parametrize("deviations", [0, 1000])
def test_a_narrow_or_a_wide_interval_changes_nothing(
    fresh: Weights, monkeypatch: pytest.MonkeyPatch, deviations: int
) -> None:
    monkeypatch.setattr(select, "_DEVIATIONS", deviations)
    for k in (1, N // 7, N - 1, N):
        assert on_ranks(fresh, k)[0] == fresh.expected(k)


def test_shards_too_short_for_a_run_give_no_sample_and_the_cut_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a thousand ranks cut up small parameters."""
    monkeypatch.setattr(select, "_SAMPLED_FROM", 1000)
    weights = Weights(normal(2000))
    bounds = list(range(0, 2001, 40))
    for k in (1, 1000, 2000):
        assert on_ranks(weights, k, bounds)[0] == weights.expected(k)


# ------------------------------------------------------------------------------ many ranks

MANY = 1 << 22
KINDS = {
    "distinct": lambda: (torch.randperm(MANY, generator=torch.Generator().manual_seed(3)) - 7).float(),
    "ties": lambda: (normal(MANY) * 50).round() / 50,
    "equal": lambda: torch.full((MANY,), 0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_ranks_find_the_cut_of_one_and_hand_over_little(kind: str) -> None:
    weights = Weights(KINDS[kind]())
    steps = torch.rand(1023, generator=torch.Generator().manual_seed(2)).mul(MANY).long().sort().values
    steps[100:110] = steps[100]  # some ranks hold nothing
    bounds = [0, *steps.tolist(), MANY]
    k = 4 * MANY // 5 + 1
    expected = weights.expected(k)
    assert (expected.index > 0) == (kind != "distinct")
    cut, sent = on_ranks(weights, k, bounds)
    assert cut == expected == on_ranks(weights, k, [0, MANY])[0] == by_interval(weights, k, bounds)
    assert 0 < sent <= 64 * 1024
