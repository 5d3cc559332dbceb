"""What tests start as processes of their own."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
Command = list[str | Path]
SLOW_TASK = """
import os, time
from pathlib import Path
from distprune.tasks.text_classification import TextClassification

begun = Path(os.environ["BEGUN"] + "." + os.environ["RANK"])
again = begun.exists()
begun.touch()
if os.environ["RANK"] == "1" and not again:
    time.sleep(120)


class Slow(TextClassification):
    pass
"""
"""A module of the task ``slow:Slow``, whose import takes rank 1 long, once; others wait for it in a collective."""


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, and with some others."""
    launchers = ("SLURM_", "RANK", "WORLD_")
    kept = {name: each for name, each in os.environ.items() if name == "SLURM_CONF" or not name.startswith(launchers)}
    return kept | {"VENV": sys.prefix, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | variables


def start(command: Command, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; of one that takes too long no process is left over."""
    words = [str(part) for part in command]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=REPOSITORY, env=environment(**variables), **options) as process:
        try:
            out, err = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.terminate()  # with which a launcher ends its ranks; killed, it would leave them
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def srun_variables(tasks: int, tmp_path: Path, **others: str) -> list[dict[str, str]]:
    """Return what srun sets for each task on one node, and a PATH with a scontrol."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text("#!/bin/sh\necho localhost\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    slurm = {
        "SLURM_JOB_ID": str(random.randrange(10000)),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost",
        "PATH": f"{scontrol.parent}{os.pathsep}{environment()['PATH']}",
    }
    return [others | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]


class Started:
    """A run in processes of its own, in a session of its own."""

    def __init__(self, command: list[str], log: Path, **variables: str):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment(**variables),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell's background job ignores it, with all that it starts, and no script can trap it then.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def end(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)


def steps(output: Path) -> int:
    """Return how many lines a run has logged."""
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
