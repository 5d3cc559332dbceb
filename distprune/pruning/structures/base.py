"""What every structure has to say: how much goes at a sparsity, and what of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from distprune.pruning.exchange import Exchange
from distprune.pruning.scores import Score
from distprune.pruning.slices import Slice


@dataclass(frozen=True)
class Choice:
    """What a pruning came to: the same on every rank, but for the marking of its own slices."""

    threshold: float
    """The highest score that went, of a weight or of what is pruned together."""
    mark: Callable[[Slice], int]
    """Extends a slice's mask, and returns how many of its scores are NaN: those stay."""


class Structure(ABC):
    """A rule of which weights go together, and how many of them at which sparsity."""

    @abstractmethod
    def masked_at(self, sparsity: Fraction) -> int:
        """Return how many weights are masked at a sparsity, of a model that was dense before."""

    @abstractmethod
    def choose(
        self, slices: Sequence[Slice], score: Score, sparsity: Fraction, masked: dict[str, int]
    ) -> Exchange[Choice]:
        """Choose what is to be pruned at a sparsity: what is pruned already, then the smallest.

        Args:
            slices: of this rank.
            score: prepared.
            sparsity: of the weights to prune, or of each of their groups.
            masked: how many weights of each parameter are pruned, over all ranks.
        """
