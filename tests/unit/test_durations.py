from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.durations import parse, whole
from distprune.errors import UserError


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2", 2000),
        ("2 epochs", 2000),
        ("1 epoch", 1000),
        (" 0.1epochs ", 100),
        ("1e-01", 100),
        ("0.0004 epochs", 0),
        ("0.0005 epochs", 1),  # half a step goes up
        ("0.0015 epochs", 2),
        ("0.0025 epochs", 3),
        ("500 steps", 500),
        ("1 step", 1),
        ("0 steps", 0),
    ],
)
def test_steps_of_a_thousand_step_epoch(text: str, steps: int) -> None:
    assert parse(text, "k").steps(1000) == steps


@given(st.decimals(0, 100, places=3), st.integers(1, 10**7))
def test_epochs_are_exact_decimals_and_rounding_is_to_the_nearest_step(epochs, steps_per_epoch) -> None:
    duration = parse(f"{epochs} epochs", "k")
    exact = Fraction(str(epochs)) * steps_per_epoch
    assert duration.exact(steps_per_epoch) == exact
    assert duration.steps(steps_per_epoch) == whole(exact)
    assert -Fraction(1, 2) < whole(exact) - exact <= Fraction(1, 2)


def test_steps_do_not_depend_on_the_epoch() -> None:
    assert parse("7 steps", "k").steps(3) == parse("7 steps", "k").steps(1000) == 7


@pytest.mark.parametrize(
    "text", ["", "two", "-1 epochs", "1 hour", "epochs", "1 2 epochs", "nan", "inf", "1/3", "1_0", "True", "1e999"]
)
def test_other_text_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(UserError, match=r"pruning\.start is .*allowed: a time such as") as caught:
        parse(text, "pruning.start")
    assert repr(text) in str(caught.value)


def test_part_of_a_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"lr\.warmup is '0\.5 steps'; allowed: a whole number of steps"):
        parse("0.5 steps", "lr.warmup")
