"""Scores as integers, and the passes over them, against plain Python."""

import math
import struct
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from distprune.pruning import keys as keys_module
from distprune.pruning.keys import (
    HIGHEST_FLOAT,
    HIGHEST_MAGNITUDE,
    Interval,
    float_keys,
    histogram,
    key_float,
    key_magnitude,
    magnitude_keys,
    ranked,
)
from distprune.pruning.masks import KEPT, MAGNITUDE, PRUNED

SMALLEST = 2.0**-149
LARGEST = (2 - 2.0**-23) * 2.0**127
NANS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
floats = st.floats(width=32, allow_nan=False)
magnitudes = st.integers(0, 40) | st.integers(0, HIGHEST_MAGNITUDE) | st.just(HIGHEST_MAGNITUDE)


def from_bits(bits: list[int]) -> Tensor:
    return torch.tensor([int.from_bytes(struct.pack("<I", each), "little", signed=True) for each in bits]).int()


def magnitude_key(value: float) -> int:
    return int(magnitude_keys(torch.tensor([value]))) & MAGNITUDE


def float_key(value: float) -> int:
    return int(float_keys(torch.tensor([value])))


# ------------------------------------------------------------------------------ of one score


@given(floats, floats)
def test_keys_are_ordered_as_scores_are(a: float, b: float) -> None:
    for key, score in ((magnitude_key, abs), (float_key, float)):
        assert (key(a) < key(b)) == (score(a) < score(b))
        assert (key(a) == key(b)) == (score(a) == score(b))


@given(floats)
@example(0.0)
@example(-0.0)
@example(SMALLEST)
@example(-LARGEST)
@example(-math.inf)
def test_a_key_gives_its_score_back(value: float) -> None:
    assert key_magnitude(magnitude_key(value)) == abs(value)
    assert key_float(float_key(value)) == value


def test_keys_at_the_ends() -> None:
    scores = torch.tensor([0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, math.inf, -math.inf])
    top = 2**31 - 2**23
    assert (magnitude_keys(scores) & MAGNITUDE).tolist() == [0, 0, 1, 1, top - 1, top, top]
    assert float_keys(scores).tolist() == [2**31 + each for each in (0, 0, 1, -2, top - 1, top, -top - 1)]
    assert (top, 2**31 + top) == (HIGHEST_MAGNITUDE, HIGHEST_FLOAT)
    assert float_keys(-scores).min() >= 0


def test_a_nan_of_any_bits_is_above_infinity() -> None:
    scores = from_bits(NANS).view(torch.float32)
    assert scores.isnan().all()
    assert ((magnitude_keys(scores) & MAGNITUDE) > HIGHEST_MAGNITUDE).all()
    for keys, bits in ((float_keys(scores), 32), (ranked(magnitude_keys(scores), torch.full((5,), KEPT).char()), 31)):
        assert (keys > (HIGHEST_FLOAT if bits == 32 else HIGHEST_MAGNITUDE + 1)).all()
        assert (keys.long() < 2**bits).all()


def test_keys_of_magnitudes_are_the_scores_themselves() -> None:
    scores = torch.tensor([-1.0, 2.0])
    keys = magnitude_keys(scores)
    assert (keys.dtype, keys.data_ptr()) == (torch.int32, scores.data_ptr())


@pytest.mark.parametrize("of", [magnitude_keys, float_keys])
def test_pruned_weights_come_first_and_zeros_next(of: Callable[[Tensor], Tensor]) -> None:
    scores = torch.tensor([-3.0, 0.0, math.inf, -0.0, 1.0])
    keys = of(scores)
    before = keys.clone()
    mask = torch.tensor([KEPT, KEPT, PRUNED, PRUNED, KEPT], dtype=torch.int8)
    found = ranked(keys, mask)
    expected = [(key & MAGNITUDE if of is magnitude_keys else key) + 1 for key in keys.tolist()]
    assert found.tolist() == [expected[0], expected[1], 0, 0, expected[4]]
    assert found.dtype == keys.dtype
    assert torch.equal(keys, before)


