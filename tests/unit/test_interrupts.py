"""What a process makes of the signals that reach it."""

import os
import signal

import pytest

from distprune.training.interrupts import SIGNALS, StopRequests


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
