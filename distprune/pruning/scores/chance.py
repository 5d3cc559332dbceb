"""A score that knows nothing of a weight but its place."""

import torch
from torch import Tensor

from distprune.pruning.keys import HIGHEST_MAGNITUDE, MAGNITUDE_BITS
from distprune.pruning.scores.base import Score
from distprune.pruning.slices import Part


class Random(Score):
    """A hash of the seed and the weight's global index: what pruning without a criterion is worth."""

    reads_weights = False
    bits = MAGNITUDE_BITS
    highest = HIGHEST_MAGNITUDE

    def keys(self, part: Part) -> Tensor:  # noqa: D102 - as in the base class
        numbers = torch.arange(part.weights.numel(), device=part.weights.device) + part.first_index
        step = (self.seed + 1) * 0x9E3779B97F4A7C15  # SplitMix64's steps and mixing
        mixed = numbers + ((step + 2**63) % 2**64 - 2**63)
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            mixed = (mixed ^ _shifted(mixed, shift)) * factor
        return _shifted(mixed ^ _shifted(mixed, 31), 34).int()

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        return self.keys(part).float() / 2**30

    def value(self, key: int) -> float:  # noqa: D102
        return key / 2**30


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
