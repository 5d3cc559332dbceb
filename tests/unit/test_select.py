"""The selection against a plain sort, on one rank and on simulated ones."""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.pruning.keys import CHUNK, magnitude_keys, ranked
from distprune.pruning.select import Cut, Source, select_smallest
from tests.unit.simulated import answer

GOLDEN = Path(__file__).parents[1] / "golden" / "select.json"
SMALLEST = 2.0**-149
LARGEST = (2 - 2.0**-23) * 2.0**127
TIES = [0.0, -0.0, SMALLEST, -SMALLEST, 2.0**-126, 0.5, -0.5, 1.0, LARGEST, math.inf, -math.inf]


class Piece(NamedTuple):
    """Consecutive keys that one rank owns."""

    keys: Tensor
    first: int


class Given(Source):
    """Keys by themselves."""

    def __init__(self, pieces: list[Piece], index_end: int, bits: int = 31):
        self.pieces, self.index_end, self.bits = pieces, index_end, bits
        self.total = 0  # no sample is asked for

    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        yield from self.pieces


def over(dealt: list[list[Piece]], k: int) -> tuple[Cut, int]:
    """Return the cut that all ranks found, and the bytes that each handed over."""
    every = [piece for pieces in dealt for piece in pieces]
    index_end = max(first + len(keys) for keys, first in every)
    bits = 62 if every[0].keys.dtype == torch.int64 else 31
    cuts, sent = answer([select_smallest(Given(pieces, index_end, bits), k) for pieces in dealt])
    assert len(set(cuts)) == 1, "the ranks disagree"
    return cuts[0], sent


def alone(pieces: list[Piece], k: int) -> Cut:
    return over([pieces], k)[0]


def selected(cut: Cut, pieces: list[Piece]) -> Tensor:
    """Return the selection, in the pieces' order."""
    return torch.cat([cut.selects(*piece) for piece in pieces])


def key(weight: float) -> int:
    return int(magnitude_keys(torch.tensor([abs(weight)]))) + 1


# ------------------------------------------------------------------------------ the problem


class Problem(NamedTuple):
    """Weights, which of them were pruned before, their global indices, and how many to select."""

    weights: list[float]
    pruned: list[bool]
    indices: list[int]
    k: int
    wide: bool = False
    """Whether the keys have 62 bits, those of equal weights equal."""

    @property
    def keys(self) -> Tensor:
        keys = magnitude_keys(torch.tensor(self.weights, dtype=torch.float32))
        keys = ranked(keys, torch.tensor(self.pruned, dtype=torch.bool).to(torch.int8) - 1)
        return keys.long() * (2**31 - 1) if self.wide else keys

    def pieces(self, cuts: list[int]) -> list[Piece]:
        """Return the weights cut up at places, and wherever the global index jumps."""
        jumps = [i for i in range(1, len(self.indices)) if self.indices[i] != self.indices[i - 1] + 1]
        bounds = sorted({0, len(self.weights), *(cut for cut in cuts if cut < len(self.weights)), *jumps})
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
    start = draw(st.sampled_from([0, 1, 2**10 - 2, 2**20 - 2, 2**31 - 2, 2**32 - 2, 2**40]))
    jump, place = draw(st.sampled_from([0, 1, 2**14, 2**31, 2**33])), draw(st.integers(0, size))
    indices = [start + i + (jump if i >= place else 0) for i in range(size)]
    return Problem(weights, pruned, indices, draw(st.integers(0, size)), draw(st.booleans()))


cut_places = st.lists(st.integers(1, 39), max_size=8)


def deal(problem: Problem, cuts: list[int], ranks: int, seed: int) -> list[list[Piece]]:
    """Deal the pieces to ranks at random, out of order; some ranks may get none."""
    rng = random.Random(seed)
    pieces = problem.pieces(cuts)
    rng.shuffle(pieces)
    dealt: list[list[Piece]] = [[] for _ in range(ranks)]
    for piece in pieces:
        rng.choice(dealt).append(piece)
    return dealt


# ------------------------------------------------------------------------------ against a sort


