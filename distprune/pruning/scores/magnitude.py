"""Scores of the weights alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, Request
from distprune.pruning.fixed import exponent_for, to_fixed
from distprune.pruning.keys import key_magnitude, magnitude_keys
from distprune.pruning.masks import MAGNITUDE
from distprune.pruning.scores.base import PositiveScore
from distprune.pruning.slices import Part, Slice


class Magnitude(PositiveScore):
    """|w|, the paper's score."""

    samples = True

    def scores(self, part: Part) -> Tensor:  # noqa: D102 - as in the base class
        return part.weights.abs()

    def keys(self, part: Part) -> Tensor:  # noqa: D102
        return magnitude_keys(part.weights)


class NormalizedMagnitude(PositiveScore):
    """|w| over the root mean square of its matrix, so that a matrix of small weights is not pruned away."""

    samples = True

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self._norms: dict[str, float] = {}

    def prepare(self, slices: Sequence[Slice], sizes: dict[str, int]) -> Exchange[None]:  # noqa: D102
        place = {name: index for index, name in enumerate(sizes)}
        largest = torch.zeros(len(place), dtype=torch.int64)
        for part in (part for each in slices for part in each.owned()):
            largest[place[part.name]] = max(
                int(largest[place[part.name]]), int((magnitude_keys(part.weights) & MAGNITUDE).max())
            )
        magnitudes = [key_magnitude(key) for key in (yield Request(largest, "max")).tolist()]
        exponents = {
            name: exponent_for(magnitude**2, size) if math.isfinite(magnitude) else 0
            for (name, size), magnitude in zip(sizes.items(), magnitudes, strict=True)
        }
        sums = torch.zeros(len(place), dtype=torch.int64)
        for part in (part for each in slices for part in each.owned()):
            squares = part.weights.double().square()
            sums[place[part.name]] += to_fixed(squares, exponents[part.name]).sum().cpu()
        totals = (yield Request(sums)).tolist()
        self._norms = {
            name: math.sqrt(math.ldexp(total, -exponents[name]) / size) if math.isfinite(magnitude) else math.inf
            for (name, size), magnitude, total in zip(sizes.items(), magnitudes, totals, strict=True)
        }

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        # A tensor divides; a number's reciprocal might be multiplied by, which rounds differently on some devices.
        return part.weights.abs() / torch.tensor(self._norms[part.name] or 1.0, device=part.weights.device)
