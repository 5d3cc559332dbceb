"""How a sweep carries its runs out, without one."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distprune import dist
from distprune.checkpoints import run_directory
from distprune.commands import sweep as command
from distprune.commands.sweep import run as sweep
from distprune.errors import UserError
from distprune.sweeps import execute
from tests.unit.sweep_files import runs, write_sweep


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_a_sweep_starts_its_ranks_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="was started as 2 ranks; allowed: one, which starts them"):
        sweep(str(file), [], [], dry_run=False, only_table=False)


def test_a_run_that_goes_on_without_its_sweep_is_not_begun_again(file: Path) -> None:
    first = next(each for each in runs(file) if each.method == "dense")
    folder = file.parent / "runs" / first.name
    folder.mkdir(parents=True)
    run_directory.lock(folder)
    with pytest.raises(UserError, match=f"{first.name} is still under way in process {os.getpid()} on"):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    run_directory.unlock(folder)
    assert run_directory.holder_of(folder) is None


class Process:
    """A rank that has ended, once it has been asked ``after`` times."""

    def __init__(self, returncode: int, after: int = 0):
        self.ends_with, self.after, self.returncode = returncode, after, None

    def poll(self) -> int | None:
        self.after -= 1
        self.returncode = self.ends_with if self.after < 0 else None
        return self.returncode


@pytest.mark.parametrize(
    ("told", "ranks", "status", "stopped"),
    [
        (False, [Process(-9, after=2), Process(1)], 1, False),  # rank 0 waited for rank 1, and was killed
        (True, [Process(75), Process(75)], 75, True),
        (True, [Process(-9), Process(-9)], -9, True),
        (True, [Process(2), Process(2)], 2, False),  # a mistake, found after it was told to stop
        (True, [Process(0), Process(0)], 0, False),
    ],
)
def test_a_run_has_the_status_of_the_rank_that_failed_first(
    file: Path, told: bool, ranks: list[Any], status: int, stopped: bool
) -> None:
    job = execute.Job(runs(file)[0], 0, file, ranks, told)
    while not job.has_ended():
        pass
    assert (job.status, job.has_stopped) == (status, stopped)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """Give SIGINT a handler: it is ignored in what a shell has started in the background, and stays so in a sweep."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_only_a_second_ctrl_c_is_impatient() -> None:
    outcome = execute.Outcome()
    with execute._signals(outcome):
        for number, stopped, impatient in (
            (signal.SIGTERM, True, False),
            (signal.SIGINT, True, False),
            (signal.SIGTERM, True, False),
            (signal.SIGINT, True, True),
        ):
            os.kill(os.getpid(), number)
            assert (outcome.stopped, outcome.impatient) == (stopped, impatient)


class Endless:
    """A rank that only a SIGKILL ends."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.told.append(number)

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_second_ctrl_c_kills_what_the_first_has_told_to_stop(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = runs(file)
    rank, said = Endless(), list[str]()

    def say(text: str) -> None:
        said.append(text)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(execute, "_begin", lambda run, *_: execute.Job(run, 0, file, [rank]))  # type: ignore[list-item]
    outcome = execute.carry_out([first, *others], file.parent, 1, 1, lambda run: None, say)
    assert rank.told == [signal.SIGTERM]
    assert said == [f"{first.name} begins", f"{first.name} has stopped with status -9, and can go on"]
    assert (outcome.failed, outcome.left, outcome.impatient) == ({}, [], True)


def test_a_terminal_that_is_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Closed())
    command._say("a")
    command._say("b")


@pytest.mark.parametrize(("given", "devices"), [("", "2,3"), ("4,5,6,7", "6,7")])
def test_a_run_has_its_share_of_gpus_and_cores(monkeypatch: pytest.MonkeyPatch, given: str, devices: str) -> None:
    monkeypatch.setattr(dist, "on_gpu", lambda: True)
    monkeypatch.setattr(execute.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(execute.os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = execute._share_of_the_machine(ranks=2, at_once=2, place=1)
    assert share == {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": devices}
