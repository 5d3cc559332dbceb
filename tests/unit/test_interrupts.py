"""What a process makes of the signals that reach it."""

import os
import signal
from pathlib import Path

import pytest

from distprune.errors import UserError
from distprune.training.interrupts import SIGNALS, StopRequests, requeue_job


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
    assert requeue_job() == "there is no SLURM job to queue again"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no scontrol; allowed: slurm/train.sbatch"):
        requeue_job()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    with pytest.raises(UserError, match="SLURM does not queue job 7 again: no such job"):
        requeue_job()
    monkeypatch.setenv("DISTPRUNE_REQUEUE", str(tmp_path / "requeue"))
    assert requeue_job() == "job 7 will be queued again"
    assert (tmp_path / "requeue").exists()
