"""A score of the loss to second order, which moves the weights that stay."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distprune.config import FisherConfig
from distprune.pruning.exchange import Exchange
from distprune.pruning.masks import PRUNED
from distprune.pruning.scores.base import PositiveScore
from distprune.pruning.scores.fisher import InverseFisher
from distprune.pruning.slices import Part, Slice


class OptimalBrainSurgeon(PositiveScore):
    """w^2 / (2 [F^-1]_ww), what the loss rises by to second order where the others make up for it (arXiv 2203.07259).

    F is the empirical Fisher matrix in blocks (`InverseFisher`), estimated anew before each pruning from gradients of
    the task's loss. What stays then makes up for what goes, each weight of it by itself. Blocks of one
    weight are the diagonal, which makes up for nothing.
    """

    learns = True

    def __init__(
        self, seed: int = 0, fisher: FisherConfig | None = None, cuts: Mapping[str, Sequence[int]] | None = None
    ):
        """Take what the Fisher matrix is estimated from, and where parameters are cut between ranks."""
        super().__init__(seed)
        self.config, self.cuts = fisher or FisherConfig(), cuts or {}
        self._fisher: InverseFisher | None = None
        self._diagonals: dict[str, tuple[int, Tensor]] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of each weight around a pruning: its row of its block, both diagonals, and what goes."""
        return 4 * (self.config.block + 3)

    def learn(self, slices: Sequence[Slice], gradients: Sequence[Tensor | None]) -> Exchange[None]:  # noqa: D102 - as in the base class
        if self._fisher is None:
            config = self.config
            self._fisher = InverseFisher(slices, self.cuts, config.block, config.samples, config.damping)
        yield from self._fisher.add(gradients)

    def prepare(self, slices: Sequence[Slice], sizes: dict[str, int]) -> Exchange[None]:  # noqa: D102
        yield from ()
        assert self._fisher is not None, "no gradient was taken before the pruning"
        self._diagonals = {
            each.name: (each.first_index + each.start, diagonal)
            for each, diagonal in zip(slices, self._fisher.diagonals(), strict=True)
        }

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        return part.weights.square() / (2 * self._inverse(part))

    def compensate(self, slices: Sequence[Slice]) -> Exchange[None]:  # noqa: D102
        assert self._fisher is not None
        gone = [torch.where(each.mask == PRUNED, each.weights() / self._diagonals[each.name][1], 0) for each in slices]
        for each, moved in zip(slices, (yield from self._fisher.times(gone)), strict=True):
            weights = each.weights()
            weights -= moved
        self._fisher, self._diagonals = None, {}

    def _inverse(self, part: Part) -> Tensor:
        first, diagonal = self._diagonals[part.name]
        return diagonal[part.first_index - first :][: part.weights.numel()]
