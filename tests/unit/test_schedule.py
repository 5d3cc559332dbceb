from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.config import PruningConfig, RegrowthConfig
from distprune.errors import UserError
from distprune.pruning.schedule import cubic, regrowths, sparsity_ladder

THIRTY = {"initial": 0.7, "start": "2 epochs", "end": "26 epochs", "every": "4 epochs"}


@pytest.mark.parametrize(
    ("sparsity", "printed"),
    [
        (0.8, ["70", "74.2", "77.0", "78.8", "79.6", "79.95", "80"]),
        (0.9, ["70", "78.4", "84.1", "87.5", "89.3", "89.9", "90"]),
        (0.97, ["70", "81.4", "89.0", "93.6", "96.0", "96.9", "97"]),
    ],
)
def test_obert_ladders_of_thirty_epochs(sparsity: float, printed: list[str]) -> None:
    """As printed in the oBERT ladders."""
    ladder = sparsity_ladder(PruningConfig(sparsity, **THIRTY), 1000, 30_000)
    assert list(ladder) == [2000, 6000, 10_000, 14_000, 18_000, 22_000, 26_000]
    for value, text in zip(ladder.values(), printed, strict=True):
        digits = len(text.partition(".")[2])
        assert f"{float(100 * value):.{digits}f}" == text


def test_ten_epoch_recipe_prunes_twice_an_epoch_from_two_to_eight() -> None:
    config = PruningConfig(0.9, 0.7, "2 epochs", "8 epochs", "0.5 epochs")
    ladder = sparsity_ladder(config, 1000, 10_000)
    assert list(ladder) == list(range(2000, 8001, 500))


@pytest.mark.parametrize(
    ("sparsity", "percent"),
    [
        (0.8, [70, 72.297, 74.213, 75.781, 77.037, 78.015, 78.75, 79.277, 79.630, 79.844, 79.954, 79.994, 80]),
        (0.9, [70, 74.595, 78.426, 81.563, 84.074, 86.030, 87.5, 88.553, 89.259, 89.688, 89.907, 89.988, 90]),
        (0.97, [70, 76.203, 81.375, 85.609, 89.0, 91.641, 93.625, 95.047, 96.0, 96.578, 96.875, 96.984, 97]),
    ],
)
def test_ten_epoch_ladders_at_every_half_epoch(sparsity: float, percent: list[float]) -> None:
    """The recipe's formula (reference A2) worked out by hand, rounded to three decimals."""
    ladder = sparsity_ladder(PruningConfig(sparsity, 0.7, "2 epochs", "8 epochs", "0.5 epochs"), 1000, 10_000)
    assert [float(100 * value) for value in ladder.values()] == pytest.approx(percent, abs=6e-4)


def test_last_sparsity_is_the_decimal_as_written() -> None:
    config = PruningConfig(0.29, 0.07, "0 steps", "3 steps", "1 steps")
    ladder = sparsity_ladder(config, 10, 4)
    assert ladder[0] == Fraction(7, 100)
    assert floor(ladder[3] * 100) == 29  # floor(0.29 * 100) is 28


def test_a_last_pruning_happens_at_the_end_where_every_does_not_divide() -> None:
    ladder = sparsity_ladder(PruningConfig(0.8, 0.5, "0", "1 epochs", "0.4 epochs"), 10, 20)
    assert list(ladder) == [0, 4, 8, 10]
    assert ladder[8] == cubic(Fraction(4, 5), Fraction(1, 2), Fraction(4, 5))
    assert ladder[10] == Fraction(4, 5)


def test_of_prunings_on_one_step_the_last_counts() -> None:
    ladder = sparsity_ladder(PruningConfig(0.8, 0.5, "0", "1.2 epochs", "0.5 epochs"), 2, 4)
    assert list(ladder) == [0, 1, 2]
    assert ladder[1] == cubic(Fraction(5, 12), Fraction(1, 2), Fraction(4, 5))
    assert ladder[2] == Fraction(4, 5), "2.0 and the end, 2.4, round to step 2"


def test_prunings_are_a_step_apart_at_least() -> None:
    often, each = (
        sparsity_ladder(PruningConfig(0.8, 0.5, "1", "9", every), 100, 1000) for every in ("1e-9", "1 steps")
    )
    assert often == each
    assert len(each) == 801


