"""Single weights, in every scope and split, against a sort of whole tensors."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning import select
from distprune.pruning.masks import KEPT, PRUNED
from distprune.pruning.scores import Magnitude
from distprune.pruning.slices import Slice
from distprune.pruning.structures.unstructured import Elements
from tests.unit.structures.harness import LAYOUTS, SPLITS, Parameters, Pruned, Shapes, changed, drawn, prune, whole

SHAPES: Shapes = {
    "embeddings.weight": (3, 5),
    "encoder.layer.0.query.weight": (9, 11),
    "encoder.layer.0.output.weight": (4, 13),
    "encoder.layer.1.query.weight": (9, 11),
    "encoder.layer.1.norm.bias": (7,),
    "encoder.layer.11.output.weight": (2, 3, 17),
}
NAMES = list(SHAPES)
SCOPES: dict[str, list[list[str]]] = {
    "global": [NAMES],
    "tensor": [[name] for name in NAMES],
    "layer": [NAMES[:1], NAMES[1:3], NAMES[3:5], NAMES[5:]],
    "groups": [[NAMES[1], NAMES[3]], [NAMES[0], NAMES[2], NAMES[5]], [NAMES[4]]],
}
REGEXES = [r"query\.weight$", "weight", "."]
SPARSITIES = [Fraction(each) for each in ("0", "0.01", "0.25", "0.337", "0.5", "0.9")]


def scope_config(scope: str) -> dict[str, object]:
    return {"scope": scope, "groups": REGEXES if scope == "groups" else []}


def magnitude(parameters: Parameters, name: str) -> Tensor:
    return parameters[name].weights.abs()


def reference(
    parameters: Parameters,
    groups: list[list[str]],
    sparsity: Fraction,
    score: Callable[[Parameters, str], Tensor] = magnitude,
) -> Tensor:
    """Return what goes: of each group what is pruned, then the smallest, ties by their place in the model."""
    gone: dict[str, list[bool]] = {name: [False] * len(each.weights) for name, each in parameters.items()}
    for group in groups:
        entries = []
        for name in group:
            scores, pruned = score(parameters, name).tolist(), (parameters[name].mask == PRUNED).tolist()
            place = NAMES.index(name)
            entries += [(not pruned[i], 0.0 if pruned[i] else scores[i], place, i) for i in range(len(scores))]
        before = sum(not entry[0] for entry in entries)
        for _, _, place, i in sorted(entries)[: max(before, floor(sparsity * len(entries)))]:
            gone[NAMES[place]][i] = True
    return torch.tensor([each for name in NAMES for each in gone[name]])


def of_group(pruned: Pruned, group: list[str]) -> tuple[int, int]:
    """Return how many of the weights of a group are pruned, and how many there are."""
    masks = [pruned.parameters[name].mask for name in group]
    return sum(int((mask == PRUNED).sum()) for mask in masks), sum(len(mask) for mask in masks)


# ------------------------------------------------------------------------------ against a sort


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("levels", [3, None])
def test_the_smallest_of_each_group_go_at_every_split(scope: str, levels: int | None) -> None:
    parameters = drawn(SHAPES, 0, levels)
    for sparsity in SPARSITIES:
        expected = reference(parameters, SCOPES[scope], sparsity)
        for split, world in LAYOUTS:
            found = prune(parameters, SHAPES, sparsity, split=split, world=world, **scope_config(scope))
            assert torch.equal(whole(found.parameters), expected), f"{sparsity} at {split}, {world} ranks"
            for group in SCOPES[scope]:
                count, size = of_group(found, group)
                assert count == floor(sparsity * size)
            assert found.structure.masked_at(sparsity) == found.count


@given(st.integers(0, 2**20), st.sampled_from(list(SPLITS)), st.integers(1, 6), st.data())
@settings(max_examples=40)
def test_on_a_ladder_masks_grow_while_weights_change(seed: int, split: str, world: int, data: st.DataObject) -> None:
    scope = data.draw(st.sampled_from(list(SCOPES)))
    rungs = sorted(data.draw(st.lists(st.fractions(0, Fraction(99, 100), max_denominator=100), max_size=4)))
    parameters = drawn(SHAPES, seed, data.draw(st.sampled_from([None, 2])))
    for rung in rungs:
        expected = reference(parameters, SCOPES[scope], rung)
        found = prune(parameters, SHAPES, rung, split=split, world=world, **scope_config(scope))
        assert torch.equal(whole(found.parameters), expected)
        assert found.count == found.structure.masked_at(rung)
        parameters = changed(found.parameters, seed)


def test_what_is_sparser_than_asked_stays() -> None:
    parameters = drawn(SHAPES, 1)
    parameters[NAMES[1]].mask[:60] = PRUNED
    parameters = changed(parameters, 1)
    found = prune(parameters, SHAPES, Fraction("0.1"), split="3", world=3)
    assert found.count == 60 > found.structure.masked_at(Fraction("0.1"))
    found = prune(parameters, SHAPES, Fraction("0.1"), scope="tensor", split="3", world=3)
    assert torch.equal(whole(found.parameters), reference(parameters, SCOPES["tensor"], Fraction("0.1")))


@pytest.mark.parametrize("scope", SCOPES)
def test_with_a_sample_the_same_goes(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups of 80 weights on a sample is asked for; those below go along without."""
    parameters = drawn(SHAPES, 2, 40)
    monkeypatch.setattr(select, "_SAMPLED_FROM", 80)
    for split, world in [("2", 1), ("3", 2), ("0", 2)]:
        found = prune(parameters, SHAPES, Fraction("0.6"), split=split, world=world, **scope_config(scope))
        assert torch.equal(whole(found.parameters), reference(parameters, SCOPES[scope], Fraction("0.6")))


