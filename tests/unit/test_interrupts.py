"""What a process makes of the signals that reach it."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from distprune.errors import UserError
from distprune.training.interrupts import SIGNALS, EndedAtOnce, Interrupted, StopRequests, ending_at_once, requeue_job


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert (requests.stop, requests.requeue) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)  # as DeepSpeed's launcher makes of the same Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_ahead_of_a_time_limit_asks_for_another_start() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (requests.stop, requests.requeue) == (True, True)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_job_is_queued_again_by_the_script_outside_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTPRUNE_REQUEUE", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert requeue_job(trained=True) == "there is no SLURM job to queue again"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no scontrol; allowed: slurm/train.sbatch"):
        requeue_job(trained=True)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    with pytest.raises(UserError, match="SLURM does not queue job 7 again: no such job"):
        requeue_job(trained=True)
    monkeypatch.setenv("DISTPRUNE_REQUEUE", str(tmp_path / "requeue"))
    for trained in (False, True):
        assert requeue_job(trained) == "job 7 will be queued again"
        assert (tmp_path / "requeue").read_text() == ("" if trained else "outside of training\n")


@pytest.mark.parametrize(
    ("saved", "began", "again"),
    [(100, 40, True), (60, 40, True), (40, 40, False), (None, 0, False), (100, 100, True)],
)
def test_a_job_that_could_save_nothing_is_not_queued_again(saved: int | None, began: int, again: bool) -> None:
    """It would do the same steps again until somebody looks, as on a full disk."""
    interrupted = Interrupted(100, saved, requeue=True, began=began)
    assert interrupted.requeue == again
    assert ("is not queued again" in str(interrupted)) != again


@pytest.fixture
def handlers() -> Iterator[None]:
    """Give the signals back what they did."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "requeue"), [(signal.SIGINT, False), (signal.SIGUSR1, True)])
def test_outside_of_training_the_first_signal_ends_and_the_launchers_next_cuts_nothing_off(
    number: signal.Signals, requeue: bool
) -> None:
    with pytest.raises(EndedAtOnce, match="the same command goes on") as ended, ending_at_once():
        os.kill(os.getpid(), number)
    assert ended.value.requeue == requeue
    for each in SIGNALS:
        os.kill(os.getpid(), each)


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_somebody_swallows_is_heard_when_it_comes_again() -> None:
    def work() -> None:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(EndedAtOnce), ending_at_once():
        work()


def test_the_signal_that_srun_sends_where_a_rank_is_lost_is_no_wish() -> None:
    with ending_at_once():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_nothing_is_left_of_it_behind_a_run_or_in_one() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with ending_at_once():
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGTERM)
        assert requests.stop
    with pytest.raises(ValueError, match="a mistake"), ending_at_once():
        raise ValueError("a mistake")
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_process_that_a_library_has_forked_ends_as_ever() -> None:
    with ending_at_once():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR1
