"""Masks by bits against the plain thing, by machine code and by NumPy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distprune.pruning.keys import CHUNK, HIGHEST_FLOAT, HIGHEST_MAGNITUDE, float_keys, magnitude_keys
from distprune.pruning.masks import KEPT, PRUNED, apply_mask, count_pruned, is_masked, prune_below

KINDS = {
    "fp32": (torch.float32, torch.int32),
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -65504.0]
entries = st.lists(st.tuples(st.sampled_from(SPECIAL), st.booleans()), max_size=80)


def mask_of(pruned: Tensor) -> Tensor:
    return torch.where(pruned, PRUNED, KEPT).to(torch.int8)


@given(entries, st.sampled_from(list(KINDS)))
@pytest.mark.usefixtures("route")
def test_pruned_values_are_plus_zero_and_others_keep_their_bits(entries: list[tuple[float, bool]], kind: str) -> None:
    dtype, bits = KINDS[kind]
    values = torch.tensor([value for value, _ in entries], dtype=dtype)
    pruned = torch.tensor([gone for _, gone in entries], dtype=torch.bool)
    expected = values.view(bits).clone()
    expected[pruned] = 0
    apply_mask(values, mask_of(pruned))
    assert torch.equal(values.view(bits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_of_a_long_slice_is_reached(route: str, dtype: torch.dtype) -> None:
    values = torch.ones(3 * (1 << 16) + 7, dtype=dtype)
    inside = values[2:-3]  # a slice of a flat buffer that starts and ends anywhere
    mask = torch.full((inside.numel(),), KEPT, dtype=torch.int8)
    mask[::3] = PRUNED
    apply_mask(inside, mask)
    assert torch.equal(inside, (mask == KEPT).to(dtype))
    assert values[:2].all()
    assert values[-3:].all(), "its neighbours are not touched"


@pytest.mark.parametrize("back", [1.0, -0.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_value_that_came_back_anywhere_is_seen(dtype: torch.dtype, back: float) -> None:
    values = torch.zeros(2 * (1 << 16) + 3, dtype=dtype)
    mask = torch.full((values.numel(),), PRUNED, dtype=torch.int8)
    assert is_masked(values, mask)
    for place in (0, 1 << 16, -1):
        values[place] = back
        assert not is_masked(values, mask)
        mask[place] = KEPT
        assert is_masked(values, mask), "what is kept may be anything"


@given(entries, st.sampled_from([*SPECIAL[:6], 0.5]), st.integers(-1, 1))
@pytest.mark.usefixtures("route")
def test_what_is_below_a_bound_is_pruned_beside_what_was(
    entries: list[tuple[float, bool]], at: float, beside: int
) -> None:
    scores = torch.tensor([value for value, _ in entries])
    before = mask_of(torch.tensor([gone for _, gone in entries], dtype=torch.bool))
    for of, score, highest, place in (
        (magnitude_keys, scores.abs(), HIGHEST_MAGNITUDE, abs(at)),
        (float_keys, scores, HIGHEST_FLOAT, at),
    ):
        bound = int(of(torch.tensor([place]))) + beside
        expected = before.clone()
        expected[of(score) < bound] = PRUNED
        mask, keys = before.clone(), of(scores)
        assert prune_below(mask, keys, bound, highest) == int(scores.isnan().sum())
        assert torch.equal(mask, expected)
        assert torch.equal(keys, of(scores))


def test_a_long_slice_is_pruned_to_its_ends_and_not_beyond(route: str) -> None:
    weights = torch.full((CHUNK + 100,), 0.5)
    keys = magnitude_keys(weights)[5:-7]
    whole = torch.full((CHUNK + 100,), KEPT, dtype=torch.int8)
    assert prune_below(whole[5:-7], keys, int(keys[0]) + 1, HIGHEST_MAGNITUDE) == 0
    assert (whole == KEPT).nonzero().view(-1).tolist() == [*range(5), *range(CHUNK + 93, CHUNK + 100)]
    assert count_pruned(whole) == CHUNK + 88
    assert prune_below(whole, magnitude_keys(weights), -1, int(keys[0]) - 1) == CHUNK + 100
    assert count_pruned(whole) == CHUNK + 88, "nothing is below -1"


def test_an_empty_mask_has_nothing_pruned(route: str) -> None:
    empty = torch.empty(0, dtype=torch.int8)
    assert count_pruned(empty) == 0
    assert prune_below(empty, torch.empty(0, dtype=torch.int32), 5, 5) == 0