@given(problems(), cut_places)
@example(Problem([0.0], [False], [0], 0), [])
@example(Problem([math.inf], [False], [2**41], 1), [])
@example(Problem([-0.0, 0.0, SMALLEST], [False] * 3, [0, 1, 2], 1), [])
@example(Problem([1.0] * 5, [False] * 5, [3, 4, 5, 6, 7], 3), [2])
@example(Problem([0.0] * 4, [True, False, True, False], [0, 1, 2, 3], 3), [])
@example(Problem([0.0] * 4, [True] * 4, [0, 1, 2, 3], 0), [])
@settings(max_examples=300)
@pytest.mark.usefixtures("route")
def test_the_smallest_are_those_of_a_plain_sort(problem: Problem, cuts: list[int]) -> None:
    cut = alone(problem.pieces(cuts), problem.k)
    chosen = selected(cut, problem.pieces([]))
    assert int(chosen.sum()) == problem.k
    assert chosen.tolist() == problem.expected()
    if problem.k and not any(problem.pruned):
        assert cut.highest == problem.keys.sort().values[problem.k - 1]


@given(problems(), cut_places, st.integers(1, 5), st.integers(0, 2**20))
@settings(max_examples=150)
def test_any_split_over_ranks_gives_the_same_cut(problem: Problem, cuts: list[int], ranks: int, seed: int) -> None:
    dealt = deal(problem, cuts, ranks, seed)
    cut, _ = over(dealt, problem.k)
    assert cut == alone(problem.pieces([]), problem.k)
    mine = [piece for rank in dealt for piece in rank]
    assert selected(cut, mine).tolist() == expected_on(problem, mine)


@pytest.mark.parametrize("owner", range(4))
def test_ranks_that_own_nothing_take_part(owner: int) -> None:
    problem = Problem([0.5] * 9, [False] * 9, list(range(9)), 4)
    dealt = [problem.pieces([5]) if rank == owner else [] for rank in range(4)]
    assert over(dealt, problem.k)[0] == Cut(key(0.5), 4)


def test_empty_pieces_change_nothing() -> None:
    pieces = Problem([3.0, 1.0, 1.0], [False] * 3, [0, 1, 2], 2).pieces([])
    empty = Piece(torch.empty(0, dtype=torch.int32), 1)
    assert alone([empty, *pieces, empty], 1) == alone(pieces, 1)


@pytest.mark.parametrize("first", [0, 2**20, 2**33])
def test_only_small_histograms_travel(first: int) -> None:
    """7 KiB for the keys; 8 KiB for each 10 bits of the indices, only where the cut falls among ties."""
    keys = magnitude_keys(torch.tensor([2.0, 1.0, 1.0, 3.0]))
    for k, most in ((0, 0), (2, 7), (3, 7), (4, 7), (1, 7 + 8 * math.ceil((first + 4).bit_length() / 10))):
        _, sent = over([[Piece(keys[:2], first)], [Piece(keys[2:], first + 2)]], k)
        assert (sent > 0) == (k > 0)
        assert sent <= most * 1024


def test_more_than_there_are_is_an_assertion() -> None:
    with pytest.raises(AssertionError, match="k=4 is more than there are elements"):
        alone([Piece(magnitude_keys(torch.tensor([1.0, 1.0, 2.0])), 0)], 4)


def test_already_pruned_go_first_whatever_their_weight_is_now() -> None:
    problem = Problem([0.0, 9.0, 0.0, math.inf, 1.0], [False, True, False, True, False], list(range(5)), 3)
    assert selected(alone(problem.pieces([]), 3), problem.pieces([])).tolist() == [True, True, False, True, False]


@given(problems(), st.data())
@settings(max_examples=100)
def test_the_selection_grows_with_k(problem: Problem, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(0, problem.k))
    pieces = problem.pieces([])
    less, more = selected(alone(pieces, fewer), pieces), selected(alone(pieces, problem.k), pieces)
    assert not (less & ~more).any()


# ------------------------------------------------------------------------------ large


