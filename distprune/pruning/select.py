"""The exact k-th smallest key over all ranks, and the exact cut among its ties, from small histograms.

A sample of the keys (some hundred thousand, evenly spaced) gives an interval that holds the k-th smallest with near
certainty and few keys beside it. One pass over all keys counts those below it and keeps those inside it, a few
thousandths of all; radix refinement among these is exact. Where the interval misses, or where there is no sample, the
same refinement goes over all keys, 8 bits a pass. Equal keys are ordered by their global index (parameter order, then
flat offset), which is refined in the same way, only where the cut falls among ties.

Every rank adds its counts to those of the others and sees the sums alone: no key leaves its rank, no float is ever
added, and the result does not depend on how the weights were cut up. What a rank hands over is at most 64 KiB, whatever
the size: 24 KiB for the sample, 10 KiB for the keys, and where there are ties 8 KiB for each 10 bits of the number of
weights.

Measured (docs/performance.md), on one thread: two reads of the weights, one counting and one masking, cost 7 times a
plain sum of them; the three to six histograms of radix refinement alone, at 0.9 ns a weight, 18 times and more. An
interval remembered from the pruning before would have to be as wide as the weights drift; the sample is a tenth of the
whole, and needs no memory of the past.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil, floor, sqrt

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, Request
from distprune.pruning.keys import Interval, histogram

_KEY_DIGIT, _SAMPLE_DIGIT, _INDEX_DIGIT = 8, 10, 10
_SAMPLED_FROM = 1 << 20
_INSIDE_AT_MOST = 900_000
_SAMPLE_HELD = 1_000_000
_PIECE = 1 << 16
_DEVIATIONS = 3

Keyed = Iterable[tuple[Tensor, Tensor]]
"""Keys and their global indices (int64), each of shape [n]."""


class Source(ABC):
    """This rank's part of what is selected from: integer keys, and the global index of each."""

    bits: int
    """Keys are at least 0 and less than 2**bits."""
    total: int
    """Elements over all ranks."""
    index_end: int
    """Global indices are less."""

    @abstractmethod
    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Yield keys (int32 or int64, shape [n]) and the global index of the first of them. Called once a pass."""

    def sample(self, every: int) -> Iterator[Tensor] | None:
        """Yield about one in ``every`` of the keys; None, on every rank, where that is not to be had."""
        return None

    def split(self, low: int, high: int, room: int) -> Interval:
        """Return the keys from ``low`` up to ``high`` with their global indices, and the number of those below."""
        raise AssertionError("only a source that gives a sample is split")


@dataclass(frozen=True)
class Cut:
    """Where the selection ends: smaller keys go, and of the equal ones those of a smaller global index."""

    key: int
    index: int

    @property
    def highest(self) -> int:
        """The largest key that may be selected."""
        return self.key if self.index else self.key - 1

    def bounds(self, first_index: int, length: int) -> Iterator[tuple[slice, int]]:
        """Yield parts of ``length`` consecutive elements, with the key below which those of the part are selected."""
        ties = max(0, min(self.index - first_index, length))
        if ties:
            yield slice(0, ties), self.key + 1
        if ties < length:
            yield slice(ties, length), self.key

    def selects(self, keys: Tensor, first_index: int) -> Tensor:
        """Return which of consecutive elements are selected, bool of shape [n].

        Args:
            keys: integers, shape [n].
            first_index: global index of ``keys[0]``.
        """
        parts = [keys[part] < bound for part, bound in self.bounds(first_index, keys.numel())]
        return torch.cat(parts) if parts else torch.zeros_like(keys, dtype=torch.bool)


def select_smallest(source: Source, k: int) -> Exchange[Cut]:
    """Find the cut that selects exactly the k smallest of all ranks' keys, ties by global index.

    Args:
        source: this rank's keys.
        k: how many to select, 0 <= k <= number of keys over all ranks.
    """
    if k == 0:
        return Cut(0, 0)
    cut = yield from _select_in_sampled_interval(source, k)
    if cut is not None:
        return cut
    key, rank, equal = yield from _find(lambda: (keys for keys, _ in source.chunks()), k, 0, source.bits, _KEY_DIGIT)

    def every() -> Keyed:
        for keys, first in source.chunks():
            yield keys, torch.arange(first, first + keys.numel(), device=keys.device)

    return (yield from _cut_ties(every, key, rank, equal, source.index_end))


def _select_in_sampled_interval(source: Source, k: int) -> Exchange[Cut | None]:
    """Select as `select_smallest` does; return None where there is no sample, or the interval missed."""
    if source.total < _SAMPLED_FROM:
        return None
    every = source.total // _sample_size(source.total)
    sample = source.sample(every)
    if sample is None:
        return None
    held = list(sample) if source.total // every <= _SAMPLE_HELD else None
    low, high = yield from _interval(lambda: held or source.sample(every) or (), k / source.total, source.bits)
    del held, sample
    inside = source.split(low, high, min(_INSIDE_AT_MOST, source.total // 8))
    counts = torch.tensor([inside.below, inside.held, inside.overfull])
    below, held, overfull = (yield Request(counts)).tolist()
    if overfull or not below < k <= below + held:
        return None
    bits = (high - low - 1).bit_length()
    key, rank, equal = yield from _find(lambda: [inside.keys], k - below, low, bits, _KEY_DIGIT)

    def entries() -> Keyed:
        return zip(inside.keys.split(_PIECE), inside.indices.split(_PIECE), strict=True)  # type: ignore[no-untyped-call]

    return (yield from _cut_ties(entries, key, rank, equal, source.index_end))


def _sample_size(total: int) -> int:
    """Return how many keys to sample: what the sample costs grows with it, what the interval holds shrinks.

    The interval holds about _DEVIATIONS * total / sqrt(size) keys, which must stay clear of the room there is.
    """
    cheapest = round(4 * total ** (2 / 3))
    return int(min(total // 16, max(cheapest, ceil(_DEVIATIONS * total / (0.7 * _INSIDE_AT_MOST)) ** 2)))


def _interval(sample: Callable[[], Iterable[Tensor]], share: float, bits: int) -> Exchange[tuple[int, int]]:
    """Return bounds that very likely have the quantile ``share`` of all keys between them."""
    coarse, fine = bits - _SAMPLE_DIGIT, bits - 2 * _SAMPLE_DIGIT
    counts = yield Request(_count(sample(), [0], coarse, _SAMPLE_DIGIT)[0])
    size = int(counts.sum())
    if size == 0:  # no slice is as long as a run of the sample
        return 2, 1 << bits
    slack = _DEVIATIONS * sqrt(size * share * (1 - share)) + _DEVIATIONS
    ranks = max(1, floor(size * share - slack)), min(size, ceil(size * share + slack))
    ends = [_digit(counts, rank) for rank in ranks]
    starts = [digit << coarse for digit, _, _ in ends]
    finer = yield Request(_count(sample(), starts, fine, _SAMPLE_DIGIT))
    digits = [_digit(row, rank)[0] for row, (_, rank, _) in zip(finer, ends, strict=True)]
    low = 0 if size * share <= slack else starts[0] + (digits[0] << fine)
    high = 1 << bits if size * share + slack >= size else starts[1] + ((digits[1] + 1) << fine)
    # The keys of what was pruned before are not told from zero's in a sample: an interval begins above them.
    return max(low, 2), max(high, 3)


def _cut_ties(entries: Callable[[], Keyed], key: int, rank: int, equal: int, index_end: int) -> Exchange[Cut]:
    """Return the cut after the ``rank``-th, from 1, of the ``equal`` elements of this key."""
    if rank == equal:
        return Cut(key + 1, 0)

    def tied() -> Iterator[Tensor]:
        for keys, indices in entries():
            yield indices[keys == key]

    held = list(tied()) if equal <= _INSIDE_AT_MOST // 4 else None
    values = tied if held is None else lambda: iter(held)
    index, _, _ = yield from _find(values, rank, 0, index_end.bit_length(), _INDEX_DIGIT)
    return Cut(key, index + 1)


def _find(
    values: Callable[[], Iterable[Tensor]], k: int, low: int, bits: int, digit_bits: int
) -> Exchange[tuple[int, int, int]]:
    """Return the k-th smallest of the values in [low, low + 2**bits), k's rank among its equals, and their number."""
    equal = k
    while bits > 0:
        width = min(digit_bits, bits)
        bits -= width
        counts = yield Request(_count(values(), [low], bits, width)[0])
        digit, k, equal = _digit(counts, k)
        low += digit << bits
    return low, k, equal


def _count(values: Iterable[Tensor], lows: list[int], shift: int, width: int) -> Tensor:
    """Return histograms of this rank's values, from each of several values on; int64, shape [len(lows), 2**width]."""
    counts = torch.zeros(len(lows), 1 << width, dtype=torch.int64)
    for keys in values:
        counts += torch.stack([histogram(keys, low, shift, 1 << width) for low in lows]).to(counts.device)
    return counts


def _digit(counts: Tensor, k: int) -> tuple[int, int, int]:
    """Return the bin of the k-th smallest, k's rank within it, and how many it holds."""
    running = counts.cumsum(0)
    digit = int(torch.searchsorted(running, k).item())
    assert digit < counts.numel(), f"k={k} is more than there are elements"
    equal = int(counts[digit])
    return digit, k - int(running[digit]) + equal, equal
