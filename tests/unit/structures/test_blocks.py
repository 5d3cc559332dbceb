"""Tiles, heads and neurons at every split, against sums of whole tensors."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.scores import PositiveScore
from distprune.pruning.slices import Part
from distprune.pruning.structures import blocks
from tests.unit.structures.harness import LAYOUTS, SPLITS, Parameters, Shapes, changed, drawn, prune, whole
from tests.unit.structures.units import (
    HEADS,
    Unit,
    bert_heads,
    bert_neurons,
    covered_once,
    head_units,
    neuron_units,
    reference,
    tile_units,
)

MATRICES: Shapes = {"a": (4, 12), "b": (12, 4), "c": (8, 24)}
TILES: list[tuple[int, int]] = [(1, 4), (4, 1), (2, 3), (4, 4)]
KINDS: dict[str, tuple[Shapes, Callable[[Shapes], list[Unit]]]] = {
    "1x4": (MATRICES, lambda shapes: tile_units(shapes, 1, 4)),
    "4x1": (MATRICES, lambda shapes: tile_units(shapes, 4, 1)),
    "2x3": ({"a": (4, 12), "b": (12, 3), "c": (8, 24)}, lambda shapes: tile_units(shapes, 2, 3)),
    "4x4": (MATRICES, lambda shapes: tile_units(shapes, 4, 4)),
    "heads": (bert_heads(), head_units),
    "neurons": (bert_neurons(), neuron_units),
}
SPARSITIES = [Fraction(each) for each in ("0", "0.1", "0.34", "0.5", "0.9")]


def magnitude(parameters: Parameters, name: str) -> Tensor:
    return parameters[name].weights.abs()


def state(parameters: Parameters, name: str) -> Tensor:
    found = parameters[name].state
    assert found is not None
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, Shapes, list[Unit]]:
    shapes, units = KINDS[request.param]
    return request.param, shapes, units(shapes)


# ------------------------------------------------------------------------------ against sums of whole tensors


@pytest.mark.parametrize("levels", [1, 9])
def test_units_of_the_smallest_sums_go_at_every_split(kind: tuple[str, Shapes, list[Unit]], levels: int) -> None:
    structure, shapes, units = kind
    assert covered_once(units, shapes)
    parameters = drawn(shapes, 1, levels)
    for sparsity in SPARSITIES:
        expected = reference(parameters, units, sparsity, magnitude)
        for split, world in [*LAYOUTS, ("0", 17)]:
            found = prune(parameters, shapes, sparsity, split=split, world=world, structure=structure, heads=HEADS)
            assert torch.equal(whole(found.parameters), expected.gone), f"{sparsity} at {split}, {world} ranks"
            assert found.threshold == expected.threshold, f"{sparsity} at {split}, {world} ranks"
            assert found.count == found.structure.masked_at(sparsity)
    assert levels > 1 or len(set(expected.sums)) < len(units), "there are no ties"


@given(st.sampled_from(list(KINDS)), st.integers(0, 2**20), st.sampled_from(list(SPLITS)), st.integers(1, 6), st.data())
@settings(max_examples=40)
def test_on_a_ladder_masks_grow_while_weights_change(
    name: str, seed: int, split: str, world: int, data: st.DataObject
) -> None:
    shapes, units = KINDS[name]
    parameters = drawn(shapes, seed, 3)
    for rung in sorted(data.draw(st.lists(st.fractions(0, Fraction(49, 50), max_denominator=50), max_size=4))):
        expected = reference(parameters, units(shapes), rung, magnitude)
        found = prune(parameters, shapes, rung, split=split, world=world, structure=name, heads=HEADS)
        assert torch.equal(whole(found.parameters), expected.gone)
        parameters = changed(found.parameters, seed)
        for each in parameters.values():
            each.weights.round_()


def test_weights_pruned_before_do_not_count_in_a_sum(kind: tuple[str, Shapes, list[Unit]]) -> None:
    """Some units are pruned as a whole, others in part; scores are of either sign, and not 0 where it is pruned."""
    structure, shapes, units = kind
    parameters, chances = drawn(shapes, 2, 9), drawn(shapes, 3)
    for name, each in parameters.items():
        each.state = (each.weights + 5).roll(1)
        each.mask[chances[name].weights > 0.3] = PRUNED
    for name, places in units[1].items():
        parameters[name].mask[places] = PRUNED
    parameters = changed(parameters, 4)
    signs = []
    for sparsity in (Fraction("0.02"), Fraction("0.3"), Fraction("0.7")):
        for offset in (0.0, 40.0):
            for each in parameters.values():
                assert each.state is not None
                each.state -= offset
            expected = reference(parameters, units, sparsity, state)
            signs.append(math.copysign(1, expected.threshold))
            for split, world in LAYOUTS[1::2]:
                found = prune(parameters, shapes, sparsity, "movement", split, world, HEADS, structure=structure)
                assert torch.equal(whole(found.parameters), expected.gone)
                assert found.threshold == expected.threshold
    assert min(signs) < 0 < max(signs)


def test_large_sums_do_not_overflow_on_many_ranks(kind: tuple[str, Shapes, list[Unit]]) -> None:
    structure, shapes, units = kind
    parameters = drawn(shapes, 5, 1)
    for each in parameters.values():
        each.weights.copy_(torch.where(each.weights == 0, 2.0**126, 2.0**127))
    expected = reference(parameters, units, Fraction("0.5"), magnitude)
    for split in ("0", "3"):
        found = prune(parameters, shapes, Fraction("0.5"), split=split, world=65, structure=structure, heads=HEADS)
        assert torch.equal(whole(found.parameters), expected.gone), split
        assert found.threshold == expected.threshold


def test_a_nan_is_reported_and_its_unit_stays_beside_larger_ones(kind: tuple[str, Shapes, list[Unit]]) -> None:
    structure, shapes, units = kind
    parameters = drawn(shapes, 6, 9)
    for name, places in units[-1].items():
        parameters[name].weights[places] = 1000.0
    parameters[name].weights[places[0]] = math.nan
    for split, world in (("2", 1), ("2", 5), ("3", 3), ("ragged", 3)):
        found = prune(parameters, shapes, Fraction("0.5"), split=split, world=world, structure=structure, heads=HEADS)
        assert found.nans == dict.fromkeys(shapes, 0) | {name: 1}
        assert (found.parameters[name].mask[places] == KEPT).all()


@pytest.mark.parametrize("chunk", [1, 30])
def test_matrices_read_a_few_rows_at_a_time_are_the_same(
    kind: tuple[str, Shapes, list[Unit]], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    structure, shapes, units = kind
    parameters, sparsity = drawn(shapes, 7, 2), Fraction("0.4")
    expected = reference(parameters, units, sparsity, magnitude)
    monkeypatch.setattr(blocks, "chunk_of", lambda device: chunk)
    for split, world in LAYOUTS[:6]:
        found = prune(parameters, shapes, sparsity, split=split, world=world, structure=structure, heads=HEADS)
        assert torch.equal(whole(found.parameters), expected.gone)


@pytest.mark.parametrize("split", ["0", "2", "3"])
def test_a_rank_hands_over_little_for_each_unit_that_is_cut(kind: tuple[str, Shapes, list[Unit]], split: str) -> None:
    """16 bytes for each tile with weights on several ranks, or for each unit that lies in several matrices."""
    structure, shapes, units = kind
    parameters = drawn(shapes, 8)
    ranks = SPLITS[split]({name: len(each.weights) for name, each in parameters.items()}, 7)
    parts = [(each, rank) for rank, held in enumerate(ranks) for each in held]
    rank_of = {(each.name, place): rank for each, rank in parts for place in range(each.start, each.end)}
    cut = [unit for unit in units if len({rank_of[name, at] for name in unit for at in unit[name]}) > 1]
    alone, among = (
        prune(parameters, shapes, Fraction("0.4"), split=split, world=world, structure=structure, heads=HEADS).sent
        for world in (1, 7)
    )
    assert among - alone == (16 * len(cut) if len(units[0]) == 1 else 0)
    assert alone < 20 * 1024 + 16 * len(units)


class Double(PositiveScore):
    """A score of another package with the wrong type."""

    def scores(self, part: Part) -> Tensor:
        return part.weights.abs().double()


@pytest.mark.parametrize(
    ("structure", "shapes"),
    [("4x1", MATRICES), ("2:4", MATRICES), ("heads", bert_heads()), ("neurons", bert_neurons())],
)
def test_a_score_of_the_wrong_type_is_refused_in_every_structure(structure: str, shapes: Shapes) -> None:
    with pytest.raises(UserError, match=r"Double\.scores gave torch\.float64"):
        prune(drawn(shapes, 8), shapes, Fraction("0.5"), score=Double, structure=structure, heads=HEADS)