def levels(size: int, count: int, seed: int) -> Tensor:
    """Return weights of few magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-count, count + 1, (size,), generator=generator) / count


@pytest.mark.parametrize("count", [1, 50, 10_000_000])
@pytest.mark.parametrize("whole", [True, False])
def test_more_than_a_chunk(route: str, count: int, whole: bool) -> None:
    magnitudes = levels(2 * CHUNK + 7, count, seed=count).abs()
    keys = magnitude_keys(magnitudes)
    pieces = [Piece(part, n * CHUNK) for n, part in enumerate(torch.split(keys, CHUNK))]
    order = magnitudes.sort(stable=True).indices
    for k in (1, CHUNK, len(keys) // 2, len(keys) - 1, len(keys)):
        cut = alone([Piece(keys, 0)] if whole else pieces, k)
        expected = torch.zeros(len(keys), dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(selected(cut, pieces), expected)
        assert cut.highest == int(magnitude_keys(magnitudes.kthvalue(k).values))


def test_many_ranks_cut_large_parameters_unevenly() -> None:
    keys = magnitude_keys(levels(2 * CHUNK + 3, 20, seed=5).abs())
    bounds = [0, 1, CHUNK - 1, CHUNK - 1, CHUNK + 17, len(keys)]
    dealt = [[Piece(keys[a:b], a)] for a, b in pairwise(bounds)]
    for k in (1, 4321, CHUNK, len(keys)):
        cut, _ = over(dealt, k)
        assert cut == alone([Piece(keys, 0)], k)
        assert int(cut.selects(keys, 0).sum()) == k


def test_ties_that_are_too_many_to_be_held_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem([0.5, 1.0, 0.5, 0.5, 0.5], [False] * 5, [3, 4, 5, 6, 2**21], 3)
    expected = alone(problem.pieces([]), 3)
    monkeypatch.setattr("distprune.pruning.select._INSIDE_AT_MOST", 4)
    assert alone(problem.pieces([]), 3) == expected == Cut(key(0.5), 7)


@pytest.mark.parametrize("first", [2**31 - 3, 2**31, 2**33 + 5, 2**41])
def test_global_indices_beyond_32_bits(first: int) -> None:
    """Three parameters of one value, the second and third far beyond 2**31 weights."""
    keys = magnitude_keys(torch.full((6,), 0.25))
    pieces = [Piece(keys, first + 2**30), Piece(keys, 0), Piece(keys, first)]
    cut = alone(pieces, 9)
    assert cut == Cut(int(keys[0]), first + 3)
    assert [cut.selects(*piece).sum().item() for piece in pieces] == [0, 6, 3]


# ------------------------------------------------------------------------------ Cut


@given(problems(), st.integers(-1, 50), st.data())
@settings(max_examples=150)
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


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
def test_the_bounds_of_a_cut_are_of_parts_that_are_not_empty(index: int, first: int, length: int) -> None:
    bounds = list(Cut(7, index).bounds(first, length))
    of_each = [bound for part, bound in bounds for _ in range(part.start, part.stop)]
    assert of_each == [8 if first + i < index else 7 for i in range(length)]
    assert all(part.start < part.stop for part, _ in bounds)


def test_a_cut_of_nothing_selects_nothing() -> None:
    assert not Cut(0, 0).selects(torch.tensor([0, 1]), 0).any()
    assert Cut(5, 5).selects(torch.empty(0, dtype=torch.int32), 0).shape == (0,)


def test_selecting_leaves_the_keys_as_they_are() -> None:
    keys = magnitude_keys(torch.tensor([1.0, 2.0]))
    before = keys.clone()
    Cut(int(keys[1]), 2).selects(keys, 0)
    assert torch.equal(keys, before)


# ------------------------------------------------------------------------------ golden


def golden() -> dict[str, dict[str, str]]:
    """Return, for each seed and k, the SHA-256 of the selection (a byte a weight) from 5,000 weights, many equal."""
    digests: dict[str, dict[str, str]] = {}
    for seed in (0, 1, 2):
        rng = random.Random(seed)
        weights = torch.tensor([rng.choice(TIES) if rng.random() < 0.5 else rng.random() for _ in range(5000)])
        pruned = torch.tensor([rng.random() < 0.1 for _ in range(5000)])
        piece = Piece(ranked(magnitude_keys(weights), pruned.to(torch.int8) - 1), 0)
        masks = {k: alone([piece], k).selects(*piece) for k in (0, 1, 450, 1450, 2500, 4500, 4999, 5000)}
        digests[str(seed)] = {str(k): hashlib.sha256(mask.numpy().tobytes()).hexdigest() for k, mask in masks.items()}
    return digests


def test_the_rule_is_the_one_of_earlier_versions() -> None:
    """Masks on disk depend on it: a change of the file needs a reason, and a line in the changelog."""
    assert golden() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=2) + "\n")
