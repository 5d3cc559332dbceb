"""Each score against a plain formula, over simulated ranks where it asks for something of them."""

import math
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distprune.errors import UserError
from distprune.plugins import hashes_of_modules
from distprune.pruning.keys import HIGHEST_FLOAT, HIGHEST_MAGNITUDE
from distprune.pruning.masks import KEPT, MAGNITUDE
from distprune.pruning.scores import (
    SCORES,
    Movement,
    NormalizedMagnitude,
    OptimalBrainSurgeon,
    PositiveScore,
    Score,
    build_score,
    try_out,
)
from distprune.pruning.slices import Part, Slice
from tests.unit.simulated import answer
from tests.unit.structures.harness import LAYOUTS, SPLITS, Parameters, Shapes, dense, drawn, slices_of

SPECIAL = [0.0, -0.0, 1.5, -1.5, 2.0**-149, -(2.0**-130), 3e38, -3e38, math.inf, -math.inf]


class SmallButMoving(Score):
    """The example of docs/extending.md: |w| plus a tenth of what the last step would change."""

    needs_gradient = True

    def scores(self, part: Part) -> Tensor:
        moving = torch.zeros_like(part.weights) if part.gradient is None else part.gradient.to(part.weights)
        return part.weights.abs() + 0.1 * moving.abs()


def part_of(weights: Tensor, gradient: Tensor | None = None, state: Tensor | None = None, first: int = 0) -> Part:
    return Part("w", first, weights, gradient, state, torch.full((len(weights),), KEPT).char())


def fp32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def prepared(name: str) -> Score:
    score = build_score(name, 3)
    if isinstance(score, NormalizedMagnitude):
        score._norms = {"w": 0.75}
    if isinstance(score, OptimalBrainSurgeon):
        score._diagonals = {"w": (0, torch.tensor(0.75).expand(1 << 40))}
    return score


# ------------------------------------------------------------------------------ formulas

FORMULAS: dict[str, Callable[[float, float, float], float]] = {
    "magnitude": lambda w, g, s: abs(w),
    "normalized_magnitude": lambda w, g, s: abs(w) / 0.75,
    "taylor": lambda w, g, s: abs(w * g),
    "movement": lambda w, g, s: s,
}
small = st.floats(-8, 8, width=32)


@pytest.mark.parametrize("name", FORMULAS)
@given(st.lists(st.tuples(small, small, small), min_size=1, max_size=20), st.booleans())
def test_scores_are_those_of_the_formula(name: str, entries: list[tuple[float, float, float]], half: bool) -> None:
    weights, gradients, states = torch.tensor(entries).T.contiguous()
    gradients = gradients.bfloat16() if half else gradients
    part = part_of(weights, gradients, states)
    found = prepared(name).scores(part)
    values = zip(weights.tolist(), gradients.float().tolist(), states.tolist(), strict=True)
    expected = [fp32(FORMULAS[name](*each)) for each in values]
    assert found.dtype == torch.float32
    assert found.tolist() == expected


@pytest.mark.parametrize("name", SCORES)
def test_keys_are_in_the_scores_order_and_value_gives_the_score_back(name: str) -> None:
    weights = torch.tensor([*SPECIAL, *torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()])
    part = part_of(weights, torch.full_like(weights, 0.5), -weights, first=2**33)
    score = prepared(name)
    scores, keys = score.scores(part), score.keys(part)
    keys = keys & MAGNITUDE if keys.dtype == torch.int32 else keys
    assert torch.equal(scores[keys.sort(stable=True).indices], scores.sort().values)
    assert (keys >= 0).all()
    assert (keys <= score.highest).all()
    assert score.highest < 2**score.bits - 1
    assert [score.value(key) for key in keys.tolist()] == pytest.approx(scores.tolist(), rel=2.0**-24, abs=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_nan_has_a_key_above_the_highest(name: str) -> None:
    weights = torch.tensor([1.0, math.nan, -math.nan, math.inf])
    part = part_of(weights, torch.ones(4), weights)
    score = prepared(name)
    keys = score.keys(part)
    keys = keys & MAGNITUDE if keys.dtype == torch.int32 else keys
    assert (keys > score.highest).tolist() == [False, True, True, False]
    assert score.highest == (HIGHEST_FLOAT if name == "movement" else HIGHEST_MAGNITUDE)


@pytest.mark.parametrize("name", [name for name in SCORES if SCORES[name].samples])
def test_scores_that_are_sampled_have_signed_keys_and_zero_for_zero(name: str) -> None:
    part = part_of(torch.tensor([0.0, -0.0, 2.0]))
    keys = prepared(name).keys(part)
    assert keys.dtype == torch.int32
    assert ((keys & MAGNITUDE) == 0).tolist() == [True, True, False]


def test_without_a_gradient_nothing_matters_to_taylor_and_movement() -> None:
    weights, state = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -0.5])
    assert build_score("taylor", 0).scores(part_of(weights)).tolist() == [0.0, 0.0]
    build_score("movement", 0).observe(part_of(weights, None, state))
    assert state.tolist() == [0.5, -0.5]


