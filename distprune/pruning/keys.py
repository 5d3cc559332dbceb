"""Scores as integers of the same order."""

from ctypes import byref, c_int64

import numpy as np
import torch
from torch import Tensor

from distprune.pruning import native
from distprune.pruning.masks import MAGNITUDE

CHUNK = 1 << 18
"""Elements of a pass at a time on a CPU: smaller ones cost more calls, larger ones leave its caches."""
_GPU_CHUNK = 1 << 24

MAGNITUDE_BITS = 31
FLOAT_BITS = 33
HIGHEST_MAGNITUDE = 0x7F800000
"""Infinity's key; those above are NaN's."""
HIGHEST_FLOAT = HIGHEST_MAGNITUDE + (1 << 31)


def chunk_of(device: torch.device) -> int:
    """Return the elements of a pass at a time: more on a GPU, where each piece costs the starts of some kernels."""
    return CHUNK if device.type == "cpu" else _GPU_CHUNK


def magnitude_keys(scores: Tensor) -> Tensor:
    """Return a view of floats as integers whose lower 31 bits are ordered as their magnitudes are.

    They are 0 for 0.0, 2**31 - 2**23 for infinity, and more for NaN. The sign bit stays, and does not count in a key:
    nothing has to be written, and the passes over all weights read just these.

    Args:
        scores: fp32, shape [n], contiguous.

    Returns:
        int32, shape [n].
    """
    return scores.view(torch.int32)


def float_keys(scores: Tensor) -> Tensor:
    """Return the order of floats of either sign as integers, at least 0 and less than 2**32; -0.0 is 0.0, NaN the last.

    Args:
        scores: fp32, shape [n].

    Returns:
        int64, shape [n].
    """
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & MAGNITUDE)).long() + (1 << 31)


def key_magnitude(key: int) -> float:
    """Return the magnitude that has this key."""
    return float(torch.tensor(key, dtype=torch.int32).view(torch.float32))


def key_float(key: int) -> float:
    """Return the score that has this key, of `float_keys`."""
    bits = key - (1 << 31)
    return float(torch.tensor(bits if bits >= 0 else bits ^ MAGNITUDE, dtype=torch.int32).view(torch.float32))


def ranked(keys: Tensor, mask: Tensor) -> Tensor:
    """Return 0 where a weight is pruned, and one more than the key elsewhere, so that the pruned ones come first.

    Args:
        keys: int32 (the sign bit does not count) or int64, shape [n]. int32 keys are at most infinity's.
        mask: int8, shape [n].
    """
    if keys.dtype == torch.int32:
        keys = (keys & MAGNITUDE).clamp_(max=MAGNITUDE - 1)  # a NaN may have all bits set
    return (keys + 1).bitwise_and_(mask)


BLOCK = 32
"""How many keys an interval takes in at once: it wants room for so many more than it may come to hold."""


class Interval:
    """Collects keys that lie in an interval, and counts those below it. The keys are int32; sign bits do not count."""

    def __init__(self, low: int, high: int, room: int, device: torch.device):
        """Begin with no keys.

        Args:
            low: the first key inside, at least 0.
            high: the first above, at most 2**31.
            room: how many it may hold.
            device: of the keys.
        """
        self.low, self.last, self.room = low, high - 1, room
        self.below = 0
        self.held = 0
        self._keys = torch.empty(room, dtype=torch.int32, device=device)
        self._indices = torch.empty(room, dtype=torch.int64, device=device)

    @property
    def keys(self) -> Tensor:
        """The keys inside, int32."""
        return self._keys[: self.held]

    @property
    def indices(self) -> Tensor:
        """Their global indices, int64."""
        return self._indices[: self.held]

    @property
    def overfull(self) -> bool:
        """Whether there were more than there is room for; the rest was not looked at then."""
        return self.held > self.room

    def add(self, keys: Tensor, first_index: int) -> None:
        """Look at consecutive keys, shape [n], the first of this global index."""
        if self.overfull:
            return
        library = native.library() if keys.device.type == "cpu" else None
        if library is not None:
            held = c_int64(self.held)
            outputs = (native.address(self._keys), native.address(self._indices), self.room, byref(held))
            bounds = (self.low, self.last, first_index)
            self.below += library.split(native.address(keys), keys.numel(), *bounds, *outputs)
            self.held = held.value
            return
        below, places = (
            _split_by_numpy(keys, self.low, self.last)
            if keys.device.type == "cpu"
            else _split(keys, self.low, self.last)
        )
        self.below += below
        start, self.held = self.held, self.held + places.numel()
        if not self.overfull:
            self._keys[start : self.held] = keys[places] & MAGNITUDE
            self._indices[start : self.held] = places + first_index


def _split_by_numpy(keys: Tensor, low: int, last: int) -> tuple[int, Tensor]:
    """Return how many keys are below, and the places of those inside. torch compares to bool six times slower."""
    values = keys.numpy() & np.int32(MAGNITUDE)
    at_least_low = values >= np.int32(low)
    inside = at_least_low != (values > np.int32(last))
    return values.size - int(np.count_nonzero(at_least_low)), torch.from_numpy(np.flatnonzero(inside))


def _split(keys: Tensor, low: int, last: int) -> tuple[int, Tensor]:
    values = keys & MAGNITUDE
    inside = ((values >= low) & (values <= last)).nonzero().view(-1)
    return int((values < low).sum()), inside


def histogram(keys: Tensor, low: int, shift: int, bins: int) -> Tensor:
    """Count keys by ``(key - low) >> shift``, where that is at least 0 and less than ``bins``.

    Args:
        keys: int32 or int64, at least 0, shape [n].
        low: subtracted from each.
        shift: bits that do not matter.
        bins: how many counts there are.

    Returns:
        int64, shape [bins].
    """
    library = native.library() if keys.device.type == "cpu" and keys.dtype == torch.int32 else None
    if library is not None:
        counts = torch.zeros(bins, dtype=torch.int64)
        library.histogram(native.address(keys), keys.numel(), low, shift, bins, native.address(counts))
        return counts
    digits = ((keys - low) >> shift).clamp_(-1, bins).add_(1)
    return torch.bincount(digits, minlength=bins + 2)[1:-1]
