import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.config import LrConfig
from distprune.errors import UserError
from distprune.training.lr import LrSchedule, lr_schedule

EPOCH = 100


def schedule(epochs: int, **keys) -> LrSchedule:
    return lr_schedule(LrConfig(**keys), EPOCH, epochs * EPOCH)


def at_epochs(schedule: LrSchedule, epochs: int) -> list[float]:
    return [schedule.at(epoch * EPOCH) for epoch in range(epochs + 1)]


def test_gmp_star_repeats_a_two_epoch_schedule() -> None:
    run = schedule(10, peak=2e-4, final=0.0, rewind_every="2 epochs")
    assert run.rewinds == (200, 400, 600, 800)
    assert at_epochs(run, 10) == pytest.approx([2e-4, 1e-4] * 5 + [0.0])
    single = schedule(2, peak=2e-4, final=0.0)
    assert [run.at(step) for step in range(1000)] == pytest.approx([single.at(s) for s in range(200)] * 5)


def test_obert_ten_epochs_rewinds_once_at_epoch_eight() -> None:
    run = schedule(10, peak=8e-5, final=2e-5, rewind_first="8 epochs", rewind_every="8 epochs")
    ladder = [8.0, 7.25, 6.5, 5.75, 5.0, 4.25, 3.5, 2.75, 8.0, 5.0, 2.0]
    assert at_epochs(run, 10) == pytest.approx([value * 1e-5 for value in ladder])
    assert run.at(799) == pytest.approx(2e-5 + 6e-5 / 800)


def test_obert_thirty_epochs_rewinds_at_2_6_to_26() -> None:
    run = schedule(30, peak=5e-5, final=5e-6, rewind_first="2 epochs", rewind_every="4 epochs")
    assert run.rewinds == (200, 600, 1000, 1400, 1800, 2200, 2600)
    ladder = [5.0, 2.75] + [5.0, 3.875, 2.75, 1.625] * 7 + [0.5]
    assert at_epochs(run, 30) == pytest.approx([value * 1e-5 for value in ladder])


def test_warmup_rises_from_zero_and_the_decay_starts_at_its_end() -> None:
    run = schedule(4, peak=1.0, final=0.0, warmup="50 steps", rewind_every="2 epochs")
    assert [run.at(step) for step in (0, 25, 50, 125, 199)] == pytest.approx([0.0, 0.5, 1.0, 0.5, 1 / 150])
    assert [run.at(step) for step in (200, 300)] == pytest.approx([1.0, 0.5])  # no warm-up after a rewind


def test_last_cycle_ends_with_the_run() -> None:
    run = schedule(5, peak=1.0, final=0.2, rewind_every="2 epochs")
    assert run.bounds == (0, 200, 400, 500)
    assert run.at(450) == pytest.approx(0.6)
    assert run.at(500) == pytest.approx(0.2)


def test_rewinds_do_not_drift_where_a_cycle_is_no_whole_number_of_steps() -> None:
    run = lr_schedule(LrConfig(rewind_every="0.1 epochs"), 25, 250)  # 2.5 steps: halves go up
    assert run.rewinds[:4] == (3, 5, 8, 10)
    assert run.rewinds[-1] == 248


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 40), st.integers(0, 5))
def test_rates_stay_between_final_and_peak(steps_per_epoch, epochs, every, warmup) -> None:
    total = steps_per_epoch * epochs
    config = LrConfig(1.0, 0.1, f"{warmup} steps", f"{every} steps")
    if warmup >= every or every > total:
        with pytest.raises(UserError, match=r"lr\.warmup" if every <= total else r"lr\.rewind_every"):
            lr_schedule(config, steps_per_epoch, total)
        return
    run = lr_schedule(config, steps_per_epoch, total)
    assert run.bounds[-1] == total
    for step in range(total + 1):
        assert (0 if step < warmup else 0.1 - 1e-12) <= run.at(step) <= 1.0
    assert all(run.at(step) == 1.0 for step in run.rewinds)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"warmup": "2 epochs", "rewind_every": "2 epochs"}, r"lr\.warmup is '2 epochs', 200 steps"),
        ({"warmup": "4 epochs"}, r"lr\.warmup is '4 epochs', 400 steps"),
        ({"rewind_every": "0.001 epochs"}, r"lr\.rewind_every is '0\.001 epochs'"),
        ({"rewind_every": "2", "rewind_first": "0 steps"}, r"lr\.rewind_first '0 steps'"),
        ({"rewind_every": "5000 steps"}, r"lr\.rewind_every is '5000 steps'.* allowed: at most the run's 400 steps"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(4, **keys)
