"""How much a weight matters: the smallest scores go first. A new score is one small class (docs/extending.md)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distprune.config import FisherConfig
from distprune.errors import UserError
from distprune.plugins import find_class
from distprune.pruning.exchange import Exchange, Request
from distprune.pruning.fisher import InverseFisher
from distprune.pruning.fixed import exponent_for, to_fixed
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
from distprune.pruning.masks import MAGNITUDE, PRUNED, apply_mask
from distprune.pruning.slices import Part, Slice


class Score(ABC):
    """A score of each weight."""

    needs_gradient = False
    """Whether it reads gradients: the step's, as it is before it is masked, or others that were taken for it."""
    accumulates = False
    """Whether it has a state that every optimizer step adds to."""
    comes_back = False
    """Whether what was pruned competes again at each pruning, with the weights that it had when it went."""
    learns = False
    """Whether it is told, before each pruning, gradients of ``fisher.samples`` batches that are taken for it alone."""
    compensates = False
    """Whether it moves the weights that stay, in each pruning, to make up for those that go."""
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

    def compensate(self, slices: Sequence[Slice], before: Sequence[Tensor]) -> Exchange[None]:
        """Move the weights that stay.

        Args:
            slices: of this rank, with the new masks.
            before: their weights before the pruning.
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
        if scores.dtype != torch.float32 or scores.shape != part.weights.shape:
            raise UserError(
                f"{type(self).__name__}.scores gave {scores.dtype} of shape {list(scores.shape)} for {part.name}; "
                f"allowed: torch.float32 of shape {list(part.weights.shape)}"
            )
        return scores

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


class Magnitude(PositiveScore):
    """|w|, the paper's score."""

    samples = True

    def scores(self, part: Part) -> Tensor:  # noqa: D102 - as in the base class
        return part.weights.abs()

    def keys(self, part: Part) -> Tensor:  # noqa: D102
        return magnitude_keys(part.weights)


class NormalizedMagnitude(PositiveScore):
    """|w| over the root mean square of its matrix, so that a matrix of small weights is not pruned away."""

    samples = True

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self._norms: dict[str, float] = {}

    def prepare(self, slices: Sequence[Slice], sizes: dict[str, int]) -> Exchange[None]:  # noqa: D102
        place = {name: index for index, name in enumerate(sizes)}
        largest = torch.zeros(len(place), dtype=torch.int64)
        for part in (part for each in slices for part in each.owned()):
            largest[place[part.name]] = max(
                int(largest[place[part.name]]), int((magnitude_keys(part.weights) & MAGNITUDE).max())
            )
        magnitudes = [key_magnitude(key) for key in (yield Request(largest, "max")).tolist()]
        exponents = {
            name: exponent_for(magnitude**2, size) if math.isfinite(magnitude) else 0
            for (name, size), magnitude in zip(sizes.items(), magnitudes, strict=True)
        }
        sums = torch.zeros(len(place), dtype=torch.int64)
        for part in (part for each in slices for part in each.owned()):
            squares = part.weights.double().square()
            sums[place[part.name]] += to_fixed(squares, exponents[part.name]).sum().cpu()
        totals = (yield Request(sums)).tolist()
        self._norms = {
            name: math.sqrt(math.ldexp(total, -exponents[name]) / size) if math.isfinite(magnitude) else math.inf
            for (name, size), magnitude, total in zip(sizes.items(), magnitudes, totals, strict=True)
        }

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        # A tensor divides; a number's reciprocal might be multiplied by, which rounds differently on some devices.
        return part.weights.abs() / torch.tensor(self._norms[part.name] or 1.0, device=part.weights.device)


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


class Random(Score):
    """A hash of the seed and the weight's global index: what pruning without a criterion is worth."""

    reads_weights = False
    bits = MAGNITUDE_BITS
    highest = HIGHEST_MAGNITUDE

    def keys(self, part: Part) -> Tensor:  # noqa: D102
        numbers = torch.arange(part.weights.numel(), device=part.weights.device) + part.first_index
        step = (self.seed + 1) * 0x9E3779B97F4A7C15  # SplitMix64's steps and mixing
        mixed = numbers + ((step + 2**63) % 2**64 - 2**63)
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            mixed = (mixed ^ _shifted(mixed, shift)) * factor
        return _shifted(mixed ^ _shifted(mixed, 31), 34).int()

    def scores(self, part: Part) -> Tensor:  # noqa: D102
        return self.keys(part).float() / 2**30

    def value(self, key: int) -> float:  # noqa: D102
        return key / 2**30


class OptimalBrainSurgeon(PositiveScore):
    """w^2 / (2 [F^-1]_ww), what the loss rises by to second order where the others make up for it (arXiv 2203.07259).

    F is the empirical Fisher matrix in blocks (`InverseFisher`), estimated anew before each pruning from gradients of
    the task's loss. What stays then makes up for what goes, each weight of it by itself. Blocks of one
    weight are the diagonal, which makes up for nothing.
    """

    needs_gradient = True
    learns = True
    compensates = True

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
        """Bytes of each weight around a pruning: its row of its block, both diagonals, and the weight as it was."""
        return 4 * (self.config.block + 3)

    def learn(self, slices: Sequence[Slice], gradients: Sequence[Tensor | None]) -> Exchange[None]:  # noqa: D102
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

    def compensate(self, slices: Sequence[Slice], before: Sequence[Tensor]) -> Exchange[None]:  # noqa: D102
        assert self._fisher is not None
        gone = [
            torch.where(each.mask == PRUNED, weights / self._diagonals[each.name][1], 0)
            for each, weights in zip(slices, before, strict=True)
        ]
        for each, moved in zip(slices, (yield from self._fisher.times(gone)), strict=True):
            weights = each.weights()
            weights -= moved
            apply_mask(weights, each.mask)
        self._fisher, self._diagonals = None, {}

    def _inverse(self, part: Part) -> Tensor:
        first, diagonal = self._diagonals[part.name]
        return diagonal[part.first_index - first :][: part.weights.numel()]


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right as if it were unsigned."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def try_out(score: Score, slices: Sequence[Slice]) -> None:
    """Let a score of another package score a few weights, so that its mistakes show before a run begins.

    One that needs to know something of all ranks first is left alone.

    Raises:
        UserError: it fails.
    """
    if score.learns or type(score).prepare is not Score.prepare:
        return
    for each in slices[:1]:
        few = slice(0, min(8, each.end - each.start))
        weights = each.weights()[few].clone()
        gradient = torch.zeros_like(weights) if score.needs_gradient else None
        state = None if each.state is None else each.state[few].clone()
        try:
            score.keys(Part(each.name, each.first_index + each.start, weights, gradient, state, each.mask[few]))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{type(score).__name__}.scores fails for {each.name}: {error!r}") from error


SCORES: dict[str, type[Score]] = {
    "magnitude": Magnitude,
    "normalized_magnitude": NormalizedMagnitude,
    "taylor": Taylor,
    "movement": Movement,
    "random": Random,
    "obs": OptimalBrainSurgeon,
}


def build_score(
    name: str, seed: int, fisher: FisherConfig | None = None, cuts: Mapping[str, Sequence[int]] | None = None
) -> Score:
    """Return a score by its name, or by ``module:Class`` where it is of another package.

    Args:
        name: of the score.
        seed: of the run.
        fisher: what obs estimates.
        cuts: where in each flattened parameter a rank's slice begins or ends.

    Raises:
        UserError: where there is none of this name.
    """
    if name == "obs":
        return OptimalBrainSurgeon(seed, fisher, cuts)
    return find_class("score", name, SCORES, Score)(seed)  # type: ignore[type-abstract]
