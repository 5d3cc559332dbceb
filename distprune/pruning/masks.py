"""Masks as bytes that a bitwise AND applies: ``KEPT`` has all bits set, ``PRUNED`` none.

An AND with ``PRUNED`` is +0.0 in any float type, whatever the value was, and with ``KEPT`` the value itself. On a CPU
``masked_fill_`` looks at one element at a time, and the AND is vectorised.
"""

import numpy as np
import torch
from torch import Tensor

from distprune.pruning import native

KEPT, PRUNED = -1, 0
MAGNITUDE = 0x7FFFFFFF
"""The bits of a float, or of an int32 key, that its sign is not."""

_PIECE = 1 << 16
_BITS = {2: torch.int16, 4: torch.int32}


def apply_mask(values: Tensor, mask: Tensor) -> None:
    """Set the pruned values to +0.0, in place.

    Args:
        values: shape [n], fp32, bf16 or fp16, contiguous.
        mask: shape [n], int8, on the same device.
    """
    on_cpu = values.device.type == "cpu"
    library = native.library() if on_cpu else None
    if library is not None:
        function = {2: library.apply_mask_16, 4: library.apply_mask_32}[values.element_size()]
        function(native.address(values), native.address(mask), values.numel())
        return
    bits = values.view(_BITS[values.element_size()])
    size = _PIECE if on_cpu else max(1, values.numel())  # pieces stay in cache while the bytes are widened
    for start in range(0, values.numel(), size):
        bits[start : start + size] &= mask[start : start + size]


def is_masked(values: Tensor, mask: Tensor) -> bool:
    """Return whether every pruned value is +0.0; the arguments are those of `apply_mask`."""
    size = _PIECE if values.device.type == "cpu" else max(1, values.numel())
    for start in range(0, values.numel(), size):
        piece = values[start : start + size]
        wanted = piece.clone()
        apply_mask(wanted, mask[start : start + size])
        bits = _BITS[values.element_size()]  # of floats -0.0 would equal 0.0, and no NaN itself
        if not torch.equal(piece.view(bits), wanted.view(bits)):
            return False
    return True


def prune_below(mask: Tensor, keys: Tensor, bound: int, highest: int) -> int:
    """Mark as pruned, beside those that are, the elements whose key is less than a bound.

    Args:
        mask: shape [n], int8; changed in place.
        keys: shape [n], int32 (the sign bit does not count) or int64, on the same device.
        bound: of the keys' type.
        highest: the highest key that is a number's.

    Returns:
        How many keys are above ``highest``.
    """
    library = native.library() if keys.device.type == "cpu" and keys.dtype == torch.int32 else None
    if library is not None:
        arguments = native.address(mask), native.address(keys), keys.numel(), bound, highest
        return int(library.prune_below(*arguments))
    if keys.dtype == torch.int32:
        keys = keys & MAGNITUDE
    if keys.device.type == "cpu":
        kept = (keys.numpy() >= keys.numpy().dtype.type(bound)).view(np.int8)
        np.negative(kept, out=kept)  # True is 1, KEPT is -1
        np.bitwise_and(mask.numpy(), kept, out=mask.numpy())
    else:
        mask &= -(keys >= bound).to(torch.int8)
    return int((keys > highest).sum())


def count_pruned(mask: Tensor) -> int:
    """Return how many elements of a mask are pruned."""
    kept = np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else int(mask.count_nonzero())
    return mask.numel() - int(kept)
