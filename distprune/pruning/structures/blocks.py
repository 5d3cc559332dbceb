"""Units that are blocks of matrices: tiles of one matrix, or the rows and columns that make up a head or a neuron.

What decides is the sum of a unit's scores, in fixed point. Every parameter is laid out as a grid of blocks, and each
block is, or is a part of, a unit. Units that a shard boundary cuts, and those that lie in several parameters, are put
together over the ranks: 16 bytes for each of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.exchange import Exchange
from distprune.pruning.keys import chunk_of
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


@dataclass(frozen=True)
class Grid:
    """A matrix cut into blocks, numbered row by row of blocks, each belonging to the unit ``first_unit`` + number."""

    shape: tuple[int, int]
    block: tuple[int, int]
    first_unit: int
    leads: bool = True
    """Whether its units are counted where their first weight in it is; False for the other matrices of a unit."""

    @property
    def per_row(self) -> int:
        """Blocks side by side."""
        return self.shape[1] // self.block[1]

    @property
    def row_size(self) -> int:
        """Weights in a row of blocks."""
        return self.shape[1] * self.block[0]

    @property
    def count(self) -> int:
        """Blocks in the matrix."""
        return self.shape[0] // self.block[0] * self.per_row

    def begun_before(self, offset: int) -> int:
        """Return how many blocks have their first weight before an offset in the flattened matrix."""
        rows, rest = divmod(offset, self.row_size)
        return rows * self.per_row + min(self.per_row, -(-rest // self.block[1]))

    def rows_of(self, start: int, end: int) -> range:
        """Return the rows of blocks that the elements ``[start, end)`` lie in."""
        return range(start // self.row_size, -(-end // self.row_size))

    def units_of(self, start: int, end: int) -> range:
        """Return the units of those rows."""
        rows = self.rows_of(start, end)
        return range(self.first_unit + rows.start * self.per_row, self.first_unit + rows.stop * self.per_row)

    def cut_at(self, offset: int) -> Tensor:
        """Return the units with weights on both sides of an offset in the flattened matrix."""
        row = offset // self.row_size
        first = torch.arange(self.per_row) * self.block[1] + row * self.row_size
        last = first + (self.block[0] - 1) * self.shape[1] + self.block[1] - 1
        return ((first < offset) & (offset <= last)).nonzero().view(-1) + self.first_unit + row * self.per_row


def tiles(block: tuple[int, int], shapes: dict[str, tuple[int, ...]]) -> dict[str, Grid]:
    """Return grids of tiles of this shape, numbered through all parameters.

    Raises:
        UserError: where a parameter is no matrix that the shape divides.
    """
    grids: dict[str, Grid] = {}
    first = 0
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] % block[0] or shape[1] % block[1]:
            raise UserError(
                f"{name} has shape {list(shape)}; blocks of {block[0]}x{block[1]} need a matrix whose rows {block[0]} "
                f"divides, and whose columns {block[1]}"
            )
        grids[name] = Grid((shape[0], shape[1]), block, first)
        first += grids[name].count
    return grids


class Blocks(Structure):
    """Units of equal size, by the sums of their scores, global over all of them."""

    def __init__(self, grids: dict[str, Grid], cuts: dict[str, list[int]]):
        """Lay the units out.

        Args:
            grids: of the parameters to prune, by name.
            cuts: where in each flattened parameter a rank's slice begins or ends.

        Raises:
            UserError: where units are not all of one size.
        """
        self.grids = grids
        self.units = sum(grid.count for grid in grids.values() if grid.leads)
        sizes = {name: _unit_size(grids, grid) for name, grid in grids.items()}
        self.unit_size, *others = set(sizes.values())
        if others:
            raise UserError(
                f"heads or neurons differ in their number of weights: {sizes}; allowed: pruning.include of some"
            )
        spread = [name for name in grids if sum(g.first_unit == grids[name].first_unit for g in grids.values()) > 1]
        shared = [torch.arange(grids[name].count) + grids[name].first_unit for name in spread]
        shared += [grids[name].cut_at(cut) for name in grids if name not in spread for cut in cuts[name]]
        self.shared = torch.cat([torch.empty(0, dtype=torch.int64), *shared]).unique()  # type: ignore[no-untyped-call]

    def masked_at(self, sparsity: Fraction) -> int:  # noqa: D102 - as in the base class
        return floor(sparsity * self.units) * self.unit_size

    def choose(  # noqa: D102
        self, slices: Sequence[Slice], score: Score, sparsity: Fraction, masked: dict[str, int]
    ) -> Exchange[Choice]:
        exponent = yield from common_exponent(slices, score, self.unit_size)
        statistics = {each.name: self._statistics(each, score, exponent, each.start, each.end) for each in slices}
        numbers = {each.name: torch.arange(*_bounds(self._range(each))) for each in slices}

        def counted(each: Slice) -> Tensor:
            """Return the statistics of what this rank counts: at stage 0 every rank holds all."""
            if not len(self.shared) or (each.own_start, each.own_end) == (each.start, each.end):
                return statistics[each.name][0]
            return self._statistics(each, score, exponent, each.own_start, each.own_end)[0]

        parts = [(numbers[each.name], counted(each)) for each in slices]
        complete = yield from combine(self.shared, parts, 2)
        keys: dict[str, Tensor] = {}
        for each in slices:
            values, _ = statistics[each.name]
            places, found = locate(self.shared, numbers[each.name])
            values[found] = complete[places].to(values.device)
            keys[each.name] = unit_keys(values[:, 0], values[:, 1] == 0)
        units = Units([owned for each in slices for owned in self._owned(each, keys[each.name])], self.units)
        already = yield from units.count_pruned()
        cut = yield from select_smallest(units, max(floor(sparsity * self.units), already))

        def mark(each: Slice) -> int:
            self._mark(each, cut.selects(keys[each.name], self._range(each).start))
            return statistics[each.name][1]

        return Choice(key_value(cut.highest, exponent), mark)

    def _range(self, each: Slice) -> range:
        return self.grids[each.name].units_of(each.start, each.end)

    def _owned(self, each: Slice, keys: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield the keys of those units that this rank counts, and the number of the first."""
        grid = self.grids[each.name]
        if grid.leads:
            begin, end = (grid.first_unit + grid.begun_before(place) for place in (each.own_start, each.own_end))
            start = self._range(each).start
            yield keys[begin - start : end - start], begin

    def _statistics(self, each: Slice, score: Score, exponent: int, start: int, end: int) -> tuple[Tensor, int]:
        """Return sums of scores and numbers of kept weights, int64 of shape [units, 2], and how many scores are NaN.

        Of the elements ``[start, end)``; the units are all those of the slice.
        """
        grid = self.grids[each.name]
        rows, columns = grid.rows_of(each.start, each.end), grid.shape[1]
        device = each.mask.device
        sums = torch.zeros(len(rows), grid.per_row, 2, dtype=torch.int64, device=device)
        nans = 0
        for first, begin, stop in _whole_rows(start, end, columns, device):
            (part,) = each.parts(begin, stop, stop - begin)
            scores = score.checked(part)
            nans += int(scores.isnan().sum())
            values = torch.stack([fixed_scores(scores, part.mask, exponent), -part.mask.long()])
            padded = torch.nn.functional.pad(values, (begin - first * columns, -stop % columns))
            by_row = padded.view(2, -1, grid.per_row, grid.block[1]).sum(3).permute(1, 2, 0)
            place = torch.arange(first, first + len(by_row), device=device) // grid.block[0] - rows.start
            sums.index_add_(0, place, by_row)
        return sums.view(-1, 2), nans

    def _mark(self, each: Slice, goes: Tensor) -> None:
        """Mark a slice's weights in the units that go, bool of shape [units of the slice]."""
        grid = self.grids[each.name]
        rows, columns = grid.rows_of(each.start, each.end), grid.shape[1]
        goes = goes.view(len(rows), grid.per_row)
        for first, start, end in _whole_rows(each.start, each.end, columns, each.mask.device):
            place = torch.arange(first, -(-end // columns), device=goes.device) // grid.block[0] - rows.start
            marked = goes[place].repeat_interleave(grid.block[1], dim=1).flatten()
            mask = each.mask[start - each.start : end - each.start]
            mask &= marked[start - first * columns :][: end - start].to(torch.int8) - 1


def _unit_size(grids: dict[str, Grid], grid: Grid) -> int:
    """Return the weights of a unit in all matrices that it lies in."""
    return sum(each.block[0] * each.block[1] for each in grids.values() if each.first_unit == grid.first_unit)


def _bounds(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


def _whole_rows(start: int, end: int, columns: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """Yield the elements ``[start, end)`` of a matrix in pieces of whole rows: the first row, and the bounds."""
    rows = max(1, chunk_of(device) // columns)
    for first in range(start // columns, -(-end // columns) if start < end else 0, rows):
        yield first, max(start, first * columns), min(end, (first + rows) * columns)
