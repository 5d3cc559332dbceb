"""Carries runs out as processes of this machine, several at a time, each behind those whose models it needs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from distprune import dist
from distprune.checkpoints.files import FOLDER
from distprune.errors import LOST, STOPPED, UserError
from distprune.sweeps.spec import Run

_POLL = 0.2  # seconds
_GRACE = 90.0  # seconds that the other ranks have to end by themselves


@dataclass
class Job:
    """A run that is under way: a process for each rank."""

    run: Run
    place: int
    """Which of the places for a run it has."""
    log: Path
    ranks: list[subprocess.Popen[bytes]]
    told: bool = False
    """Whether it was asked to stop."""
    broken_since: float | None = None
    status: int = 0
    """The exit status of the rank that was seen first to end with another one than 0."""

    def kill(self) -> None:
        """End all ranks at once."""
        for each in self.ranks:
            each.kill()

    def stop(self) -> None:
        """Ask all ranks, once, to save and stop."""
        for each in self.ranks if not self.told else ():
            each.send_signal(signal.SIGTERM)
        self.told = True

    def has_ended(self) -> bool:
        """Return whether all ranks have; those that one has left behind by an error are killed after a while."""
        if self.broken_since is None and (broken := [each.returncode for each in self.ranks if each.poll()]):
            self.broken_since, self.status = time.monotonic(), broken[0]
        if self.broken_since is not None and time.monotonic() - self.broken_since > _GRACE:
            self.kill()
        return None not in [each.poll() for each in self.ranks]

    @property
    def has_stopped(self) -> bool:
        """Whether it ended as it was told to, and not by an error of its own."""
        return self.told and (self.status in (STOPPED, LOST) or self.status < 0)


@dataclass
class Outcome:
    """What became of the runs."""

    failed: dict[str, Path] = field(default_factory=dict)
    """Names, and the logs that say why."""
    left: list[str] = field(default_factory=list)
    """Those that need the model of one that failed."""
    stopped: bool = False
    """Whether it was asked to stop."""
    impatient: bool = False
    """Whether it was asked by a second SIGINT."""


def check_room(ranks: int, at_once: int) -> None:
    """Refuse more ranks than GPUs, and a sweep that a launcher has started several times.

    Raises:
        UserError: as said.
    """
    if dist.detect().size > 1:
        raise UserError(f"distprune sweep was started as {dist.detect().size} ranks; allowed: one, which starts them")
    if dist.on_gpu() and ranks * at_once > torch.cuda.device_count():
        raise UserError(
            f"ranks is {ranks} and at_once {at_once}; allowed: together one for each GPU, {torch.cuda.device_count()}"
        )


def carry_out(
    runs: Sequence[Run], output: Path, ranks: int, at_once: int, done: Callable[[Run], None], say: Callable[[str], None]
) -> Outcome:
    """Carry out runs, and go on with the others where one fails.

    A signal (SIGINT, SIGTERM, SIGHUP) is handed on to all ranks: they save and stop, and nothing else is begun. A
    second SIGINT kills them.

    Args:
        runs: each behind those whose models it gets.
        output: the sweep's folder.
        ranks: processes of a run.
        at_once: runs at a time.
        done: is called with each run that has ended well.
        say: is called with what happens.
    """
    waiting, jobs, outcome = list(runs), list[Job](), Outcome()
    with _signals(outcome), _none_left_behind(jobs):
        while waiting or jobs:
            for job in [job for job in jobs if job.has_ended()]:
                jobs.remove(job)
                if job.status == 0:
                    done(job.run)
                elif job.has_stopped:
                    say(f"{job.run.name} has stopped with status {job.status}, and can go on")
                else:
                    outcome.failed[job.run.name] = job.log
                    how = "failed with status" if job.status > 0 else "was killed by signal"
                    say(f"{job.run.name} {how} {abs(job.status)}: {job.log}")
            if outcome.stopped:
                waiting = []
                for job in jobs:
                    job.stop()
                    if outcome.impatient:
                        job.kill()
            _leave_out(waiting, outcome)
            busy = {job.run.name for job in jobs} | {run.name for run in waiting}
            ready = [run for run in waiting if not busy & set(run.models.values())]
            free = [place for place in range(at_once) if place not in {job.place for job in jobs}]
            for run, place in zip(ready, free, strict=False):
                waiting.remove(run)
                say(f"{run.name} {'goes on' if (output / run.name / FOLDER).exists() else 'begins'}")
                jobs.append(_begin(run, output, ranks, at_once, place))
            if jobs:
                time.sleep(_POLL)
    return outcome


def _leave_out(waiting: list[Run], outcome: Outcome) -> None:
    """Take those out that need what failed, or what was left out."""
    for run in list(waiting):
        if set(run.models.values()) & {*outcome.failed, *outcome.left}:
            waiting.remove(run)
            outcome.left.append(run.name)


def _begin(run: Run, output: Path, ranks: int, at_once: int, place: int) -> Job:
    directory = output / run.name
    log = directory.with_name(directory.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "distprune", "train", str(run.config), *run.arguments(output)]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(dist.free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "PYTHONUNBUFFERED": "1", dist.LAUNCHER: "sweep"}
    shared |= _share_of_the_machine(ranks, at_once, place)
    with log.open("ab") as file:
        processes = [
            subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C comes to the sweep, and from there to the ranks once
            )
            for rank in range(ranks)
        ]
    return Job(run, place, log, processes)


def _share_of_the_machine(ranks: int, at_once: int, place: int) -> dict[str, str]:
    """Return the variables that give a run its part of the cores, and of the GPUs where there are any."""
    cores = len(os.sched_getaffinity(0))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (ranks * at_once))))}
    if dist.on_gpu():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        share["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place * ranks : (place + 1) * ranks])
    return share


@contextmanager
def _none_left_behind(jobs: list[Job]) -> Iterator[None]:
    """Kill, in the end, the ranks of jobs that an error has left: they can go on from their checkpoints."""
    try:
        yield
    finally:
        for job in jobs:
            job.kill()


@contextmanager
def _signals(outcome: Outcome) -> Iterator[None]:
    """Note what asks the sweep to stop, within the ``with``."""
    asked: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        outcome.impatient |= number == signal.SIGINT and number in asked  # others come several at once, as in SLURM
        outcome.stopped = True
        asked.add(number)

    heard = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {each: signal.signal(each, note) for each in heard}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
