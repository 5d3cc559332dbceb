"""Parameters cut up over simulated ranks, as each ZeRO stage cuts them, and pruned there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from math import prod
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from distprune.config import PruningConfig
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.scores import Score, build_score
from distprune.pruning.slices import Slice
from distprune.pruning.structures import Structure, build_structure
from tests.unit.simulated import answer

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Parameter:
    """A whole parameter, flattened, and what scores read of it."""

    weights: Tensor
    mask: Tensor
    gradient: Tensor | None = None
    state: Tensor | None = None


Parameters = dict[str, Parameter]


def dense(weights: Mapping[str, Tensor]) -> Parameters:
    return {name: Parameter(each.flatten(), torch.full((each.numel(),), KEPT).char()) for name, each in weights.items()}


def whole(parameters: Parameters) -> Tensor:
    """Return which weights are pruned, in the order of global indices."""
    return torch.cat([each.mask == PRUNED for each in parameters.values()])


class Holding(NamedTuple):
    """What a rank holds, and counts, of a parameter."""

    name: str
    start: int
    end: int
    own_start: int
    own_end: int


Holdings = list[list[Holding]]


def _flat(sizes: Mapping[str, int], bounds: list[int]) -> Holdings:
    """Cut the parameters, laid end to end, at these places."""
    first = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    ranks: Holdings = []
    for begin, end in pairwise(bounds):
        spans = {name: (max(0, begin - first[name]), min(size, end - first[name])) for name, size in sizes.items()}
        ranks.append([Holding(name, *span, *span) for name, span in spans.items() if span[0] < span[1]])
    return ranks


def stage_0(sizes: Mapping[str, int], world: int) -> Holdings:
    """Every rank holds all, and counts its part of each parameter."""

    def holding(name: str, rank: int) -> Holding:
        size = sizes[name]
        return Holding(name, 0, size, size * rank // world, size * (rank + 1) // world)

    return [[holding(name, rank) for name in sizes] for rank in range(world)]


def stage_2(sizes: Mapping[str, int], world: int) -> Holdings:
    """Equal pieces of all parameters laid end to end."""
    total = sum(sizes.values())
    return _flat(sizes, [min(total, -(-total // world) * rank) for rank in range(world + 1)])


def stage_3(sizes: Mapping[str, int], world: int) -> Holdings:
    """Equal pieces of each parameter, the last ones shorter or empty."""
    ranks: Holdings = [[] for _ in range(world)]
    for name, size in sizes.items():
        piece = -(-size // world)
        for rank in range(world):
            start, end = min(size, piece * rank), min(size, piece * (rank + 1))
            if start < end:
                ranks[rank].append(Holding(name, start, end, start, end))
    return ranks


def ragged(sizes: Mapping[str, int], world: int) -> Holdings:
    """Pieces of any size, some of them empty."""
    rng, total = Random(world), sum(sizes.values())
    inside = [rng.choice([rng.randrange(total), 1, total, total // 2]) for _ in range(world - 1)]
    return _flat(sizes, sorted([0, *inside, total]))


SPLITS: dict[str, Callable[[Mapping[str, int], int], Holdings]] = {
    "0": stage_0,
    "2": stage_2,
    "3": stage_3,
    "ragged": ragged,
}
LAYOUTS = [("2", 1), *((split, world) for world in (2, 5) for split in SPLITS)]
"""Splits and worlds that a structure's tests go through."""


def slices_of(parameters: Parameters, shapes: Shapes, holdings: Holdings) -> list[list[Slice]]:
    """Return each rank's slices, of copies."""
    first = dict(zip(parameters, accumulate((prod(shapes[name]) for name in parameters), initial=0), strict=False))

    def of(holding: Holding) -> Slice:
        name, start, end, own_start, own_end = holding
        whole, piece = parameters[name], slice(start, end)
        weights, mask = whole.weights[piece].clone(), whole.mask[piece].clone()
        gradient, state = (None if each is None else each[piece].clone() for each in (whole.gradient, whole.state))
        bounds = (start, end, own_start, own_end)
        return Slice(name, *bounds, first[name], mask, lambda: weights, lambda: gradient, state)

    return [[of(holding) for holding in rank] for rank in holdings]


