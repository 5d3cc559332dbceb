"""Jobs on whatever cluster `sbatch` reaches, when asked for with `launch/test.sh --cluster`."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import REPOSITORY, environment
from tests.distributed.runs import write_task

SBATCH_OPTIONS = shlex.split(os.environ.get("DISTPRUNE_TEST_SBATCH", ""))
"""What this cluster wants of every job, e.g. --partition=test."""
HEAD = shlex.split(os.environ.get("DISTPRUNE_TEST_HEAD", ""))
"""What makes a command run on a machine of the hostfile, e.g. ssh and its name; none: this one is."""
HOSTFILE = os.environ.get("DISTPRUNE_TEST_HOSTFILE")
"""Two machines that pdsh reaches, for the deepspeed CLI."""
NODE = os.environ.get("DISTPRUNE_TEST_NODE")
"""A command that takes ``kill``, ``start``, ``cut`` or ``join`` and a node's name."""


class Job:
    """A submitted job."""

    def __init__(self, number: str, log: Path):
        self.number, self.log = number, log

    def field(self, name: str) -> str:
        """Return one of the fields of ``scontrol show job``."""
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        ).stdout
        return re.search(rf"\b{name}=(\S*)", shown)[1]  # type: ignore[index]

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def nodes(self) -> list[str]:
        names = ["scontrol", "show", "hostnames", self.field("NodeList")]
        return subprocess.run(names, capture_output=True, text=True, check=True).stdout.split()

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{self.field('JobState')}\n{self.said}"
            time.sleep(0.5)

    def end(self, timeout: float = 240) -> str:
        """Wait for the job to end for good; return its state."""
        self.wait_for(lambda: self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), timeout)
        return self.field("JobState")


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Return a function that submits a run; jobs that are left over are cancelled."""
    jobs: list[Job] = []

    def of(task: Path, output: Path, *overrides: str, options: tuple[str, ...] = (), **variables: str) -> Job:
        log = tmp_path / f"job-{len(jobs)}.log"
        job = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", *SBATCH_OPTIONS, *options]
        command = [*job, "slurm/train.sbatch", str(task / "run.yaml"), f"train.output={output}", *overrides]
        variables = {"DISTPRUNE_LOGS": str(tmp_path / "ranks"), "DISTPRUNE_RESTART_WAIT": "40"} | variables
        sent = subprocess.run(command, cwd=REPOSITORY, env=environment(**variables), capture_output=True, text=True)
        assert sent.returncode == 0, sent.stderr
        jobs.append(Job(sent.stdout.strip().partition(";")[0], log))
        return jobs[-1]

    yield of
    for job in jobs:
        subprocess.run(["scancel", job.number], capture_output=True)


@pytest.fixture
def node() -> Iterator[Callable[[str, str], None]]:
    """Return a function that does something to a node; what was done is undone."""
    if NODE is None:
        pytest.skip("DISTPRUNE_TEST_NODE names no command that takes nodes down")
    undo: list[tuple[str, str]] = []

    def do(action: str, name: str) -> None:
        subprocess.run([NODE, action, name], check=True, capture_output=True)
        undo.append(({"kill": "start", "cut": "join"}[action], name))

    yield do
    for action, name in undo:
        subprocess.run([NODE, action, name], check=True, capture_output=True)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small task; its run takes a while."""
    return write_task(tmp_path_factory.mktemp("task"), hardness=0.5)


@pytest.fixture(scope="session")
def whole(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that nothing happened to, on two ranks of this machine."""
    output = tmp_path_factory.mktemp("whole") / "run"
    command = ["launch/local.sh", "-n", "2", str(task / "run.yaml"), f"train.output={output}", *LONG]
    subprocess.run(command, cwd=REPOSITORY, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True)
    return output


LONG = ("train.epochs=60", "checkpoint.steps=5", "train.log_every=1", "train.eval_every=10 epochs")
"""A run of half a minute on a small machine."""
