"""What a rank holds of the weights to prune, without a word of who holds it: an engine's shard, or a file's tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distprune.pruning.keys import chunk_of
from distprune.pruning.masks import KEPT, PRUNED, apply_mask


class Part(NamedTuple):
    """Consecutive weights of one parameter, and what a score may want to know of them."""

    name: str
    first_index: int
    """Global index of the first one: parameter order, then flat offset."""
    weights: Tensor
    """fp32, shape [n]."""
    gradient: Tensor | None
    """Averaged over the ranks, shape [n]; None where there is none."""
    state: Tensor | None
    """What the score has accumulated, fp32, shape [n]; None where it accumulates nothing."""
    mask: Tensor
    """int8, shape [n]."""
    removed: Tensor | None = None
    """What the pruned weights were when they went, fp32, shape [n]; None where none comes back.

    NaN where one stays pruned, a zero from before. 0 where a weight is kept; all weights while a pruning is under way.
    """

    @property
    def before_pruning(self) -> Tensor:
        """The weights, those that are pruned as they were when they went, fp32, shape [n]."""
        if self.removed is None:
            return self.weights
        return torch.where(self.mask == PRUNED, self.removed.nan_to_num(0.0), self.weights)


@dataclass(frozen=True)
class Slice:
    """The elements ``[start, end)`` of a flattened parameter, which this rank holds.

    ``own_start`` and ``own_end`` bound those that it counts: over all ranks, each element once. Weights and gradient
    are called for in every pass, so that they may come from a file. A mask's piece is written to in place.
    """

    name: str
    start: int
    end: int
    own_start: int
    own_end: int
    first_index: int
    """Global index of the parameter's first element."""
    mask: Tensor
    weights: Callable[[], Tensor]
    gradient: Callable[[], Tensor | None] = lambda: None
    state: Tensor | None = None
    removed: Tensor | None = None
    """As a part's."""

    def parts(self, start: int, end: int, size: int | None = None) -> Iterator[Part]:
        """Yield the elements ``[start, end)`` of the parameter, ``size`` at a time; None: as suits the device."""
        size = size or chunk_of(self.mask.device)
        weights, gradient = self.weights(), self.gradient()
        for first in range(start, end, size):
            piece = slice(first - self.start, min(first + size, end) - self.start)
            yield Part(
                self.name,
                self.first_index + first,
                weights[piece],
                None if gradient is None else gradient[piece],
                None if self.state is None else self.state[piece],
                self.mask[piece],
                None if self.removed is None else self.removed[piece],
            )

    def owned(self, size: int | None = None) -> Iterator[Part]:
        """Yield the elements that this rank counts."""
        return self.parts(self.own_start, self.own_end, size)

    def held(self) -> Iterator[Part]:
        """Yield the elements that this rank holds."""
        return self.parts(self.start, self.end)

    def bring_back(self) -> None:
        """Give the pruned weights the values that they had when they went; zeros from before stay pruned."""
        if self.removed is not None:
            stays = self.removed.isnan()
            self.weights().add_(self.removed.nan_to_num(0.0))
            self.mask.copy_(torch.where(stays, PRUNED, KEPT))
            self.removed.copy_(torch.where(stays, torch.nan, self.weights()))

    def forget_kept(self) -> None:
        """Remember, of the values from before a pruning, those of the weights that went."""
        if self.removed is not None:
            apply_mask(self.removed, ~self.mask)
