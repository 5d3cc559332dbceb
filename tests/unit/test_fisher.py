"""Blocks of the inverse Fisher matrix, against a plain inverse, and over ranks that cut them anywhere."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from distprune.config import FisherConfig
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.scores import OptimalBrainSurgeon
from distprune.pruning.scores.fisher import InverseFisher
from distprune.pruning.slices import Slice
from tests.unit.simulated import answer

SIZES = {"a": 23, "b": 7, "c": 10}
BLOCK, SAMPLES, DAMPING = 5, 6, 1e-2
FIRST = {"a": 0, "b": 23, "c": 30}


def slice_of(name: str, start: int, end: int, values: Tensor) -> Slice:
    mask = torch.full((end - start,), KEPT, dtype=torch.int8)
    return Slice(name, start, end, start, end, FIRST[name], mask, lambda: values[start:end])


def cut(places: dict[str, Sequence[int]], values: dict[str, Tensor]) -> list[list[Slice]]:
    """Return the slices of ranks that begin at these places of each parameter."""
    ranks = len(next(iter(places.values()))) + 1
    bounds = {name: [0, *places[name], SIZES[name]] for name in SIZES}
    return [
        [
            slice_of(name, start, end, values[name])
            for name in SIZES
            if (start := bounds[name][rank]) < (end := bounds[name][rank + 1])
        ]
        for rank in range(ranks)
    ]


def random(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def plain_inverse(name: str, gradients: list[dict[str, Tensor]]) -> Tensor:
    """Return the inverse of a parameter's Fisher matrix, with zeros outside its blocks."""
    size = SIZES[name]
    fisher = DAMPING * torch.eye(size, dtype=torch.float64)
    fisher += sum(torch.outer(each[name].double(), each[name].double()) for each in gradients) / SAMPLES
    same_block = torch.arange(size)[:, None] // BLOCK == torch.arange(size)[None, :] // BLOCK
    return torch.linalg.inv(fisher * same_block) * same_block


CUTS: list[dict[str, Sequence[int]]] = [
    {"a": [], "b": [], "c": []},
    {"a": [11], "b": [3], "c": [5]},
    {"a": [2, 3], "b": [0, 7], "c": [1, 9]},
    {"a": [23, 23, 23], "b": [4, 7, 7], "c": [0, 6, 7]},
]


@pytest.mark.parametrize("places", CUTS, ids=["whole", "two ranks", "three ranks", "four ranks"])
def test_blocks_are_those_of_a_plain_inverse_wherever_ranks_cut_them(places: dict[str, Sequence[int]]) -> None:
    weights, gradients = random(0), [random(seed) for seed in range(1, SAMPLES + 1)]
    ranks = cut(places, weights)
    fishers = [InverseFisher(slices, places, BLOCK, SAMPLES, DAMPING) for slices in ranks]

    def of(slices: list[Slice], values: dict[str, Tensor]) -> list[Tensor]:
        return [values[each.name][each.start : each.end] for each in slices]

    for each in gradients:
        answer([fisher.add(of(slices, each)) for fisher, slices in zip(fishers, ranks, strict=True)])
    products, _ = answer([fisher.times(of(slices, weights)) for fisher, slices in zip(fishers, ranks, strict=True)])
    for slices, fisher, found in zip(ranks, fishers, products, strict=True):
        for each, diagonal, product in zip(slices, fisher.diagonals(), found, strict=True):
            inverse = plain_inverse(each.name, gradients)
            torch.testing.assert_close(diagonal.double(), inverse.diagonal()[each.start : each.end], rtol=1e-3, atol=0)
            wanted = (inverse @ weights[each.name].double())[each.start : each.end]
            torch.testing.assert_close(product.double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_diagonal_stays_above_its_bound_where_the_sum_cancels() -> None:
    """The inverse of a positive matrix has on its diagonal at least 1 over the matrix's own."""
    slices = cut(CUTS[0], random(0))[0]
    fisher = InverseFisher(slices, CUTS[0], BLOCK, SAMPLES, 1e-7)
    gradients = [{name: 30 * each for name, each in random(seed).items()} for seed in range(1, SAMPLES + 1)]
    for each in gradients:
        answer([fisher.add([each[name] for name in SIZES])])
    for name, found in zip(SIZES, fisher.diagonals(), strict=True):
        own = 1e-7 + sum(each[name] ** 2 for each in gradients) / SAMPLES
        assert bool((found >= 0.999 / own).all()), "rounding has gone below"


def test_a_gradient_that_is_not_there_is_zero() -> None:
    slices = cut(CUTS[0], random(0))[0]
    fisher = InverseFisher(slices, CUTS[0], BLOCK, SAMPLES, DAMPING)
    answer([fisher.add([None, None, None])])
    assert all(torch.equal(each, torch.full_like(each, 1 / torch.tensor(DAMPING))) for each in fisher.diagonals())


def test_one_weight_that_goes_is_made_up_for_as_brute_force_does_it() -> None:
    """What stays then has the least loss of all weights that have this one at zero."""
    weights, gradients = random(0), [random(seed) for seed in range(1, SAMPLES + 1)]
    before = weights["a"].clone()
    slices = [slice_of("a", 0, 23, weights["a"])]
    score = OptimalBrainSurgeon(0, FisherConfig(BLOCK, SAMPLES, DAMPING))
    for each in gradients:
        answer([score.learn(slices, [each["a"]])])
    answer([score.prepare(slices, SIZES)])
    saliency = torch.cat([score.scores(part) for part in slices[0].parts(0, 23, 4)])
    gone = int(saliency.argmin())
    slices[0].mask[gone] = PRUNED
    answer([score.compensate(slices)])
    fisher = torch.linalg.inv(plain_inverse("a", gradients) + torch.zeros(23, 23, dtype=torch.float64))

    def rise(moved: Tensor) -> float:
        return float(moved.double() @ fisher @ moved.double() / 2)

    # Brute force: with the weight at zero, the others are free, and the quadratic is solved for them.
    free = [index for index in range(23) if index != gone]
    step = torch.zeros(23, dtype=torch.float64)
    step[gone] = -before[gone].double()
    step[free] = -torch.linalg.solve(fisher[free][:, free], fisher[free][:, [gone]] @ step[[gone]])
    torch.testing.assert_close((weights["a"] - before).double(), step, rtol=1e-3, atol=1e-5)
    assert rise(step) == pytest.approx(float(saliency[gone]), rel=1e-3), "the score is the rise of the loss"
    assert float(weights["a"][gone]) == pytest.approx(0, abs=1e-6)


def test_the_diagonal_moves_no_weight_that_stays() -> None:
    weights = random(0)
    before = weights["a"].clone()
    slices = [slice_of("a", 0, 23, weights["a"])]
    score = OptimalBrainSurgeon(0, FisherConfig(1, 1, DAMPING))
    gradient = random(1)["a"]
    answer([score.learn(slices, [gradient])])
    answer([score.prepare(slices, SIZES)])
    (part,) = slices[0].held()
    torch.testing.assert_close(score.scores(part), before**2 * (DAMPING + gradient**2) / 2, rtol=1e-4, atol=0)
    slices[0].mask[:9] = PRUNED
    answer([score.compensate(slices)])
    torch.testing.assert_close(weights["a"][:9], torch.zeros(9), rtol=0, atol=1e-4)
    assert torch.equal(weights["a"][9:], before[9:])