# ------------------------------------------------------------------------------ passes over many


@given(
    st.lists(st.integers(0, 300) | magnitudes | st.just(2**31 - 1), max_size=100),
    st.integers(0, 300) | magnitudes,
    st.integers(0, 31),
    st.sampled_from([1, 2, 256, 1000]),
)
@pytest.mark.usefixtures("route")
def test_a_histogram_counts_what_is_in_its_bins(values: list[int], low: int, shift: int, bins: int) -> None:
    digits = [(value - low) >> shift for value in values]
    expected = [digits.count(each) for each in range(bins)]
    for factor, dtype in ((1, torch.int32), (1, torch.int64), (2**30, torch.int64)):
        keys = torch.tensor(values, dtype=dtype) * factor
        found = histogram(keys, low * factor, shift + factor.bit_length() - 1, bins)
        assert found.dtype == torch.int64
        assert found.tolist() == expected


def plain(keys: list[int], low: int, high: int, first: int) -> tuple[int, list[int], list[int]]:
    """Return how many keys are below, those inside, and their indices."""
    inside = [i for i, key in enumerate(keys) if low <= key < high]
    return sum(key < low for key in keys), [keys[i] for i in inside], [first + i for i in inside]


def signed(keys: list[int], negative: list[bool]) -> Tensor:
    return from_bits([key | (0x80000000 if minus else 0) for key, minus in zip(keys, negative, strict=True)])


@given(st.lists(st.tuples(magnitudes, st.booleans()), max_size=120), magnitudes, magnitudes, st.data())
@pytest.mark.usefixtures("route")
def test_an_interval_is_that_of_plain_comparisons(
    entries: list[tuple[int, bool]], a: int, b: int, data: st.DataObject
) -> None:
    keys = [key for key, _ in entries]
    low, high = min(a, b), max(a, b) + 1
    first = data.draw(st.sampled_from([0, 7, 2**31 - 3, 2**40]))
    places = sorted({0, len(keys), *data.draw(st.lists(st.integers(0, len(keys)), max_size=4))})
    interval = Interval(low, high, len(keys) + 32, torch.device("cpu"))
    of_all = signed(keys, [minus for _, minus in entries])
    interval.add(of_all[:0], first)
    for start, end in pairwise(places):
        interval.add(of_all[start:end], first + start)
    below, inside, indices = plain(keys, low, high, first)
    assert not interval.overfull
    assert (interval.below, interval.held) == (below, len(inside))
    assert interval.keys.tolist() == inside
    assert interval.indices.tolist() == indices
    number, found = keys_module._split(of_all, low, high - 1)  # what an accelerator does
    assert (number, found.tolist()) == (below, [each - first for each in indices])


@pytest.mark.parametrize("room", [0, 1, 40, 99])
def test_an_interval_without_room_says_so_and_writes_nothing_beyond(route: str, room: int) -> None:
    interval = Interval(3, 6, room, torch.device("cpu"))
    storage = torch.full((room + 100,), -7, dtype=torch.int32)
    interval._keys = storage[:room]
    for start in range(0, 100, 50):
        interval.add(torch.full((50,), 4, dtype=torch.int32), start)
    assert interval.overfull
    assert (storage[room:] == -7).all()
    held = interval.held
    interval.add(torch.full((50,), 4, dtype=torch.int32), 100)
    assert interval.held == held, "what came too late is looked at"


def test_an_interval_with_room_for_a_block_more_is_not_overfull(route: str) -> None:
    interval = Interval(3, 6, 100 + 32, torch.device("cpu"))
    for start in range(0, 100, 25):
        interval.add(torch.full((25,), 5, dtype=torch.int32), start)
    assert (interval.overfull, interval.held) == (False, 100)
    assert interval.indices.tolist() == list(range(100))


def test_a_gpu_takes_larger_pieces() -> None:
    assert keys_module.chunk_of(torch.device("cpu")) == keys_module.CHUNK
    assert keys_module.chunk_of(torch.device("cuda", 1)) == 1 << 24