def test_movement_adds_up_weight_times_gradient_in_place() -> None:
    state = torch.zeros(6)
    score = Movement()
    expected = [0.0] * 4
    for step in range(3):
        weights = torch.tensor([1.0, -2.0, 0.0, 4.0]) + step
        gradient = torch.tensor([0.5, 0.25, 8.0, -1.0]) * (step + 1)
        score.observe(part_of(weights, gradient.bfloat16(), state[1:5]))
        expected = [s - w * g for s, w, g in zip(expected, weights.tolist(), gradient.tolist(), strict=True)]
    assert state.tolist() == [0.0, *expected, 0.0]
    assert (score.needs_gradient, score.accumulates) == (True, True)
    assert score.scores(part_of(weights, None, state)) is state


# ------------------------------------------------------------------------------ norms over ranks

SHAPES: Shapes = {"a": (7, 9), "b": (31, 5), "zero": (3, 4), "tiny": (4, 4), "large": (5, 6), "one": (1, 1)}


def parameters() -> Parameters:
    drawn_ones = drawn(SHAPES, 0)
    factors = {"a": 1.0, "b": 0.01, "zero": 0.0, "tiny": 1e-37, "large": 1e37, "one": 3.0}
    return dense({name: each.weights * factors[name] for name, each in drawn_ones.items()})


def norms(given: Parameters, split: str, world: int, shapes: Shapes = SHAPES) -> dict[str, float]:
    sizes = {name: len(each.weights) for name, each in given.items()}
    ranks = slices_of(given, shapes, SPLITS[split](sizes, world))
    scores = [NormalizedMagnitude() for _ in ranks]
    answer([score.prepare(slices, sizes) for score, slices in zip(scores, ranks, strict=True)])
    assert all(score._norms == scores[0]._norms for score in scores)
    return scores[0]._norms


def test_norms_are_the_same_bits_however_the_weights_are_cut_up() -> None:
    expected = norms(parameters(), "2", 1)
    for name, each in parameters().items():
        rms = float(each.weights.double().square().mean().sqrt())
        assert expected[name] == pytest.approx(rms, rel=1e-7), name
    for split, world in [*LAYOUTS, ("ragged", 40), ("3", 70)]:
        assert norms(parameters(), split, world) == expected


def test_norms_of_a_thousand_cuts_are_the_same_bits() -> None:
    given = {"a": dense({"a": torch.randn(20_000, generator=torch.Generator().manual_seed(1))})["a"]}
    found = [norms(given, *layout, shapes={"a": (100, 200)}) for layout in (("2", 1), ("2", 1000), ("ragged", 300))]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_does_not_disturb_other_matrices(value: float) -> None:
    given = parameters()
    given["a"].weights[5] = value
    found = norms(given, "3", 3)
    expected = norms(parameters(), "2", 1)
    assert {name: norm for name, norm in found.items() if name != "a"} == {
        name: norm for name, norm in expected.items() if name != "a"
    }
    normalized = NormalizedMagnitude()
    normalized._norms = {"w": found["a"]}
    scores = normalized.scores(part_of(given["a"].weights))
    assert scores.isnan().nonzero().tolist() == [[5]], "what is refused tells where it is"


def test_a_matrix_of_zeros_has_scores_of_zero() -> None:
    normalized = NormalizedMagnitude()
    normalized._norms = {"w": norms(parameters(), "2", 2)["zero"]}
    assert normalized.scores(part_of(torch.zeros(3))).tolist() == [0.0] * 3


# ------------------------------------------------------------------------------ random


def random_keys(seed: int, first: int, count: int) -> list[int]:
    found: list[int] = build_score("random", seed).keys(part_of(torch.ones(count), first=first)).tolist()
    return found


