"""Regrowth: kept weights that are small change places with pruned ones whose gradients are large (RigL, 1911.11134).

As SMC-Bench does it: in each matrix by itself as many come back as go. What was pruned before begins at zero; what has
just gone may come back at once, and then has not changed. The numbers of masked weights stay what they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, together
from distprune.pruning.keys import HIGHEST_MAGNITUDE, magnitude_keys, ranked
from distprune.pruning.masks import KEPT, MAGNITUDE, PRUNED
from distprune.pruning.scores import Magnitude
from distprune.pruning.select import Cut, Source, select_smallest
from distprune.pruning.slices import Part, Slice
from distprune.pruning.structures.unstructured import Elements


def regrow(slices: Sequence[Slice], sizes: Mapping[str, int], masked: Mapping[str, int], part: float) -> Exchange[None]:
    """Mask ``ceil(part * kept)`` weights of each parameter, the smallest, and let as many come back.

    Args:
        slices: of this rank, with the gradients of the step as they are before they are masked.
        sizes: elements of every parameter, by name.
        masked: how many of them are pruned, over all ranks.
        part: of the kept weights of each, [0, 1].
    """
    total, score = sum(sizes.values()), Magnitude()
    held = {name: [each for each in slices if each.name == name] for name in sizes}
    smallest = {
        name: select_smallest(Elements(held[name], score, size, total), masked[name] + moving(size, masked[name], part))
        for name, size in sizes.items()
    }
    cuts = dict(zip(sizes, (yield from together(list(smallest.values()))), strict=True))
    for piece in (found for each in slices for found in each.held()):
        _mark(piece, cuts[piece.name], ranked(score.keys(piece), piece.mask))
    unwanted = {
        name: select_smallest(_Candidates(held[name], size, total), masked[name]) for name, size in sizes.items()
    }
    cuts = dict(zip(sizes, (yield from together(list(unwanted.values()))), strict=True))
    for piece in (found for each in slices for found in each.held()):
        _mark(piece, cuts[piece.name], _growth_keys(piece))


def _mark(part: Part, cut: Cut, keys: Tensor) -> None:
    """Mask what a cut selects, and nothing else."""
    part.mask.copy_(torch.where(cut.selects(keys, part.first_index), PRUNED, KEPT))


def moving(size: int, masked: int, part: float) -> int:
    """Return how many weights of a parameter change places."""
    return ceil(part * (size - masked))


class _Candidates(Source):
    """The pruned weights in the order of their gradients' size, with the kept ones behind them all."""

    bits = MAGNITUDE.bit_length()

    def __init__(self, slices: Sequence[Slice], total: int, index_end: int):
        self.slices, self.total, self.index_end = slices, total, index_end

    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        for each in self.slices:
            for part in each.owned():
                yield _growth_keys(part), part.first_index


def _growth_keys(part: Part) -> Tensor:
    gradient = torch.zeros_like(part.weights) if part.gradient is None else part.gradient.to(part.weights)
    keys = (magnitude_keys(gradient.contiguous()) & MAGNITUDE).clamp(max=HIGHEST_MAGNITUDE)
    return torch.where(part.mask == PRUNED, keys, MAGNITUDE)
