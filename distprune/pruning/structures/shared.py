"""Statistics of units that several slices hold parts of, put together over all ranks."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, Request
from distprune.pruning.fixed import exponent_for, to_fixed
from distprune.pruning.keys import magnitude_keys
from distprune.pruning.masks import MAGNITUDE
from distprune.pruning.scores import Score
from distprune.pruning.select import Source
from distprune.pruning.slices import Slice

LARGEST = torch.finfo(torch.float32).max
_BITS = 60


class Units(Source):
    """Units that this rank counts, by keys that were computed before; key 0 is that of a unit pruned before."""

    bits = _BITS + 2

    def __init__(self, keys: Sequence[tuple[Tensor, int]], count: int):
        """Take keys, int64, with the number of the first unit of each; and how many units there are on all ranks."""
        self.keys, self.total, self.index_end = keys, count, count

    def chunks(self) -> Iterator[tuple[Tensor, int]]:  # noqa: D102 - as in the base class
        yield from self.keys

    def count_pruned(self) -> Exchange[int]:
        """Return how many units are pruned, over all ranks."""
        pruned = sum(int((keys == 0).sum()) for keys, _ in self.keys)
        return int((yield Request(torch.tensor([pruned]))))


def unit_keys(sums: Tensor, pruned: Tensor) -> Tensor:
    """Return keys of units, int64: 0 where pruned, else the order of the sums, which are less than 2**60 either way."""
    return torch.where(pruned, 0, sums + (1 << _BITS) + 1)


def key_value(key: int, exponent: int) -> float:
    """Return the sum of scores that has this key; 0 where no more is pruned than before."""
    return float(key - 1 - (1 << _BITS)) * 2.0**-exponent if key > 0 else 0.0


def common_exponent(slices: Sequence[Slice], score: Score, terms: int) -> Exchange[int]:
    """Return e such that sums of so many of this score's values, in fixed point with 2**e, stay below 2**60."""
    largest = 0
    for part in (part for each in slices for part in each.owned()):
        scores = finite(score.checked(part))
        largest = max(largest, int((magnitude_keys(scores) & MAGNITUDE).max()))
    (largest,) = (yield Request(torch.tensor([largest]), "max")).tolist()
    return exponent_for(float(torch.tensor(largest, dtype=torch.int32).view(torch.float32)), terms, _BITS)


def finite(scores: Tensor) -> Tensor:
    """Return scores with infinities as the largest finite numbers, and 0 for NaN, which is refused elsewhere."""
    return scores.nan_to_num(nan=0.0, posinf=LARGEST, neginf=-LARGEST)


def fixed_scores(scores: Tensor, mask: Tensor, exponent: int) -> Tensor:
    """Return scores in fixed point, int64, 0 where the weight is pruned."""
    return to_fixed(finite(scores), exponent).bitwise_and_(mask)


def combine(shared: Tensor, contributions: Iterable[tuple[Tensor, Tensor]], width: int) -> Exchange[Tensor]:
    """Add up the parts of shared units' statistics.

    Args:
        shared: numbers of these units, in order, the same on every rank; shape [s].
        contributions: of this rank: numbers of units (shape [n]) and statistics (int64, shape [n, width]); those of
            units that are not shared are passed over.
        width: numbers in a statistic.

    Returns:
        int64, shape [s, width]. This rank hands over 8 * s * width bytes, nothing where no unit is shared.
    """
    sums = torch.zeros(len(shared), width, dtype=torch.int64)
    if len(shared) == 0:
        return sums
    for numbers, values in contributions:
        places, found = locate(shared, numbers.cpu())
        sums.index_add_(0, places, values.cpu()[found])
    return (yield Request(sums))


def locate(shared: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places in ``shared`` of those numbers that are in it, and which they are, bool of shape [n]."""
    places = torch.searchsorted(shared, numbers)
    found = places < len(shared)
    found[found.clone()] = shared[places[found]] == numbers[found]
    return places[found], found
