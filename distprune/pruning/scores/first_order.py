"""Scores of weights and gradients: what the loss changes by, to first order."""

import torch
from torch import Tensor

from distprune.pruning.scores.base import PositiveScore, Score
from distprune.pruning.slices import Part


class Taylor(PositiveScore):
    """|w * dL/dw|, what the loss changes by to first order, at the pruning step (arXiv 1906.10771, equation 8)."""

    needs_gradient = True

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        if part.gradient is None:
            return torch.zeros_like(part.weights)
        return (part.weights * part.gradient.to(part.weights)).abs()


class Movement(Score):
    """The sum over all steps of -w * dL/dw: weights that move away from zero stay (arXiv 2005.07683, equation 4).

    A pruned weight's w is what it was when it went, and dL/dw is taken where it is zero: one that is missed comes back.
    """

    needs_gradient = True
    accumulates = True
    comes_back = True

    def observe(self, part: Part) -> None:  # noqa: D102
        assert part.state is not None
        if part.gradient is not None:
            part.state.addcmul_(part.before_pruning, part.gradient.to(part.weights), value=-1)

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        assert part.state is not None
        return part.state
