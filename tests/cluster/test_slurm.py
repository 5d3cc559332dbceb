"""Whole jobs on a real cluster: undisturbed, told to stop, a node that dies, a node that is cut off, a time limit."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.conftest import HEAD, HOSTFILE, LONG, SBATCH_OPTIONS, Job
from tests.distributed.processes import REPOSITORY, SLOW_TASK, environment, steps
from tests.distributed.runs import same_weights, told

Submit = Callable[..., Job]


def test_a_job_on_two_nodes_is_the_run_of_one_machine(submit: Submit, task: Path, tmp_path: Path, whole: Path) -> None:
    job = submit(task, tmp_path / "run", *LONG)
    assert job.end() == "COMPLETED", job.said
    assert f"start 1 of job {job.number} on " in job.said
    assert "accuracy" in job.said.splitlines()[-1]
    logs = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "ranks").rglob("*.log"))
    assert logs == ["rank-0", "rank-1"]
    assert same_weights(whole, tmp_path / "run")
    assert told(tmp_path / "run") == told(whole)


def test_a_job_that_is_told_to_make_room_saves_and_is_queued_again(
    submit: Submit, task: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    job = submit(task, output, *LONG)
    job.wait_for(lambda: steps(output) > 60, 120)
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    job.wait_for(lambda: job.field("Restarts") == "1", 90)
    assert job.end() == "COMPLETED", job.said
    assert f"start 2 of job {job.number} on " in job.said
    assert same_weights(whole, output)
    assert told(output) == told(whole)


def test_a_job_that_is_told_to_make_room_before_its_first_step_is_queued_again_and_counted(
    submit: Submit, task: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    variables = {"PYTHONPATH": str(tmp_path), "BEGUN": str(tmp_path / "begun")}
    job = submit(task, tmp_path / "run", "task.name=slow:Slow", **variables)
    job.wait_for(lambda: all((tmp_path / f"begun.{rank}").exists() for rank in range(2)), 120)
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    job.wait_for(lambda: job.field("Restarts") == "1", 90)
    assert job.end() == "COMPLETED", job.said
    (failures,) = (tmp_path / "ranks").rglob("failures")
    assert failures.read_text() == "1\n", "its time may be too short for what comes before the first step"


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(submit: Submit, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = submit(task, output, *LONG, "checkpoint.steps=null", "checkpoint.epochs=false")
    job.wait_for(lambda: steps(output) > 30, 120)
    subprocess.run(["scancel", job.number], check=True)
    assert job.end() == "CANCELLED"
    assert job.field("Restarts") == "0"
    assert [path.name[:5] for path in (output / "checkpoints").glob("step-*")] == ["step-"]


def test_a_job_outlives_a_node_that_dies(
    submit: Submit, node: Callable[[str, str], None], task: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    job = submit(task, output, *LONG)
    job.wait_for(lambda: steps(output) > 60, 120)
    node("kill", job.nodes()[1])
    assert job.end(300) == "COMPLETED", job.said
    assert int(job.field("Restarts")) >= 1
    assert same_weights(whole, output)
    assert told(output) == told(whole)


def test_a_job_outlives_a_node_that_is_cut_off(
    submit: Submit, node: Callable[[str, str], None], task: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    job = submit(task, output, *LONG, DISTPRUNE_TIMEOUT="20")
    job.wait_for(lambda: steps(output) > 60, 120)
    node("cut", job.nodes()[1])
    assert job.end(300) == "COMPLETED", job.said
    assert int(job.field("Restarts")) >= 1
    assert same_weights(whole, output)
    assert told(output) == told(whole)


def test_a_mistake_ends_the_job_with_its_sentence(submit: Submit, task: Path, tmp_path: Path) -> None:
    job = submit(task, tmp_path / "run", "pruning.sparsity=2")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    assert "distprune: error: pruning.sparsity is 2.0; allowed: at least 0 and less than 1" in job.said


def test_a_time_limit_is_a_reason_to_save_and_be_queued_again(
    submit: Submit, task: Path, tmp_path: Path, whole: Path
) -> None:
    """SLURM looks at limits every 30 s or so: the run is slowed down to outlive the first."""
    output = tmp_path / "run"
    slow = ("train.eval_every=1 steps", "train.eval_batch_size=1")
    job = submit(task, output, *LONG[:-1], *slow, options=("--time=3", "--signal=USR1@120"))
    job.wait_for(lambda: int(job.field("Restarts")) >= 1, 180)
    assert "stopped after step " in "".join(path.read_text() for path in (tmp_path / "ranks").rglob("rank-0-*.log"))
    subprocess.run(["scancel", job.number], check=True)


def test_the_deepspeed_cli_reaches_the_nodes_of_a_hostfile(task: Path, tmp_path: Path, whole: Path) -> None:
    if HOSTFILE is None:
        pytest.skip("DISTPRUNE_TEST_HOSTFILE names no hostfile with two machines")
    command = [
        *HEAD,
        f"{REPOSITORY}/launch/multinode.sh",
        "-H",
        HOSTFILE,
        str(task / "run.yaml"),
        f"train.output={tmp_path}/run",
        *LONG,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(whole, tmp_path / "run")
    assert told(tmp_path / "run") == told(whole)


def submit_array(*arguments: str, until: Path) -> None:
    """Submit by launch/slurm.py, and wait for a file that the last job writes."""
    options = [f"--sbatch={option}" for option in SBATCH_OPTIONS]
    command = [sys.executable, "launch/slurm.py", *arguments, *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    deadline, logs = time.monotonic() + 240, until.parents[1].glob("*.job/*.log")
    while not until.exists():
        assert time.monotonic() < deadline, [path.read_text() for path in logs]
        time.sleep(1)
    time.sleep(1)


def test_an_array_runs_a_grid_and_makes_its_table(task: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid"
    grid = ("--sweep", "pruning.sparsity=0.8,0.9")
    submit_array(str(task / "run.yaml"), f"train.output={output}", *grid, until=output / "results.md")
    rows = (output / "results.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| run", f"pruning.sparsity {each}"] for each in (0.8, 0.9)]


SWEEP = """
config: run.yaml
output: {output}
methods:
  dense: {{set: {{recipe.name: dense, pruning.sparsity: 0}}}}
  after:
    set: {{recipe.name: one_shot}}
    grid: {{pruning.sparsity: [0.8, 0.9]}}
    models: {{model.path: dense}}
