"""How much a weight matters: the smallest scores go first. A new score is one small class (docs/extending.md)."""

from collections.abc import Mapping, Sequence
from inspect import isgeneratorfunction

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


_FEW = 8
"""Weights that a score of another package is tried on."""


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
        UserError: where there is none of this name, or one whose exchanges are none.
    """
    if name == "obs":
        return OptimalBrainSurgeon(seed, fisher, cuts)
    kind = find_class("pruning.score", name, SCORES, Score)  # type: ignore[type-abstract]
    for method in ("prepare", "learn", "compensate"):
        if not isgeneratorfunction(getattr(kind, method)):
            raise UserError(
                f"{name}.{method} is no exchange; allowed: a method with `yield from`, of () where nothing is exchanged"
            )
    return kind(seed)


def try_out(score: Score, slices: Sequence[Slice]) -> None:
    """Let a score of another package score a few weights, so that its mistakes show before a run begins.

    One that needs to know something of all ranks first is left alone.

    Raises:
        UserError: it fails.
    """
    if score.learns or type(score).prepare is not Score.prepare:
        return
    for each in slices[:1]:
        weights = each.weights()[:_FEW].clone()
        given = weights.clone()
        try:
            together = score.checked(_part(score, each, weights, 0, _FEW))
            alone = [score.checked(_part(score, each, weights, place, place + 1)) for place in range(len(weights))]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{type(score).__name__}.scores fails for {each.name}: {error!r}") from error
        wrong = {
            "changes part.weights; allowed: a tensor of its own": not torch.equal(weights, given),
            "is negative; allowed in a PositiveScore: at least 0, and in a Score any": bool(
                isinstance(score, PositiveScore) and (together < 0).any()
            ),
            "depends on which weights it is given at once; allowed: of each weight by itself": not torch.allclose(
                together, torch.cat([*alone, together[:0]]), rtol=1e-4, equal_nan=True
            ),
        }
        for what in (what for what, is_so in wrong.items() if is_so):
            raise UserError(f"{type(score).__name__}.scores {what}")


def _part(score: Score, each: Slice, weights: torch.Tensor, start: int, end: int) -> Part:
    """Return some of the first weights of a slice, with a gradient of 0."""
    few = weights[start:end]
    gradient = torch.zeros_like(few) if score.needs_gradient else None
    state = None if each.state is None else each.state[start:end].clone()
    return Part(each.name, each.first_index + each.start + start, few, gradient, state, each.mask[start:end])
