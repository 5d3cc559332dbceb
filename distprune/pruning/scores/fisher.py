"""The inverse empirical Fisher matrix in blocks, over weights that are cut between ranks (oBERT, arXiv 2203.07259).

``F = damping * I + 1/m * sum of g g^T`` over m gradients, cut to blocks of consecutive weights of a flattened
parameter; its last block may be shorter. A rank has every block of which it holds a weight, whole: of blocks that lie
on two ranks or more, each rank is told the missing elements of the gradients, and all come to the same inverse.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, Request
from distprune.pruning.slices import Slice


class InverseFisher:
    """This rank's blocks of the inverse, (block + 1) * 4 bytes for each weight that it holds."""

    def __init__(
        self, slices: Sequence[Slice], cuts: Mapping[str, Sequence[int]], block: int, samples: int, damping: float
    ):
        """Begin with no gradient seen: ``1 / damping`` times the identity.

        Args:
            slices: of this rank.
            cuts: where in each flattened parameter, of all, a rank's slice begins or ends.
            block: weights of a block.
            samples: m, the gradients that will come.
            damping: lambda, > 0.
        """
        self.slices, self.block, self.samples = slices, block, samples
        self.inverses = [
            (torch.eye(block, device=each.mask.device) / damping).repeat(
                ceil(each.end / block) - self._first(each), 1, 1
            )
            for each in slices
        ]
        self._diagonal = [torch.full((each.end - each.start,), damping, device=each.mask.device) for each in slices]
        """Of F itself, for each slice."""
        cut = sorted({(name, at // block) for name, places in cuts.items() for at in places if at % block})
        self._row = {key: row for row, key in enumerate(cut)}
        """Of each block that lies on several ranks, its place in what is exchanged."""

    def add(self, gradients: Sequence[Tensor | None]) -> Exchange[None]:
        """Take one more gradient into account, by the Woodbury identity.

        Args:
            gradients: of each slice, shape [n], 0 where a weight is pruned; None where there is none.
        """
        filled = [
            each.mask.new_zeros(each.end - each.start, dtype=torch.float32) if gradient is None else gradient.float()
            for each, gradient in zip(self.slices, gradients, strict=True)
        ]
        for diagonal, gradient in zip(self._diagonal, filled, strict=True):
            diagonal.addcmul_(gradient, gradient, value=1 / self.samples)
        for inverse, gradient in zip(self.inverses, (yield from self._in_blocks(filled)), strict=True):
            # The inverse is symmetric, and on a CPU torch multiplies faster from the left.
            product = torch.bmm(gradient.unsqueeze(1), inverse).squeeze(1)
            scale = self.samples + (gradient * product).sum(1, keepdim=True)
            inverse.addcmul_(product.unsqueeze(2), (product / scale).unsqueeze(1), value=-1)

    def diagonals(self) -> list[Tensor]:
        """Return the inverse's diagonal for each slice, shape [n], > 0.

        It is at least 1 over that of F, where rounding has gone below: it begins at 1 / damping, and where gradients
        are large the sum cancels.
        """
        diagonals = [inverse.diagonal(dim1=1, dim2=2) for inverse in self.inverses]
        return [
            torch.maximum(self._of(each, found), 1 / own)
            for each, found, own in zip(self.slices, diagonals, self._diagonal, strict=True)
        ]

    def times(self, vectors: Sequence[Tensor]) -> Exchange[list[Tensor]]:
        """Return the inverse times a vector, for each slice.

        Args:
            vectors: of each slice, fp32, shape [n].
        """
        blocks = yield from self._in_blocks(vectors)
        products = [
            torch.bmm(inverse, vector.unsqueeze(2)) for inverse, vector in zip(self.inverses, blocks, strict=True)
        ]
        return [self._of(each, product) for each, product in zip(self.slices, products, strict=True)]

    def _first(self, each: Slice) -> int:
        """Return the first block of which a slice has a weight."""
        return each.start // self.block

    def _of(self, each: Slice, blocks: Tensor) -> Tensor:
        """Return a slice's part of values in blocks."""
        start = each.start - self._first(each) * self.block
        return blocks.flatten()[start : start + each.end - each.start]

    def _in_blocks(self, vectors: Sequence[Tensor]) -> Exchange[list[Tensor]]:
        """Return vectors in whole blocks, shape [blocks, block], what other ranks hold of these included."""
        blocks = []
        for each, inverse, vector in zip(self.slices, self.inverses, vectors, strict=True):
            padded = vector.new_zeros(len(inverse), self.block)
            self._of(each, padded).copy_(vector)
            blocks.append(padded)
        if self._row:
            shared = torch.zeros(len(self._row), self.block)
            for each, padded in zip(self.slices, blocks, strict=True):
                for row, local in self._shared(each):
                    begin = (self._first(each) + local) * self.block
                    owned = slice(max(each.own_start - begin, 0), max(each.own_end - begin, 0))
                    shared[row, owned] = padded[local, owned].cpu()
            bits = shared.view(torch.int32).long()  # each element comes from one rank, so that a sum leaves it as it is
            whole = (yield Request(bits)).int().view(torch.float32)
            for each, padded in zip(self.slices, blocks, strict=True):
                for row, local in self._shared(each):
                    padded[local] = whole[row].to(padded.device)
        return blocks

    def _shared(self, each: Slice) -> list[tuple[int, int]]:
        """Return those blocks of a slice that lie on several ranks: their row in the exchange, their place here."""
        first, last = self._first(each), ceil(each.end / self.block) - 1
        found = {first, last} if last >= first else set()
        return [(self._row[each.name, at], at - first) for at in sorted(found) if (each.name, at) in self._row]