def cuts_of(sizes: Mapping[str, int], holdings: Holdings) -> dict[str, list[int]]:
    every = [(each.name, place) for rank in holdings for each in rank for place in (each.start, each.end)]
    return {name: sorted({at for of, at in every if of == name} - {0, size}) for name, size in sizes.items()}


@dataclass
class Pruned:
    """What a pruning came to."""

    parameters: Parameters
    threshold: float
    nans: dict[str, int]
    sent: int
    structure: Structure

    @property
    def count(self) -> int:
        return int(whole(self.parameters).sum())


def prune(
    parameters: Parameters,
    shapes: Shapes,
    sparsity: Fraction,
    score: str | Callable[[], Score] = "magnitude",
    split: str = "2",
    world: int = 1,
    heads: int | None = None,
    **config: object,
) -> Pruned:
    """Prune on simulated ranks, each of which must mark what it holds alike, zero it, and leave the rest as it is."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    holdings = SPLITS[split](sizes, world)
    _check_each_is_counted_once(sizes, holdings)
    ranks = slices_of(parameters, shapes, holdings)
    cuts = cuts_of(sizes, holdings)
    pruning = PruningConfig(sparsity=float(sparsity), **config)  # type: ignore[arg-type]
    structures = [build_structure(pruning, dict(shapes), cuts, heads) for _ in ranks]
    scores = [build_score(score, 0) if isinstance(score, str) else score() for _ in ranks]
    masked = {name: int((each.mask == PRUNED).sum()) for name, each in parameters.items()}
    answer([each.prepare(slices, sizes) for each, slices in zip(scores, ranks, strict=True)])
    choices, sent = answer(
        [
            structure.choose(slices, each, sparsity, masked)
            for structure, slices, each in zip(structures, ranks, scores, strict=True)
        ]
    )
    assert len({each.threshold for each in choices}) == 1
    after = {name: replace(each, mask=torch.zeros_like(each.mask)) for name, each in parameters.items()}
    nans = dict.fromkeys(sizes, 0)
    for slices, choice in zip(ranks, choices, strict=True):
        for each in slices:
            nans[each.name] += choice.mark(each)
            owned = slice(each.own_start - each.start, each.own_end - each.start)
            after[each.name].mask[each.own_start : each.own_end] = each.mask[owned]
    for each in (each for slices in ranks for each in slices):
        mask = after[each.name].mask[each.start : each.end]
        assert torch.equal(each.mask, mask), f"ranks differ in {each.name}"
        before = parameters[each.name].weights[each.start : each.end]
        assert torch.equal(each.weights().view(torch.int32), before.view(torch.int32)), "a choice changes no weight"
    for name, each in after.items():
        each.weights = torch.where(each.mask == PRUNED, 0.0, parameters[name].weights)
        assert not (each.mask & ~parameters[name].mask).any(), "a pruned weight is back"
    return Pruned(after, choices[0].threshold, nans, sent, structures[0])


def _check_each_is_counted_once(sizes: Mapping[str, int], holdings: Holdings) -> None:
    counts = {name: torch.zeros(size) for name, size in sizes.items()}
    for each in (each for rank in holdings for each in rank):
        counts[each.name][each.own_start : each.own_end] += 1
    assert all((count == 1).all() for count in counts.values())


# ------------------------------------------------------------------------------ parameters to prune


def drawn(shapes: Shapes, seed: int, levels: int | None = None) -> Parameters:
    """Return random weights; of few levels, integers among which are many ties."""
    generator = torch.Generator().manual_seed(seed)

    def weights(size: int) -> Tensor:
        if levels is None:
            return torch.randn(size, generator=generator)
        return torch.randint(-levels, levels + 1, (size,), generator=generator).float()

    return dense({name: weights(prod(shape)) for name, shape in shapes.items()})


def integers(count: int, seed: int) -> Tensor:
    """Return numbers from -1 to 1 by a linear congruential generator, in integers until the last division."""
    state, numbers = 2 * seed + 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 40) - 2**23)
    return torch.tensor(numbers, dtype=torch.float32) / 2**23


def changed(parameters: Parameters, seed: int) -> Parameters:
    """Return parameters whose kept weights have taken a step."""
    steps = drawn({name: (each.weights.numel(),) for name, each in parameters.items()}, seed)
    return {
        name: replace(each, weights=torch.where(each.mask == PRUNED, 0.0, each.weights + steps[name].weights))
        for name, each in parameters.items()
    }
