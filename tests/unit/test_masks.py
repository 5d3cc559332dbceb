"""A mask applied by bits against the plain thing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.pruning.masks import KEPT, PRUNED, apply_mask

KINDS = {
    "fp32": (torch.float32, torch.int32),
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
}
SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-40, -65504.0]


@given(st.lists(st.tuples(st.sampled_from(SPECIAL), st.booleans()), max_size=40), st.sampled_from(list(KINDS)))
def test_pruned_values_are_plus_zero_and_others_keep_their_bits(entries: list[tuple[float, bool]], kind: str) -> None:
    dtype, bits = KINDS[kind]
    values = torch.tensor([value for value, _ in entries], dtype=dtype)
    pruned = torch.tensor([gone for _, gone in entries], dtype=torch.bool)
    expected = values.view(bits).clone()
    expected[pruned] = 0
    apply_mask(values, torch.where(pruned, PRUNED, KEPT).to(torch.int8))
    assert torch.equal(values.view(bits), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_of_a_long_slice_is_reached(dtype: torch.dtype) -> None:
    values = torch.ones(3 * (1 << 16) + 7, dtype=dtype)
    inside = values[2:-3]  # a slice of a flat buffer that starts and ends anywhere
    mask = torch.full((inside.numel(),), KEPT, dtype=torch.int8)
    mask[::3] = PRUNED
    apply_mask(inside, mask)
    assert torch.equal(inside, (mask == KEPT).to(dtype))
    assert values[:2].all()
    assert values[-3:].all(), "its neighbours are not touched"
