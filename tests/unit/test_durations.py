from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.durations import multiples, parse, whole
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


@given(st.fractions(min_value="0.01", max_value=50), st.integers(1, 300))
def test_multiples_are_those_of_the_exact_length(every: Fraction, last: int) -> None:
    nearest = {whole(max(every, Fraction(1)) * number) for number in range(1, last + 1)}
    assert multiples(every, last) == sorted(step for step in nearest if step <= last)


def test_half_epochs_of_an_odd_number_of_steps_meet_each_epochs_end() -> None:
    assert multiples(parse("0.5 epochs", "train.eval_every").exact(25), 75) == [13, 25, 38, 50, 63, 75]
    assert multiples(Fraction(1, 10**12), 3) == [1, 2, 3]
