"""Signals that ask a run to stop: while it trains, it saves at the end of the step, all ranks together; else it ends.

SIGTERM and SIGINT (Ctrl-C) stop it. SIGUSR1, which SLURM sends ahead of a time limit (``--signal=USR1@SECONDS``), stops
it and has the job queued again. A second Ctrl-C ends the process at once.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from distprune.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEUE = "DISTPRUNE_REQUEUE"
"""Names the file that slurm/train.sbatch looks for: the job is to be queued again."""


class Interrupted(Exception):
    """The run has stopped because it was asked to.

    Args:
        step: optimizer steps that are done.
        saved: those of the newest checkpoint, fewer where the last could not be written; None: there is none.
        requeue: whether the job was asked to be queued again.
        began: steps that were done when this process went on with the run.
    """

    def __init__(self, step: int, saved: int | None, requeue: bool, began: int = 0):
        where = "there" if saved == step else "the beginning" if saved is None else f"step {saved}"
        in_vain = step > began and (saved or 0) <= began
        unless = "; the job is not queued again, as nothing of it could be saved" if requeue and in_vain else ""
        super().__init__(f"stopped after step {step}, as asked; the same command goes on from {where}{unless}")
        self.requeue = requeue and not in_vain
        """Whether the job is to be queued again: not where that would do the same steps once more."""
        self.trained = step > began
        """Whether this process has taken a step."""


class StopRequests:
    """Listens for the signals, within a ``with``; in the main thread."""

    def __init__(self) -> None:
        self.stop = False
        """Whether this process was asked to stop."""
        self.requeue = False
        """Whether it was asked so by SIGUSR1."""
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {each: signal.signal(each, self._handle) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # DeepSpeed's launcher makes a SIGINT and a SIGTERM of one Ctrl-C, so only SIGINT counts.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.requeue |= number == signal.SIGUSR1
        self.stop = True


class EndedAtOnce(BaseException):
    """The process ends as it was asked to outside of training, where there is nothing to save.

    Other ranks hear the signal themselves, or miss this one. Most handlers of errors let it pass.

    Args:
        requeue: whether the job is to be queued again.
    """

    def __init__(self, requeue: bool):
        super().__init__("ended outside of training, as asked; the same command goes on from where the run is")
        self.requeue = requeue


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let SIGINT and SIGUSR1 end this process within a ``with``, where no `StopRequests` listens; in the main thread.

    SIGTERM stays what it is: srun sends it to the ranks that are left where one is lost, which nobody has asked for.

    Raises:
        EndedAtOnce: at one of them.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a library has forked it, and ends it so when its work is done
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise EndedAtOnce(number == signal.SIGUSR1)

    after: dict[signal.Signals, Any] = {each: signal.signal(each, end) for each in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    except EndedAtOnce:
        after = dict.fromkeys(SIGNALS, signal.SIG_IGN)  # launchers may send several: none cuts off what is left to say
        raise
    finally:
        _restore(after)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for each, handler in handlers.items():
        signal.signal(each, handler)


def requeue_job(trained: bool) -> str:
    """Queue this SLURM job again, or leave word for slurm/train.sbatch to do so; return in words what was done.

    Args:
        trained: whether it was stopped in training, behind a step of its own; the script counts the others.

    Raises:
        UserError: where SLURM refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "there is no SLURM job to queue again"
    if REQUEUE in os.environ:
        Path(os.environ[REQUEUE]).write_text("" if trained else "outside of training\n")
        return f"job {job} will be queued again"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"job {job} is not queued again: there is no scontrol; allowed: slurm/train.sbatch") from error
    if done.returncode != 0:
        raise UserError(f"SLURM does not queue job {job} again: {done.stderr.strip()}; allowed: submit it again")
    return f"job {job} is queued again"