# ------------------------------------------------------------------------------ scores

OTHERS: dict[str, Callable[[Parameters, str], Tensor]] = {
    "taylor": lambda parameters, name: (parameters[name].weights * parameters[name].gradient).abs(),
    "movement": lambda parameters, name: parameters[name].state,  # type: ignore[dict-item,return-value]
    "tests.unit.test_scores:SmallButMoving": lambda parameters, name: (
        parameters[name].weights.abs() + 0.1 * parameters[name].gradient.abs()  # type: ignore[union-attr]
    ),
}


@pytest.mark.parametrize("score", OTHERS)
def test_other_scores_of_either_sign_decide_in_the_same_way(score: str) -> None:
    parameters, more = drawn(SHAPES, 3, 4), drawn(SHAPES, 4, 4)
    for name, each in parameters.items():
        each.gradient = more[name].weights.flip(0)
        each.state = more[name].weights if score == "movement" else None
    for sparsity in SPARSITIES[1:]:
        expected = reference(parameters, SCOPES["layer"], sparsity, OTHERS[score])
        scores = torch.cat([OTHERS[score](parameters, name) for name in NAMES])
        for split, world in LAYOUTS[:6]:
            found = prune(parameters, SHAPES, sparsity, score, split, world, scope="layer")
            assert torch.equal(whole(found.parameters), expected)
            assert found.threshold == pytest.approx(float(scores[expected].max()), rel=1e-7)


def test_the_threshold_is_the_highest_score_that_went_and_zero_where_none_did() -> None:
    parameters = drawn(SHAPES, 5)
    magnitudes = torch.cat([each.weights.abs() for each in parameters.values()])
    for sparsity in SPARSITIES[1:]:
        found = prune(parameters, SHAPES, sparsity, split="2", world=2)
        assert found.threshold == float(magnitudes[whole(found.parameters)].max())
    assert prune(parameters, SHAPES, Fraction(0)).threshold == 0.0


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_a_nan_is_reported_and_stays(value: float) -> None:
    parameters = drawn(SHAPES, 6)
    places = [0, 50, 98]
    parameters[NAMES[1]].weights[places] = value
    clean = {name: replace(each, weights=each.weights.nan_to_num(nan=math.inf)) for name, each in parameters.items()}
    for split, world in (("2", 1), ("2", 3), ("3", 5), ("ragged", 3)):
        found = prune(parameters, SHAPES, Fraction("0.9"), split=split, world=world)
        assert found.nans == dict.fromkeys(NAMES, 0) | {NAMES[1]: 3}
        assert (found.parameters[NAMES[1]].mask[places] == KEPT).all()
        assert torch.equal(whole(found.parameters), reference(clean, SCOPES["global"], Fraction("0.9")))


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("regexes", "message"),
    [
        (["query", "output", "embeddings"], r"encoder\.layer\.1\.norm\.bias of shape \[7\] is matched by none of"),
        (["layer", "query", "."], r"pruning\.groups: 'query' is no weight's first match; there are e\.g\. embeddings"),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(regexes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(drawn(SHAPES, 0), SHAPES, Fraction("0.5"), scope="groups", groups=regexes)


@pytest.mark.parametrize("name", ["", "unstructure", "2:4:8", "4x", "x4", "2:4 ", "-1x4", "head"])
def test_an_unknown_structure_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"pruning\.structure is '{name}'; allowed: unstructured, N:M, .*neurons"):
        prune(drawn(SHAPES, 0), SHAPES, Fraction("0.5"), structure=name)


def test_a_rank_makes_no_more_room_than_it_has_weights() -> None:
    """Groups are cut at the same time, each with its own interval."""
    weights = torch.randn(100, generator=torch.Generator().manual_seed(0))
    mask = torch.full((100,), KEPT, dtype=torch.int8)
    piece = Slice("a", 0, 100, 20, 60, 0, mask, lambda: weights)
    low, high = 1, 1 << 31
    interval = Elements([piece], Magnitude(), 1 << 24, 1 << 24).split(low, high, 1 << 20)
    assert (interval.held, interval.overfull) == (40, False)
    assert interval.room < 100
