"""Sums that are the same in any order: fixed point in int64.

A float sum depends on how its terms were cut up among ranks, and a mask that is decided by one would too. Here each
term is rounded by itself, to a multiple of a common power of two, and integers are added.
"""

import math

from torch import Tensor


def exponent_for(largest: float, terms: int, bits: int = 62) -> int:
    """Return e such that a sum of terms, none larger than ``largest``, times 2**e stays below 2**bits."""
    return bits - math.frexp(largest)[1] - terms.bit_length()


def to_fixed(values: Tensor, exponent: int) -> Tensor:
    """Return values times 2**exponent, rounded to int64.

    Args:
        values: finite, any shape; fp32 or float64.
        exponent: from `exponent_for`.
    """
    return (values.double() * 2.0**exponent).round().long()
