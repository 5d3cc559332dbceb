"""The selection against a plain sort, on one rank and on simulated ones: threads that share a summing barrier."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.pruning.select import CHUNK, Cut, key_magnitude, magnitude_keys, select_smallest

GOLDEN = Path(__file__).parents[1] / "golden" / "select.json"
SMALLEST = 2.0**-149
LARGEST = (2 - 2.0**-23) * 2.0**127
TIES = [0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, 0.5, -0.5, 1.0, LARGEST, math.inf, -math.inf]


class Piece(NamedTuple):
    """Consecutive weights that one rank owns."""

    keys: Tensor
    first: int


# ------------------------------------------------------------------------------------------ simulated ranks


class Ranks:
    """Threads that sum int64 tensors, as ranks do; a rank that calls more or less often than others fails."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = Barrier(size, timeout=20)
        self.given: list[Tensor] = [torch.empty(0)] * size
        self.bytes_sent: list[list[int]] = [[] for _ in range(size)]

    def all_sum(self, rank: int) -> Callable[[Tensor], Tensor]:
        def sum_over_ranks(counts: Tensor) -> Tensor:
            assert counts.dtype == torch.int64
            self.given[rank] = counts.clone()
            self.bytes_sent[rank].append(counts.numel() * 8)
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        return sum_over_ranks

    def select(self, pieces: list[list[Piece]], k: int) -> Cut:
        """Return the cut that every rank found."""

        def on_rank(rank: int) -> Cut:
            try:
                return select_smallest(lambda: iter(pieces[rank]), k, self.all_sum(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            cuts = list(pool.map(on_rank, range(self.size)))
        assert len(set(cuts)) == 1, "the ranks disagree"
        assert len({tuple(sent) for sent in self.bytes_sent}) == 1, "the ranks called all_sum differently"
        return cuts[0]


def alone(pieces: list[Piece], k: int) -> Cut:
    return select_smallest(lambda: iter(pieces), k, lambda counts: counts)


def selected(cut: Cut, pieces: list[Piece]) -> Tensor:
    """Return the selection, in the pieces' order."""
    return torch.cat([cut.selects(*piece) for piece in pieces])


# ----------------------------------------------------------------------------------------------- the problem


class Problem(NamedTuple):
    """Weights, which of them were pruned before, their global indices, and how many to select."""

    weights: list[float]
    pruned: list[bool]
    indices: list[int]
    k: int

    @property
    def keys(self) -> Tensor:
        keys = magnitude_keys(torch.tensor(self.weights, dtype=torch.float32))
        return keys.masked_fill(torch.tensor(self.pruned, dtype=torch.bool), 0)

    def pieces(self, cuts: list[int]) -> list[Piece]:
        """Return the weights cut up at places, and wherever the global index jumps."""
        jumps = [i for i in range(1, len(self.indices)) if self.indices[i] != self.indices[i - 1] + 1]
        bounds = sorted({0, len(self.weights), *cuts, *jumps})
        return [Piece(self.keys[a:b], self.indices[a]) for a, b in pairwise(bounds)]

    def expected(self) -> list[bool]:
        """Return the selection by a plain sort: magnitude, below all of them where pruned before; global index."""
        scores = [-1.0 if pruned else abs(weight) for weight, pruned in zip(self.weights, self.pruned, strict=True)]
        order = sorted(range(len(scores)), key=lambda i: (scores[i], self.indices[i]))
        chosen = set(order[: self.k])
        return [i in chosen for i in range(len(scores))]


def expected_on(problem: Problem, pieces: list[Piece]) -> list[bool]:
    """Return the expected selection in the order of shuffled pieces."""
    by_index = dict(zip(problem.indices, problem.expected(), strict=True))
    return [by_index[first + i] for keys, first in pieces for i in range(len(keys))]


finite_or_not = st.floats(width=32, allow_nan=False)
few = st.sampled_from(TIES)
sizes = st.integers(1, 40)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size = draw(sizes)
    values = draw(
        st.sampled_from([few, finite_or_not, few | finite_or_not, st.sampled_from(draw(st.permutations(TIES))[:1])])
    )
    weights = draw(st.lists(values, min_size=size, max_size=size))
    pruned = draw(st.lists(st.booleans(), min_size=size, max_size=size) | st.just([False] * size))
    start = draw(st.sampled_from([0, 1, 2**14 - 2, 2**28 - 2, 2**31 - 2, 2**32 - 2, 2**40]))
    jump, place = draw(st.sampled_from([0, 1, 2**14, 2**31, 2**33])), draw(st.integers(0, size))
    indices = [start + i + (jump if i >= place else 0) for i in range(size)]
    return Problem(weights, pruned, indices, draw(st.integers(0, size)))


cut_places = st.lists(st.integers(1, 39), max_size=8)


def deal(problem: Problem, cuts: list[int], ranks: int, seed: int) -> list[list[Piece]]:
    """Deal the pieces to ranks at random, out of order; some ranks may get none."""
    rng = random.Random(seed)
    pieces = problem.pieces([place for place in cuts if place < len(problem.weights)])
    rng.shuffle(pieces)
    dealt: list[list[Piece]] = [[] for _ in range(ranks)]
    for piece in pieces:
        rng.choice(dealt).append(piece)
    return dealt


# --------------------------------------------------------------------------------------------- against a sort


@given(problems(), cut_places)
@example(Problem([0.0], [False], [0], 0), [])
@example(Problem([math.inf], [False], [2**41], 1), [])
@example(Problem([-0.0, 0.0, SMALLEST], [False] * 3, [0, 1, 2], 1), [])
@example(Problem([1.0] * 5, [False] * 5, [3, 4, 5, 6, 7], 3), [2])
@example(Problem([0.0] * 4, [True, False, True, False], [0, 1, 2, 3], 3), [])
@example(Problem([0.0] * 4, [True] * 4, [0, 1, 2, 3], 0), [])
@settings(max_examples=300, deadline=None)
def test_the_smallest_are_those_of_a_plain_sort(problem: Problem, cuts: list[int]) -> None:
    cut = alone(problem.pieces([place for place in cuts if place < len(problem.weights)]), problem.k)
    chosen = selected(cut, problem.pieces([]))
    assert int(chosen.sum()) == problem.k
    assert chosen.tolist() == problem.expected()


@given(problems(), cut_places, st.integers(1, 5), st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_any_split_over_ranks_gives_the_same_cut(problem: Problem, cuts: list[int], ranks: int, seed: int) -> None:
    dealt = deal(problem, cuts, ranks, seed)
    group = Ranks(ranks)
    cut = group.select(dealt, problem.k)
    assert cut == alone(problem.pieces([]), problem.k)
    mine = [piece for rank in dealt for piece in rank]
    assert selected(cut, mine).tolist() == expected_on(problem, mine)


@pytest.mark.parametrize("owner", range(4))
def test_ranks_that_own_nothing_take_part(owner: int) -> None:
    problem = Problem([0.5] * 9, [False] * 9, list(range(9)), 4)
    dealt = [problem.pieces([5]) if rank == owner else [] for rank in range(4)]
    group = Ranks(4)
    assert group.select(dealt, problem.k) == Cut(int(magnitude_keys(torch.tensor([0.5]))), 4)
    assert len(group.bytes_sent[0]) == 6


def test_empty_pieces_change_nothing() -> None:
    pieces = Problem([3.0, 1.0, 1.0], [False] * 3, [0, 1, 2], 2).pieces([])
    empty = Piece(torch.empty(0, dtype=torch.int32), 1)
    assert alone([empty, *pieces, empty], 1) == alone(pieces, 1)


def test_only_small_histograms_travel() -> None:
    """16 KiB a round for the keys; 128 KiB a round for the indices, only where the cut falls among ties."""
    keys = magnitude_keys(torch.tensor([2.0, 1.0, 1.0, 3.0]))
    for k, most in ((0, []), (2, [16] * 3), (1, [16] * 3 + [128] * 3)):
        group = Ranks(2)
        group.select([[Piece(keys[:2], 0)], [Piece(keys[2:], 2)]], k)
        sent = [size / 1024 for size in group.bytes_sent[0]]
        assert len(sent) == len(most)
        assert all(kib <= limit for kib, limit in zip(sent, most, strict=True))


def test_more_than_there_are_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="k=4 is more than there are elements"):
        alone([Piece(magnitude_keys(torch.tensor([1.0, 1.0, 2.0])), 0)], 4)


def test_already_pruned_go_first_whatever_their_weight_is_now() -> None:
    problem = Problem([0.0, 9.0, 0.0, math.inf, 1.0], [False, True, False, True, False], list(range(5)), 3)
    assert selected(alone(problem.pieces([]), 3), problem.pieces([])).tolist() == [True, True, False, True, False]


@given(problems(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_selection_grows_with_k(problem: Problem, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(0, problem.k))
    pieces = problem.pieces([])
    less, more = selected(alone(pieces, fewer), pieces), selected(alone(pieces, problem.k), pieces)
    assert not (less & ~more).any()


# ------------------------------------------------------------------------------------------------------ large


def levels(size: int, count: int, seed: int) -> Tensor:
    """Return weights of few magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-count, count + 1, (size,), generator=generator) / count


@pytest.mark.parametrize("count", [1, 50, 10_000_000])
@pytest.mark.parametrize("whole", [True, False])
def test_more_than_a_chunk(count: int, whole: bool) -> None:
    weights = levels(3 * CHUNK + 7, count, seed=count)
    keys = magnitude_keys(weights)
    pieces = [Piece(part, n * CHUNK) for n, part in enumerate(torch.split(keys, CHUNK))]
    order = weights.abs().sort(stable=True).indices
    for k in (1, CHUNK, len(weights) // 2, len(weights) - 1, len(weights)):
        cut = alone([Piece(keys, 0)] if whole else pieces, k)
        expected = torch.zeros(len(weights), dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(selected(cut, pieces), expected)
        kth = float(weights.abs().kthvalue(k).values)
        assert cut.key == int(magnitude_keys(torch.tensor([kth]))) + (cut.index == 0)


def test_many_ranks_cut_large_parameters_unevenly() -> None:
    keys = magnitude_keys(levels(2 * CHUNK + 3, 20, seed=5))
    bounds = [0, 1, CHUNK - 1, CHUNK - 1, CHUNK + 17, len(keys)]
    dealt = [[Piece(keys[a:b], a)] for a, b in pairwise(bounds)]
    for k in (1, 4321, CHUNK, len(keys)):
        cut = Ranks(5).select(dealt, k)
        assert cut == alone([Piece(keys, 0)], k)
        assert int(cut.selects(keys, 0).sum()) == k


@pytest.mark.parametrize("first", [2**31 - 3, 2**31, 2**33 + 5, 2**41])
def test_global_indices_beyond_32_bits(first: int) -> None:
    """Three parameters of one value, the second and third far beyond 2**31 weights."""
    keys = magnitude_keys(torch.full((6,), 0.25))

    def chunks() -> Iterator[tuple[Tensor, int]]:
        yield keys, first + 2**30
        yield keys, 0
        yield keys, first

    cut = select_smallest(chunks, 9, lambda counts: counts)
    assert cut == Cut(int(keys[0]), first + 3)
    assert [cut.selects(part, at).sum().item() for part, at in chunks()] == [0, 6, 3]


# -------------------------------------------------------------------------------------------------------- Cut


@given(problems(), st.integers(-1, 50), st.data())
@settings(max_examples=150, deadline=None)
def test_a_cut_selects_the_same_in_pieces_as_in_one(problem: Problem, offset: int, data: st.DataObject) -> None:
    keys, first = problem.keys, problem.indices[0]
    cut = Cut(data.draw(st.sampled_from(keys.tolist())) + data.draw(st.integers(0, 1)), max(0, first + offset))
    whole = cut.selects(keys, first)
    assert whole.dtype == torch.bool
    by_hand = [k < cut.key or (k == cut.key and first + i < cut.index) for i, k in enumerate(keys.tolist())]
    assert whole.tolist() == by_hand
    bounds = sorted({0, len(keys), *data.draw(st.lists(st.integers(0, len(keys)), max_size=5))})
    parts = [cut.selects(keys[a:b], first + a) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


def test_selecting_leaves_the_keys_as_they_are() -> None:
    keys = magnitude_keys(torch.tensor([1.0, 2.0]))
    before = keys.clone()
    Cut(int(keys[1]), 2).selects(keys, 0)
    assert torch.equal(keys, before)


# ------------------------------------------------------------------------------------------------------- keys


@given(finite_or_not, finite_or_not)
def test_keys_are_ordered_as_magnitudes_are(a: float, b: float) -> None:
    first, second = magnitude_keys(torch.tensor([a, b])).tolist()
    assert (first < second) == (abs(a) < abs(b))
    assert (first == second) == (abs(a) == abs(b))
    assert 0 < first < 2**31 - 1


@given(finite_or_not)
def test_a_key_gives_its_magnitude_back(value: float) -> None:
    assert key_magnitude(int(magnitude_keys(torch.tensor([value])))) == abs(value)


def test_keys_at_the_ends() -> None:
    keys = magnitude_keys(torch.tensor([0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, math.inf, -math.inf]))
    top = 2**31 - 2**23 + 1
    assert keys.dtype == torch.int32
    assert keys.tolist() == [1, 1, 2, 2, top - 1, top, top]
    assert key_magnitude(0) == 0.0
    assert key_magnitude(2) == SMALLEST


def test_keys_of_a_strided_view() -> None:
    weights = torch.tensor([[3.0, 1.0], [2.0, -4.0]])
    assert torch.equal(magnitude_keys(weights[:, 1]), magnitude_keys(torch.tensor([1.0, 4.0])))


# ----------------------------------------------------------------------------------------------------- golden


def golden() -> dict[str, dict[str, str]]:
    """Return, for each seed and k, the SHA-256 of the selection (a byte a weight) from 5,000 weights, many equal."""
    digests: dict[str, dict[str, str]] = {}
    for seed in (0, 1, 2):
        rng = random.Random(seed)
        weights = torch.tensor([rng.choice(TIES) if rng.random() < 0.5 else rng.random() for _ in range(5000)])
        pruned = torch.tensor([rng.random() < 0.1 for _ in range(5000)])
        piece = Piece(magnitude_keys(weights).masked_fill(pruned, 0), 0)
        masks = {k: alone([piece], k).selects(*piece) for k in (0, 1, 450, 1450, 2500, 4500, 4999, 5000)}
        digests[str(seed)] = {str(k): hashlib.sha256(mask.numpy().tobytes()).hexdigest() for k, mask in masks.items()}
    return digests


def test_the_rule_is_the_one_of_earlier_versions() -> None:
    """Masks on disk depend on it: a change of the file needs a reason, and a line in the changelog."""
    assert golden() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=2) + "\n")