"""


def test_a_sweep_runs_in_waves_and_makes_its_table(task: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "my sweep", task / "sweep.yaml"
    file.write_text(SWEEP.format(output=output))
    submit_array(str(file), "recipe.epochs=3", until=output / "results.png")
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["sparsity_target"]) for row in rows] == [("dense", 0.0), ("after", 0.8), ("after", 0.9)]
    assert all(row["masked_weights"] == row["zeros_in_file"] for row in rows[1:])
    assert rows[1]["models"] == {"model.path": "dense/run"}


CRASHES = """
from distprune import dist
from distprune.pruning.scores import Magnitude

class OnOneRank(Magnitude):
    def keys(self, part):
        if dist.detect().rank == 1 and len(part.weights) > 8:  # as many are tried before the run begins
            raise RuntimeError("a bug")
        return super().keys(part)
"""


def test_a_bug_on_one_rank_is_not_tried_again(submit: Submit, task: Path, tmp_path: Path) -> None:
    (tmp_path / "crashes.py").write_text(CRASHES)
    job = submit(task, tmp_path / "run", "pruning.score=crashes:OnOneRank", PYTHONPATH=str(tmp_path))
    assert job.end() == "FAILED", job.said
    assert (job.field("ExitCode"), job.field("Restarts")) == ("1:0", "0")
    assert "RuntimeError: a bug" in "".join(path.read_text() for path in (tmp_path / "ranks").rglob("rank-1-*.log"))