def test_a_pruning_to_nothing_is_left_out() -> None:
    ladder = sparsity_ladder(PruningConfig(0.8, 0.0, "0", "1 epochs", "0.5 epochs"), 10, 20)
    assert ladder == {5: Fraction(7, 10), 10: Fraction(4, 5)}


def test_start_equal_to_end_is_one_pruning() -> None:
    assert sparsity_ladder(PruningConfig(0.8, 0.5, "1", "1", "1"), 10, 20) == {10: Fraction(4, 5)}


def test_dense_runs_have_no_ladder_whatever_the_times() -> None:
    assert sparsity_ladder(PruningConfig(0.0, start="99", end="1", every="nonsense"), 10, 20) == {}


@given(
    st.decimals("0.01", "0.99", places=2),
    st.integers(0, 100),
    st.integers(0, 60),
    st.integers(0, 60),
    st.decimals("0.05", "9", places=2),
    st.integers(1, 30),
)
def test_ladder_rises_from_initial_to_exactly_the_target(sparsity, percent, start, length, every, steps_per_epoch):
    initial = round(float(sparsity) * percent / 100, 4)
    config = PruningConfig(float(sparsity), initial, f"{start} steps", f"{start + length} steps", f"{every} epochs")
    ladder = sparsity_ladder(config, steps_per_epoch, start + length + 1)
    values = list(ladder.values())
    assert list(ladder) == sorted(ladder)
    assert values == sorted(values)
    assert list(ladder)[-1] == start + length
    assert values[-1] == Fraction(str(sparsity))
    if Fraction(every) * steps_per_epoch >= 1 and length > 0:
        assert ladder.get(start, 0) == Fraction(str(initial))


@given(st.fractions(0, 1), st.fractions(0, 1), st.fractions(0, 1))
def test_cubic_is_the_librarys_formula(x, initial, final) -> None:
    assert cubic(x, initial, final) == initial + (final - initial) * (1 - (1 - x) ** 3)  # paper.md A4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start": "5"}, r"pruning\.start is '5'; allowed: up to pruning\.end, '4 epochs'"),
        ({"end": "400 steps", "start": "4 epochs", "every": "0"}, r"pruning\.every is '0'"),
        ({"end": "5 epochs"}, r"pruning\.end is '5 epochs', step 500 of 500"),
        ({"start": "100 steps", "end": "0.5 epochs"}, r"pruning\.start is '100 steps'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(keys: dict[str, str], message: str) -> None:
    times = {"start": "2", "end": "4 epochs", "every": "1"} | keys
    with pytest.raises(UserError, match=message):
        sparsity_ladder(PruningConfig(0.8, 0.5, **times), 100, 500)


def test_the_step_before_the_last_may_still_prune() -> None:
    ladder = sparsity_ladder(PruningConfig(0.8, 0.5, "2", "499 steps", "1"), 100, 500)
    assert max(ladder) == 499


def test_regrown_parts_fall_by_a_cosine_to_a_hundredth() -> None:
    parts = regrowths(RegrowthConfig(0.5, "100 steps"), 93, 1000)
    assert list(parts) == list(range(100, 1000, 100))
    assert parts[500] == pytest.approx((0.5 + 0.005) / 2, abs=1e-9)
    assert parts[100] == pytest.approx(0.005 + 0.495 * (1 + 0.9510565163) / 2, abs=1e-9)
    assert parts[900] == pytest.approx(0.005 + 0.495 * (1 - 0.9510565163) / 2, abs=1e-9)
    assert list(regrowths(RegrowthConfig(0.5, "0.5 epochs"), 3, 9)) == [2, 3, 5, 6, 8]
    assert list(regrowths(RegrowthConfig(0.5, "0.1 epochs"), 3, 4)) == [1, 2, 3]


def test_a_regrowth_that_never_comes_is_refused() -> None:
    with pytest.raises(UserError, match=r"regrowth\.every is '100 steps', and the run has 100 steps, so that nothing"):
        regrowths(RegrowthConfig(0.5, "100 steps"), 10, 100)
    assert list(regrowths(RegrowthConfig(0.5, "100 steps"), 10, 101)) == [100]


def test_nothing_is_regrown_unless_asked_for() -> None:
    assert regrowths(RegrowthConfig(), 93, 1000) == {}
