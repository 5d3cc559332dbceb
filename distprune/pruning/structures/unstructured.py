"""Single weights, each for itself."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, together
from distprune.pruning.keys import BLOCK, Interval, ranked
from distprune.pruning.masks import MAGNITUDE, prune_below
from distprune.pruning.scores import Score
from distprune.pruning.select import Cut, Source, select_smallest
from distprune.pruning.slices import Part, Slice
from distprune.pruning.structures.base import Choice, Structure

_RUN = 64
"""Consecutive weights of a sample: four cache lines of fp32."""


class Unstructured(Structure):
    """Single weights. Each group of parameters has the sparsity by itself; one group of them all is global pruning."""

    def __init__(self, groups: Sequence[dict[str, int]]):
        """Take the sizes of the parameters by name, group by group."""
        self.groups = groups

    def masked_at(self, sparsity: Fraction) -> int:  # noqa: D102 - as in the base class
        return sum(floor(sparsity * sum(group.values())) for group in self.groups)

    def choose(  # noqa: D102
        self, slices: Sequence[Slice], score: Score, sparsity: Fraction, masked: dict[str, int]
    ) -> Exchange[Choice]:
        sizes = [sum(group.values()) for group in self.groups]
        wanted = [
            max(floor(sparsity * size), sum(masked[name] for name in group))
            for group, size in zip(self.groups, sizes, strict=True)
        ]
        sources = [
            Elements([each for each in slices if each.name in group], score, size, sum(sizes))
            for group, size in zip(self.groups, sizes, strict=True)
        ]
        cuts = yield from together([select_smallest(*each) for each in zip(sources, wanted, strict=True)])
        cut_of = {name: cut for group, cut in zip(self.groups, cuts, strict=True) for name in group}
        highest = max(cut.highest for cut in cuts) - 1
        threshold = score.value(highest) if highest >= 0 else 0.0
        return Choice(threshold, lambda each: mark_elements(each, score, cut_of[each.name]))


class Elements(Source):
    """Weights by themselves: the key of one pruned before is 0, of others 1 more than the score's."""

    def __init__(self, slices: Sequence[Slice], score: Score, total: int, index_end: int):
        self.slices, self.score, self.total, self.index_end = slices, score, total, index_end
        self.bits = score.bits

    def chunks(self) -> Iterator[tuple[Tensor, int]]:  # noqa: D102 - as in the base class
        for part in self._owned():
            yield ranked(self.score.keys(part), part.mask), part.first_index

    def sample(self, every: int) -> Iterator[Tensor] | None:  # noqa: D102
        return self._runs(every) if self.score.samples else None

    def split(self, low: int, high: int, room: int) -> Interval:  # noqa: D102
        device = self.slices[0].mask.device if self.slices else torch.device("cpu")
        owned = sum(each.own_end - each.own_start for each in self.slices)
        interval = Interval(low - 1, high - 1, min(room, owned + BLOCK), device)
        for part in self._owned():
            interval.add(self.score.keys(part), part.first_index)
        interval.keys.add_(1)
        return interval

    def _owned(self) -> Iterator[Part]:
        return (part for each in self.slices for part in each.owned())

    def _runs(self, every: int) -> Iterator[Tensor]:
        """Yield the keys of one run of weights in ``every``, evenly spaced over this rank's."""
        seen = 0
        for each in self.slices:
            for part in each.owned(size=max(1, each.own_end - each.own_start)):
                runs = part.weights[: part.weights.numel() // _RUN * _RUN].view(-1, _RUN)
                chosen = runs[-seen % every :: every].reshape(-1)
                seen += len(runs)
                if chosen.numel():
                    yield (self.score.keys(part._replace(weights=chosen)) & MAGNITUDE).add_(1)


def mark_elements(each: Slice, score: Score, cut: Cut) -> int:
    """Mark a slice's weights that a cut selects; return how many scores are NaN."""
    nans = 0
    for part in each.held():
        keys = score.keys(part)
        for piece, bound in cut.bounds(part.first_index, keys.numel()):
            nans += prune_below(part.mask[piece], keys[piece], bound - 1, score.highest)
    return nans
