"""N:M sparsity: of each M consecutive weights of a row, the input dimension, N are kept (arXiv 2104.08378).

At a sparsity short of (M - N) / M a part of the groups is converted, those first that lose the least: the sum of their
M - N smallest scores. A group that a shard boundary cuts is known to the ranks on both sides of it: its M keys and
scores are exchanged, 16 * M bytes for each cut group.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.exchange import Exchange
from distprune.pruning.keys import chunk_of, ranked
from distprune.pruning.scores import Score
from distprune.pruning.select import select_smallest
from distprune.pruning.slices import Slice
from distprune.pruning.structures.base import Choice, Structure
from distprune.pruning.structures.shared import (
    Units,
    combine,
    common_exponent,
    fixed_scores,
    key_value,
    locate,
    unit_keys,
)

WRITTEN = Fraction(1, 1_000_000)
"""What a decimal may be off (M - N) / M, which may have no end, and stand for it."""
_PAIRS = 1 << 20
"""Comparisons within groups that are held at a time on a CPU."""


class Groups(NamedTuple):
    """Consecutive groups of a slice; positions that it does not hold are 0."""

    first: int
    """Number of the first group, over all parameters."""
    keys: Tensor
    """Shape [n, M], int64: 0 of a pruned weight."""
    scores: Tensor
    """Shape [n, M], int64, in fixed point."""
    nans: int
    """How many of the scores are NaN."""


class NOfM(Structure):
    """N weights kept of each M along the input dimension."""

    def __init__(self, kept: int, of: int, shapes: dict[str, tuple[int, ...]], cuts: dict[str, list[int]]):
        """Lay the groups out.

        Args:
            kept: N.
            of: M.
            shapes: of the parameters to prune, in the order of global indices.
            cuts: where in each flattened parameter a rank's slice begins or ends.

        Raises:
            UserError: where M does not divide the rows of a parameter.
        """
        self.kept, self.of = kept, of
        shared, first = [], 0
        for name, shape in shapes.items():
            if shape[-1] % of:
                raise UserError(f"{name} has shape {list(shape)}; {kept}:{of} needs rows that {of} divides")
            shared += [(first + cut) // of for cut in cuts[name] if cut % of]
            first += torch.Size(shape).numel()
        self.shared = torch.tensor(sorted(set(shared)), dtype=torch.int64)
        self.total = first

    def masked_at(self, sparsity: Fraction) -> int:  # noqa: D102 - as in the base class
        if sparsity >= Fraction(self.of - self.kept, self.of) - WRITTEN:
            return self.total // self.of * (self.of - self.kept)
        return floor(sparsity * self.total / (self.of - self.kept)) * (self.of - self.kept)

    def choose(  # noqa: D102
        self, slices: Sequence[Slice], score: Score, sparsity: Fraction, masked: dict[str, int]
    ) -> Exchange[Choice]:
        exponent = yield from common_exponent(slices, score, self.of)
        ends = (groups for each in slices for groups in self._ends(each, score, exponent))
        statistics = ((torch.tensor([g.first]), torch.cat([g.keys, g.scores], dim=1)) for g in ends)
        complete = yield from combine(self.shared, statistics, 2 * self.of)
        owned = [
            self._owned(each, groups)
            for each in slices
            for groups in self._groups(each, score, exponent, complete, each.own_start, each.own_end)
        ]
        units = Units(owned, self.total // self.of)
        already = yield from units.count_pruned()
        cut = yield from select_smallest(units, max(self.masked_at(sparsity) // (self.of - self.kept), already))

        def mark(each: Slice) -> int:
            nans = 0
            for groups in self._groups(each, score, exponent, complete, each.start, each.end):
                nans += groups.nans
                goes = cut.selects(self._keys(groups), groups.first)[:, None] & self._smallest(groups.keys)
                first = groups.first * self.of - each.first_index - each.start
                inside = slice(max(0, -first), min(goes.numel(), each.end - each.start - first))
                mask = each.mask[first + inside.start : first + inside.stop]
                mask &= goes.flatten()[inside].to(torch.int8) - 1
            return nans

        return Choice(key_value(cut.highest, exponent), mark)

    def _smallest(self, keys: Tensor) -> Tensor:
        """Return which M - N of each group go first, ties by position; bool, shape [n, M]."""
        first, second = keys[:, :, None], keys[:, None, :]
        earlier = torch.ones(self.of, self.of, dtype=torch.bool, device=keys.device).tril(-1)
        before = (second < first) | ((second == first) & earlier)
        return before.sum(2) < self.of - self.kept

    def _keys(self, groups: Groups) -> Tensor:
        """Return the order in which groups are converted, 0 where that is done; shape [n]."""
        lost = torch.where(self._smallest(groups.keys), groups.scores, 0).sum(1)
        return unit_keys(lost, (groups.keys == 0).sum(1) >= self.of - self.kept)

    def _owned(self, each: Slice, groups: Groups) -> tuple[Tensor, int]:
        """Return the keys of those groups whose first weight this rank counts, and the number of the first."""
        begin, end = (-(-(each.first_index + place) // self.of) for place in (each.own_start, each.own_end))
        inside = slice(max(0, begin - groups.first), max(0, end - groups.first))
        return self._keys(groups)[inside], groups.first + inside.start

    def _ends(self, each: Slice, score: Score, exponent: int) -> Iterator[Groups]:
        """Yield the groups that the slice holds only a part of."""
        for number in {each.start // self.of, (each.end - 1) // self.of}:
            start, end = max(each.start, number * self.of), min(each.end, (number + 1) * self.of)
            if 0 < end - start < self.of:
                yield self._read(each, score, exponent, start, end)

    def _groups(
        self, each: Slice, score: Score, exponent: int, complete: Tensor, start: int, end: int
    ) -> Iterator[Groups]:
        """Yield all groups of a part of the slice, the cut ones as put together."""
        pairs = max(_PAIRS, chunk_of(each.mask.device))
        size = max(1, pairs // self.of**2) * self.of
        for first in range(start // self.of * self.of, end, size):
            groups = self._read(each, score, exponent, max(each.start, first), min(each.end, first + size))
            numbers = torch.arange(groups.first, groups.first + len(groups.keys))
            places, found = locate(self.shared, numbers)
            whole = complete[places].to(groups.keys.device)
            groups.keys[found], groups.scores[found] = whole[:, : self.of], whole[:, self.of :]
            yield groups

    def _read(self, each: Slice, score: Score, exponent: int, start: int, end: int) -> Groups:
        """Return the groups that the elements ``[start, end)`` of the parameter belong to."""
        (part,) = each.parts(start, end, end - start)
        scores = score.checked(part)
        before, after = start % self.of, -end % self.of

        def rows(values: Tensor) -> Tensor:
            return torch.nn.functional.pad(values.long(), (before, after)).view(-1, self.of)

        return Groups(
            (each.first_index + start) // self.of,
            rows(ranked(score.keys(part), part.mask)),
            rows(fixed_scores(scores, part.mask, exponent)),
            int(scores.isnan().sum()),
        )