def splitmix(seed: int, index: int) -> int:
    """Return the upper 30 bits of SplitMix64, in Python's integers."""
    mixed = (index + (seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) >> 34


@given(st.integers(0, 2**40), st.integers(0, 2**45), st.integers(1, 9))
@settings(max_examples=50)
def test_random_is_a_hash_of_seed_and_index_in_any_split(seed: int, first: int, count: int) -> None:
    assert random_keys(seed, first, count) == [splitmix(seed, first + i) for i in range(count)]


def test_random_is_about_uniform_and_another_for_another_seed() -> None:
    by_seed = [torch.tensor(random_keys(seed, 0, 160_000)) for seed in (0, 1, 42)]
    for keys in by_seed:
        counts = torch.bincount(keys >> 26, minlength=16)
        assert len(counts) == 16
        assert ((counts > 9_500) & (counts < 10_500)).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert float((by_seed[first] < by_seed[second]).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((by_seed[0][1:] < by_seed[0][:-1]).float().mean()) == pytest.approx(0.5, abs=0.01)


# ------------------------------------------------------------------------------ by name


def test_every_score_is_built_by_its_name_with_the_seed() -> None:
    for name, kind in SCORES.items():
        score = build_score(name, 7)
        assert (type(score), score.seed) == (kind, 7)


class Broken(Score):
    needs_gradient = True

    def scores(self, part: Part) -> Tensor:
        return part.weight.abs() * part.gradient  # type: ignore[attr-defined, no-any-return]


class Half(Score):
    def scores(self, part: Part) -> Tensor:
        return part.weights.bfloat16()


class Whole(Score):
    def scores(self, part: Part) -> Tensor:
        return part.weights.abs()


def test_a_score_of_another_package_is_tried_before_a_run_begins() -> None:
    values = torch.arange(20.0)
    each = Slice("w", 5, 25, 5, 25, 100, torch.full((20,), KEPT, dtype=torch.int8), lambda: values)
    for score, said in (
        (Broken(0), "Broken.scores fails for w: AttributeError.*weight"),
        (Half(0), "Half.scores gave"),
    ):
        with pytest.raises(UserError, match=said):
            try_out(score, [each])
    try_out(Whole(0), [each])
    try_out(Half(0), [])
    assert torch.equal(values, torch.arange(20.0))


@pytest.mark.parametrize(
    ("base", "scores", "said"),
    [
        (PositiveScore, lambda weights: -weights.abs(), "is negative; allowed in a PositiveScore: at least 0"),
        (Score, lambda weights: weights.abs_(), "changes part.weights; allowed: a tensor of its own"),
        (Score, lambda weights: weights / weights.norm(), "depends on which weights it is given at once; allowed: of"),
    ],
)
def test_a_score_by_which_other_weights_would_go_is_refused(base: Any, scores: Any, said: str) -> None:
    values = -torch.arange(20.0) - 1
    each = Slice("w", 5, 25, 5, 25, 100, torch.full((20,), KEPT, dtype=torch.int8), lambda: values)
    kind = type("Mine", (base,), {"scores": lambda self, part: scores(part.weights)})
    with pytest.raises(UserError, match=rf"^Mine\.scores {said}"):
        try_out(kind(), [each])
    assert torch.equal(values, -torch.arange(20.0) - 1)


def test_a_score_that_is_a_view_of_one_number_is_as_good_as_any() -> None:
    kind = type("Flat", (PositiveScore,), {"scores": lambda self, part: torch.ones(1).expand_as(part.weights)})
    assert kind().keys(part_of(torch.ones(3))).unique().numel() == 1


def test_modules_are_compared_where_they_are_imported() -> None:
    assert hashes_of_modules("text_classification", "never_imported:Score", "builtins:int") == {}
    mine = sha256(Path(__file__).read_bytes()).hexdigest()
    assert hashes_of_modules(name := f"{__name__}:Whole") == {name: mine}


class WithoutYield(Whole):
    def prepare(self, slices: Any, sizes: Any) -> Any:
        self.seen = len(slices)


def test_what_is_no_exchange_is_refused_before_a_run_begins() -> None:
    with pytest.raises(UserError, match=r":WithoutYield\.prepare is no exchange; allowed: a method with `yield from`"):
        build_score(f"{__name__}:WithoutYield", 7)


def test_a_score_of_another_package_is_built_by_its_path() -> None:
    score = build_score(f"{__name__}:SmallButMoving", 7)
    assert (type(score).__name__, score.seed) == ("SmallButMoving", 7)
    assert score.scores(part_of(torch.tensor([-1.0]), torch.tensor([-5.0]))).tolist() == [1.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "magnitud",
            r"'magnitud' is unknown \(did you mean 'magnitude'\?\); allowed: magnitude, .*obs, module:Class",
        ),
        ("", "is unknown"),
        (":Score", "is unknown"),
        (".scores:Score", "is unknown"),
        ("math:pi", "pruning.score is 'math:pi'; allowed: "),
        ("distprune.pruning.scores:Score", "which lacks scores; allowed: "),
        ("builtins:int", "allowed: .* of a subclass of distprune.pruning.scores.Score"),
        (f"{__name__}:Missing", "cannot be imported: .*Missing"),
        ("no_such_module:Score", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_what_is_no_score_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_score(name, 0)


@pytest.mark.parametrize(
    ("scores", "given"),
    [
        (lambda part: part.weights.double(), r"torch.float64 of shape \[3\]"),
        (lambda part: part.weights[:2], r"torch.float32 of shape \[2\]"),
    ],
)
@pytest.mark.parametrize("base", [Score, PositiveScore])
def test_a_score_of_another_kind_of_numbers_is_named(scores: Any, given: str, base: Any) -> None:
    kind = type("Mine", (base,), {"scores": lambda self, part: scores(part)})
    with pytest.raises(
        UserError, match=rf"Mine.scores gave {given} on cpu for .*; allowed: torch.float32 of shape \[3\]"
    ):
        kind().keys(part_of(torch.ones(3)))
