"""Regrowth on simulated ranks, against a sort of each whole parameter."""

from fractions import Fraction
from math import ceil, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.pruning.masks import PRUNED
from distprune.pruning.regrowth import regrow
from tests.unit.simulated import answer
from tests.unit.structures.harness import LAYOUTS, SPLITS, Parameters, Shapes, drawn, prune, slices_of

SHAPES: Shapes = {"query.weight": (9, 11), "norm.bias": (7,), "output.weight": (4, 13)}
SIZES = {name: prod(shape) for name, shape in SHAPES.items()}


def reference(parameters: Parameters, part: float) -> dict[str, tuple[list[bool], list[bool]]]:
    """Return what is pruned after a regrowth, and what has its weight still; ties by their place in the model."""
    after = {}
    for name, each in parameters.items():
        assert each.gradient is not None
        weights, gradient = each.weights.abs().tolist(), each.gradient.abs().tolist()
        pruned = {place for place in range(len(weights)) if each.mask[place] == PRUNED}
        kept = sorted(set(range(len(weights))) - pruned, key=lambda place: (weights[place], place))
        exchanged = ceil(part * len(kept))
        without = sorted(pruned | set(kept[:exchanged]), key=lambda place: (gradient[place], place))
        stays = set(without[: len(pruned)])
        places = range(len(weights))
        after[name] = [place in stays for place in places], [place in set(kept) - stays for place in places]
    return after


def sparse(seed: int, sparsity: Fraction, levels: int | None) -> Parameters:
    """Return random weights, some of them pruned over all parameters, and random gradients."""
    parameters = prune(drawn(SHAPES, seed, levels), SHAPES, sparsity).parameters
    gradients = drawn(SHAPES, seed + 1, levels)
    for name, each in parameters.items():
        each.gradient = gradients[name].weights
    return parameters


def check(parameters: Parameters, part: float, split: str, world: int) -> None:
    ranks = slices_of(parameters, SHAPES, SPLITS[split](SIZES, world))
    masked = {name: int((each.mask == PRUNED).sum()) for name, each in parameters.items()}
    answer([regrow(slices, SIZES, masked, part) for slices in ranks])
    expected = reference(parameters, part)
    assert {name: sum(gone) for name, (gone, _) in expected.items()} == masked
    for each in (each for slices in ranks for each in slices):
        gone, untouched = (torch.tensor(flags[each.start : each.end]) for flags in expected[each.name])
        assert torch.equal(each.mask == PRUNED, gone), f"{each.name} at {split}, {world} ranks"
        wanted = torch.where(untouched, parameters[each.name].weights[each.start : each.end], 0.0)
        weights = torch.where(each.mask == PRUNED, 0.0, each.weights())
        assert torch.equal(weights, wanted), "what comes back is zero, what stays has not changed"


@pytest.mark.parametrize("levels", [2, None])
def test_the_smallest_change_places_with_the_largest_gradients_at_every_split(levels: int | None) -> None:
    parameters = sparse(0, Fraction("0.6"), levels)
    for part in (0.005, 0.3, 1.0):
        for split, world in LAYOUTS:
            check(parameters, part, split, world)
    after = reference(parameters, 0.3)
    assert any(after[name][0] != (each.mask == PRUNED).tolist() for name, each in parameters.items())


@given(
    st.integers(0, 2**20),
    st.fractions(0, Fraction(99, 100), max_denominator=100),
    st.floats(0, 1),
    st.sampled_from(list(SPLITS)),
    st.integers(1, 6),
    st.sampled_from([None, 1, 5]),
)
@settings(max_examples=40)
def test_it_is_a_sort_of_each_parameter(
    seed: int, sparsity: Fraction, part: float, split: str, world: int, levels: int | None
) -> None:
    check(sparse(seed, sparsity, levels), part, split, world)


def test_without_a_gradient_the_first_places_stay_pruned() -> None:
    parameters = sparse(3, Fraction("0.5"), None)
    for each in parameters.values():
        each.gradient = None
    (slices,) = slices_of(parameters, SHAPES, SPLITS["0"](SIZES, 1))
    masked = {name: int((each.mask == PRUNED).sum()) for name, each in parameters.items()}
    answer([regrow(slices, SIZES, masked, 1.0)])
    for each in slices:
        assert (each.mask == PRUNED).tolist() == [place < masked[each.name] for place in range(SIZES[each.name])]
