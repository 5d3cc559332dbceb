"""What a score is: the smallest go first."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.exchange import Exchange
from distprune.pruning.keys import (
    FLOAT_BITS,
    HIGHEST_FLOAT,
    HIGHEST_MAGNITUDE,
    MAGNITUDE_BITS,
    float_keys,
    key_float,
    key_magnitude,
    magnitude_keys,
)
from distprune.pruning.slices import Part, Slice


class Score(ABC):
    """A score of each weight."""

    needs_gradient = False
    """Whether it reads the step's gradient, as it is before it is masked."""
    accumulates = False
    """Whether it has a state that every optimizer step adds to."""
    comes_back = False
    """Whether what was pruned competes again at each pruning, with the weights that it had when it went."""
    learns = False
    """Whether it is told, before each pruning, gradients of ``fisher.samples`` batches that are taken for it alone."""
    reads_weights = True
    """Whether it depends on the weights."""
    samples = False
    """Whether its keys are int32 and depend on each weight alone, with key 0 for a weight of zero."""
    bits = FLOAT_BITS
    """Keys are less than 2**bits - 1."""
    highest = HIGHEST_FLOAT
    """The highest key that is a number's."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    @property
    def reads_gradients(self) -> bool:
        """Whether it is given gradients: the step's, or such as are taken for it."""
        return self.needs_gradient or self.learns

    @property
    def bytes_held(self) -> int:
        """Bytes of each weight that a rank holds, beside the weight and its mask."""
        return 4 * (self.accumulates + self.comes_back)

    @abstractmethod
    def scores(self, part: Part) -> Tensor:
        """Return the scores of consecutive weights, fp32 of shape [n], as a function of each element alone."""

    def prepare(self, slices: Sequence[Slice], sizes: dict[str, int]) -> Exchange[None]:
        """Find out, over all ranks, what the scores of a pruning need to know of whole parameters.

        Args:
            slices: of this rank.
            sizes: elements of every parameter to prune, by name.
        """
        yield from ()

    def observe(self, part: Part) -> None:  # noqa: B027 - most scores keep no state
        """Add a step's weights and gradient to ``part.state``, in place."""

    def learn(self, slices: Sequence[Slice], gradients: Sequence[Tensor | None]) -> Exchange[None]:
        """Take a batch's averaged gradients into account, 0 where a weight is pruned.

        Args:
            slices: of this rank.
            gradients: of each of them, fp32 of its shape; None: all 0.
        """
        yield from ()

    def compensate(self, slices: Sequence[Slice]) -> Exchange[None]:
        """Move the weights that stay, to make up for those that go.

        Args:
            slices: of this rank, with the new masks; what goes still has its weight, and is zeroed behind this.
        """
        yield from ()

    def keys(self, part: Part) -> Tensor:
        """Return integers of the scores' order, int32 or int64 of shape [n], at least 0."""
        return float_keys(self.checked(part))

    def checked(self, part: Part) -> Tensor:
        """Return the scores, which a class of another package may have wrong.

        Raises:
            UserError: another type or shape than there should be, by which other weights would go.
        """
        scores = self.scores(part)
        weights = part.weights
        if (scores.dtype, scores.shape, scores.device) != (torch.float32, weights.shape, weights.device):
            raise UserError(
                f"{type(self).__name__}.scores gave {scores.dtype} of shape {list(scores.shape)} on {scores.device} "
                f"for {part.name}; allowed: torch.float32 of shape {list(weights.shape)} on {weights.device}"
            )
        return scores.contiguous()

    def value(self, key: int) -> float:
        """Return the score that has this key."""
        return key_float(key)


class PositiveScore(Score):
    """A score that is never negative: its own bits, read as integers, are its order."""

    bits = MAGNITUDE_BITS
    highest = HIGHEST_MAGNITUDE

    def keys(self, part: Part) -> Tensor:  # noqa: D102 - as in the base class
        return magnitude_keys(self.checked(part))

    def value(self, key: int) -> float:  # noqa: D102
        return key_magnitude(key)
