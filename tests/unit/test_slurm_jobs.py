"""Jobs that launch/slurm.py writes: what they ask SLURM for, what they run, and the table in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
RUN = "model: {path: student}\ntask: {train: a.jsonl, validation: b.jsonl}\nwandb: {mode: disabled}\n"


def slurm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a folder whose sbatch writes down its arguments."""
    (folder / "run.yaml").write_text(RUN)
    (folder / "bin").mkdir(exist_ok=True)
    fake = folder / "bin" / "sbatch"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{folder}/submitted\necho "$(wc -l <{folder}/submitted);cluster"\n')
    fake.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), *arguments],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_prints_the_script_and_leaves_nothing(tmp_path: Path) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "8:00:00", "--partition", "gpu", "--sbatch=--qos=long"]
    done = slurm(tmp_path, "run.yaml", "train.output=runs/mine", *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    asked = [line.removeprefix("#SBATCH ") for line in done.stdout.splitlines() if line.startswith("#SBATCH ")]
    folder = tmp_path / "runs" / "mine.job"
    assert asked == [
        "--job-name=mine",
        f"--output={folder}/%x-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=USR1@180",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gres=gpu:8",
        "--partition=gpu",
        "--time=8:00:00",
        "--qos=long",
    ]
    assert f"exec bash {REPOSITORY}/slurm/train.sbatch {folder}/config.yaml" in done.stdout
    assert f"cd {tmp_path}\n" in done.stdout, "paths in the configuration are relative to it"
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "bin"}


def test_a_grid_is_an_array_with_a_table_after_it(tmp_path: Path) -> None:
    sweeps = ["--sweep", "pruning.sparsity=0.8,0.9", "--sweep", "train.seed=1,2"]
    done = slurm(tmp_path, "run.yaml", "train.output=runs/grid", *sweeps, "--ranks-per-node", "2")
    assert done.returncode == 0, done.stderr
    folder, output = tmp_path / "runs" / "grid.job", tmp_path / "runs" / "grid"
    assert "#SBATCH --array=0-3\n" in (folder / "job.sbatch").read_text()
    lines = (folder / "runs.txt").read_text().splitlines()
    assert lines[1] == f"pruning.sparsity=0.8 train.seed=2 train.output={output}/pruning.sparsity=0.8,train.seed=2"
    assert len(set(lines)) == 4
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted[0].endswith(f"{folder}/job.sbatch")
    assert submitted[1] == f"--parsable --dependency=afterany:1 {folder}/table.sbatch"
    assert "path: student" in (folder / "config.yaml").read_text()
    assert (folder / "revision.txt").read_text().strip()
    again = slurm(tmp_path, "run.yaml", "train.output=runs/grid", *sweeps)
    assert again.returncode == 2
    assert "exists: the job was written before" in again.stderr


def test_a_job_of_an_array_runs_its_line(tmp_path: Path) -> None:
    slurm(tmp_path, "run.yaml", "train.output=runs/grid", "--sweep", "train.seed=1,2")
    script = (tmp_path / "runs" / "grid.job" / "job.sbatch").read_text()
    shown = script.replace("exec bash ", "printf '%s\\n' ")
    done = subprocess.run(
        ["bash", "-c", shown], env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True
    )
    output = tmp_path / "runs" / "grid" / "train.seed=2"
    assert done.stdout.splitlines()[2:] == ["train.seed=2", f"train.output={output}"]


def test_the_table_tells_of_runs_that_did_not_finish(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "grid" / name).mkdir(parents=True)
    summary = {"metric_name": "accuracy", "final_metric": 0.5, "dense_metric": 0.75, "sparsity_masked": 0.9}
    (tmp_path / "grid" / "a" / "summary.json").write_text(json.dumps(summary | {"steps": 7, "wall_time_s": 1.5}))
    done = slurm(tmp_path, "--table", str(tmp_path / "grid"))
    assert done.stdout == (tmp_path / "grid" / "results.md").read_text()
    assert done.stdout.splitlines()[2] == "| a | 0.9 | accuracy | 0.5 | 0.75 | 7 | 1.5 |"
    assert done.stdout.splitlines()[3].startswith("| b | not finished |")
    assert (tmp_path / "grid" / "results.csv").read_text().splitlines()[1] == "a,0.9,accuracy,0.5,0.75,7,1.5"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no CONFIG given"),
        (["run.yaml", "--sweep", "train.seed"], "--sweep 'train.seed'; allowed: KEY=V1,V2"),
        (["run.yaml", "--sweep", "train.sed=1,2"], "did you mean train.seed?"),
        (["run.yaml", "--sweep", "pruning.sparsity=0.5,1.5"], "pruning.sparsity is 1.5; allowed: at least 0"),
    ],
)
def test_mistakes_are_said_before_anything_is_submitted(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = slurm(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "submitted").exists()
    assert not list(tmp_path.glob("runs/*"))
