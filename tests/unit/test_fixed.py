"""Fixed point against fractions: each value is rounded by itself, and sums stay in int64."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.pruning.fixed import exponent_for, to_fixed

LARGEST = (2 - 2.0**-23) * 2.0**127
values = st.lists(st.floats(-LARGEST, LARGEST, width=32) | st.floats(-8, 8, width=32), min_size=1, max_size=20)


@given(values, st.sampled_from([60, 62]), st.booleans())
def test_values_are_the_nearest_integers_and_sums_of_them_stay_below_the_bound(
    numbers: list[float], bits: int, square: bool
) -> None:
    of = torch.tensor(numbers).double().square() if square else torch.tensor(numbers)
    exponent = exponent_for(float(of.abs().max()), len(numbers), bits)
    expected = [round(Fraction(each) * Fraction(2) ** exponent) for each in of.tolist()]
    assert to_fixed(of, exponent).tolist() == expected
    assert sum(map(abs, expected)) < 2**bits


@given(st.floats(2.0**-149, LARGEST, width=32), st.integers(1, 2**40))
def test_the_most_of_the_largest_terms_is_close_to_the_bound_and_below(largest: float, terms: int) -> None:
    term = int(to_fixed(torch.tensor([largest]), exponent_for(largest, terms)))
    assert (term + 1) * terms >= 2**60
    assert term * terms < 2**62
