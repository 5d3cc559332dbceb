"""N:M sparsity at every split against loops over whole tensors."""

import math
from fractions import Fraction
from math import floor, prod
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.errors import UserError
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.structures import n_of_m
from tests.unit.structures.harness import (
    LAYOUTS,
    SPLITS,
    Parameters,
    Shapes,
    changed,
    cuts_of,
    drawn,
    prune,
    whole,
)

KINDS = [(2, 4), (1, 4), (4, 8), (3, 5)]


def shapes_of(of: int) -> Shapes:
    return {"a": (5, 2 * of), "b": (of,), "c": (3, 4 * of), "d": (2, 3, of)}


class Group(NamedTuple):
    """M consecutive weights."""

    converted: bool
    lost: Fraction
    """Sum of the M - N smallest scores, 0 of what is pruned."""
    number: int
    smallest: list[int]
    """Their places in the model."""


class Expected(NamedTuple):
    """What goes, and the largest loss of a group that was converted; 0 where none was."""

    gone: torch.Tensor
    threshold: float


def reference(parameters: Parameters, kept: int, of: int, sparsity: Fraction, by_state: bool = False) -> Expected:
    states = [each.state if by_state else each.weights.abs() for each in parameters.values()]
    scores = torch.cat(states).tolist()  # type: ignore[arg-type]
    gone = whole(parameters).tolist()
    groups = []
    for first in range(0, len(scores), of):
        order = sorted(range(first, first + of), key=lambda i: (not gone[i], 0.0 if gone[i] else scores[i], i))
        smallest = order[: of - kept]
        lost = sum((Fraction(scores[i]) for i in smallest if not gone[i]), Fraction(0))
        converted = sum(gone[first : first + of]) >= of - kept
        groups.append(Group(converted, Fraction(0) if converted else lost, first // of, smallest))
    wanted = max(floor(sparsity * len(scores) / (of - kept)), sum(group.converted for group in groups))
    chosen = sorted(groups, key=lambda group: (not group.converted, group.lost, group.number))[:wanted]
    for group in chosen:
        for i in group.smallest:
            gone[i] = True
    return Expected(torch.tensor(gone), float(max((g.lost for g in chosen if not g.converted), default=0)))


def full(kept: int, of: int) -> Fraction:
    return Fraction(of - kept, of)


# ------------------------------------------------------------------------------ against loops


@pytest.mark.parametrize(("kept", "of"), KINDS)
@pytest.mark.parametrize("levels", [2, None])
def test_groups_are_converted_by_what_they_lose_at_every_split(kept: int, of: int, levels: int | None) -> None:
    shapes = shapes_of(of)
    parameters = drawn(shapes, kept, levels)
    for sparsity in (Fraction(0), Fraction("0.1"), full(kept, of) / 2, full(kept, of)):
        expected = reference(parameters, kept, of, sparsity)
        for split, world in LAYOUTS:
            found = prune(parameters, shapes, sparsity, split=split, world=world, structure=f"{kept}:{of}")
            assert torch.equal(whole(found.parameters), expected.gone), f"{sparsity} at {split}, {world} ranks"
            assert found.threshold == pytest.approx(expected.threshold)
            assert found.count == found.structure.masked_at(sparsity)
    assert (whole(found.parameters).view(-1, of).sum(1) == of - kept).all(), "the last sparsity is all it can have"


@given(st.sampled_from(KINDS), st.integers(0, 2**20), st.sampled_from(list(SPLITS)), st.integers(1, 6), st.data())
@settings(max_examples=40)
def test_on_a_ladder_masks_grow_while_weights_change(
    kind: tuple[int, int], seed: int, split: str, world: int, data: st.DataObject
) -> None:
    kept, of = kind
    shapes = shapes_of(of)
    rungs = sorted(data.draw(st.lists(st.fractions(0, full(kept, of), max_denominator=60), max_size=3)))
    parameters = drawn(shapes, seed, data.draw(st.sampled_from([None, 1])))
    for rung in [*rungs, full(kept, of)]:
        expected = reference(parameters, kept, of, rung)
        found = prune(parameters, shapes, rung, split=split, world=world, structure=f"{kept}:{of}")
        assert torch.equal(whole(found.parameters), expected.gone)
        assert found.count == found.structure.masked_at(rung)
        parameters = changed(found.parameters, seed)
    assert (whole(parameters).view(-1, of).sum(1) == of - kept).all()


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
@pytest.mark.parametrize(("kept", "of"), KINDS)
def test_from_a_sparse_model_each_group_gets_its_zeros_and_keeps_more(kept: int, of: int, share: float) -> None:
    shapes = shapes_of(of)
    parameters = drawn(shapes, 7)
    chances = drawn(shapes, 8)
    for name, each in parameters.items():
        each.mask[(chances[name].weights.abs() < share)] = PRUNED
    parameters["c"].mask[of : 2 * of] = PRUNED
    parameters = changed(parameters, 9)
    before = whole(parameters).view(-1, of).sum(1)
    for sparsity in (Fraction("0.05"), full(kept, of) / 2, full(kept, of)):
        expected = reference(parameters, kept, of, sparsity)
        for split, world in LAYOUTS[1::3]:
            found = prune(parameters, shapes, sparsity, split=split, world=world, structure=f"{kept}:{of}")
            assert torch.equal(whole(found.parameters), expected.gone)
            assert found.threshold == pytest.approx(expected.threshold)
    assert torch.equal(whole(found.parameters).view(-1, of).sum(1), before.clamp(min=of - kept))


def test_scores_below_zero_count_as_what_they_are() -> None:
    shapes = shapes_of(4)
    parameters = drawn(shapes, 10)
    for name, each in drawn(shapes, 11, 3).items():
        parameters[name].state = each.weights
    for places in (slice(4, 6), slice(9, 11), slice(13, 16)):  # converted, whatever it has lost by that
        parameters["c"].mask[places] = PRUNED
    parameters = changed(parameters, 12)
    for sparsity in (Fraction("0.2"), Fraction("0.3"), Fraction("0.5")):
        expected = reference(parameters, 2, 4, sparsity, by_state=True)
        assert (expected.threshold < 0) == (sparsity < Fraction("0.5"))
        for split, world in LAYOUTS:
            found = prune(parameters, shapes, sparsity, "movement", split, world, structure="2:4")
            assert torch.equal(whole(found.parameters), expected.gone)
            assert found.threshold == expected.threshold


def test_groups_read_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of(4)
    parameters = drawn(shapes, 12, 2)
    monkeypatch.setattr(n_of_m, "_PAIRS", 3 * 16)
    monkeypatch.setattr(n_of_m, "chunk_of", lambda device: 1)
    for sparsity in (Fraction("0.2"), Fraction("0.5")):
        for split, world in LAYOUTS[:6]:
            found = prune(parameters, shapes, sparsity, split=split, world=world, structure="2:4")
            assert torch.equal(whole(found.parameters), reference(parameters, 2, 4, sparsity).gone)


# ------------------------------------------------------------------------------ what is out of the ordinary


@pytest.mark.parametrize("split", ["2", "3", "ragged"])
def test_a_rank_hands_over_little_for_each_group_that_is_cut(split: str) -> None:
    for kept, of in KINDS:
        shapes = shapes_of(of)
        sizes = {name: prod(shape) for name, shape in shapes.items()}
        parameters = drawn(shapes, 13)
        cuts = cuts_of(sizes, SPLITS[split](sizes, 7))
        groups = {(name, place // of) for name in cuts for place in cuts[name] if place % of}
        assert groups
        alone, among = (
            prune(parameters, shapes, full(kept, of) / 2, split=split, world=world, structure=f"{kept}:{of}").sent
            for world in (1, 7)
        )
        assert among == alone + 16 * of * len(groups)


def test_a_nan_is_reported_and_stays() -> None:
    shapes = shapes_of(4)
    parameters = drawn(shapes, 14)
    parameters["c"].weights[[1, 17]] = math.nan
    for split, world in (("2", 1), ("2", 5), ("3", 3)):
        found = prune(parameters, shapes, Fraction("0.5"), split=split, world=world, structure="2:4")
        assert found.nans == {"a": 0, "b": 0, "c": 2, "d": 0}
        assert (found.parameters["c"].mask[[1, 17]] == KEPT).all()


@pytest.mark.parametrize("huge", [math.inf, 3e38])
def test_infinite_scores_are_the_largest(huge: float) -> None:
    shapes = shapes_of(4)
    parameters = drawn(shapes, 15, 5)
    parameters["c"].weights[[0, 1, 2, 9]] = torch.tensor([huge, -huge, huge, -huge])
    for split, world in (("2", 1), ("3", 5)):
        found = prune(parameters, shapes, Fraction("0.4"), split=split, world=world, structure="2:4")
        assert (found.parameters["c"].mask[[0, 1, 2, 3, 9]] == KEPT).all(), "its group is the last"
        found = prune(parameters, shapes, Fraction("0.5"), split=split, world=world, structure="2:4")
        assert (found.parameters["c"].mask[:4] == KEPT).tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", ["0:4", "4:4", "5:4", "0:0"])
def test_counts_that_cannot_be_meant_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"pruning\.structure is '{name}'; allowed: N:M with N at least 1 and less"):
        prune(drawn(shapes_of(4), 0), shapes_of(4), Fraction(0), structure=name)


@pytest.mark.parametrize(("name", "sparsity", "most"), [("2:4", "0.51", "0.5"), ("1:3", "0.66667", "0.666667")])
def test_a_sparsity_that_the_structure_cannot_have_is_refused(name: str, sparsity: str, most: str) -> None:
    shapes = {"layer.0.weight": (2, 12), "layer.1.weight": (3, 12)}
    message = (
        rf"pruning\.sparsity is {sparsity}, which {name} .* layer\.0\.weight of shape \[2, 12\]; .* at most {most}$"
    )
    with pytest.raises(UserError, match=message):
        prune(drawn(shapes, 0), shapes, Fraction(sparsity), structure=name)


@pytest.mark.parametrize("sparsity", ["0.6666666666666666", "0.666667"])
def test_a_decimal_stands_for_what_has_no_end(sparsity: str) -> None:
    shapes = {"layer.0.weight": (2, 12), "layer.1.weight": (3, 12)}
    found = prune(drawn(shapes, 0), shapes, Fraction(sparsity), structure="1:3")
    masks = torch.cat([each.mask for each in found.parameters.values()]).view(-1, 3)
    assert ((masks == PRUNED).sum(1) == 2).all()


@pytest.mark.parametrize("shape", [(4, 6), (8, 2), (7,), (4, 4, 1)])
def test_rows_that_groups_do_not_fill_are_refused(shape: tuple[int, ...]) -> None:
    shapes = {"layer.0.weight": (2, 12), "layer.1.weight": shape}
    message = r"layer\.1\.weight has shape \[.*\]; 2:4 needs rows that 4 divides"
    with pytest.raises(UserError, match=message) as caught:
        prune(drawn(shapes, 0), shapes, Fraction("0.5"), structure="2:4")
    assert str(list(shape)) in str(caught.value)
