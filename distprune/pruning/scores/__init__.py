"""How much a weight matters: the smallest scores go first. A new score is one small class (docs/extending.md)."""

from collections.abc import Mapping, Sequence

import torch

from distprune.config import FisherConfig
from distprune.errors import UserError
from distprune.plugins import find_class
from distprune.pruning.scores.base import PositiveScore, Score
from distprune.pruning.scores.chance import Random
from distprune.pruning.scores.first_order import Movement, Taylor
from distprune.pruning.scores.magnitude import Magnitude, NormalizedMagnitude
from distprune.pruning.scores.second_order import OptimalBrainSurgeon
from distprune.pruning.slices import Part, Slice

__all__ = [
    "SCORES",
    "Magnitude",
    "Movement",
    "NormalizedMagnitude",
    "OptimalBrainSurgeon",
    "PositiveScore",
    "Random",
    "Score",
    "Taylor",
    "build_score",
    "try_out",
]

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
