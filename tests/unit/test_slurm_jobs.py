"""Jobs that launch/slurm.py writes: what they ask SLURM for, what they run, and the table in the end."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from distprune import settings
from distprune.sweeps.spec import read_sweep

REPOSITORY = Path(__file__).parents[2]
RUN = "model: {path: student}\ntask: {train: a.jsonl, validation: b.jsonl}\nwandb: {mode: disabled}\n"


Slurm = Callable[..., CompletedProcess[str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Slurm:
    """Runs the script in a folder with a run's file, data, and an sbatch that writes down its arguments."""
    for name, text in (("run.yaml", RUN), ("a.jsonl", ""), ("b.jsonl", "")):
        (tmp_path / name).write_text(text)
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    number = f'echo "$@" >>{tmp_path}/submitted\necho "$(wc -l <{tmp_path}/submitted);cluster"'

    def run(*arguments: str, answers: str = number) -> CompletedProcess[str]:
        fake.write_text(f"#!/bin/sh\n{answers}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["slurm.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "launch" / "slurm.py"), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return CompletedProcess(arguments, ended.value.code, *capfd.readouterr())

    return run


def test_a_dry_run_prints_the_script_and_leaves_nothing(slurm: Slurm, tmp_path: Path) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "8:00:00", "--partition", "gpu", "--sbatch=--qos=long"]
    done = slurm("run.yaml", "train.output=runs/mine", *options, "--dry-run")
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
    assert f"exec bash {REPOSITORY}/slurm/train.sbatch {folder}/run-0.yaml" in done.stdout
    assert f"cd {tmp_path}\n" in done.stdout, "paths in the configuration are relative to it"
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "a.jsonl", "b.jsonl", "bin"}


def test_a_folder_may_have_a_space_and_a_percent_sign(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").rename(tmp_path / ".run.yaml")
    done = slurm(".run.yaml", "train.output=my runs at 95%/a grid", "--sweep", "train.seed=1,2")
    assert done.returncode == 0, done.stderr
    assert read_sweep(tmp_path / "my runs at 95%" / "a grid.job" / "a grid.yaml").methods.keys() == {"_run"}
    folder = tmp_path / "my runs at 95%" / "a grid.job"
    for name, log in (("job", "%x-%A-%a"), ("table", "table-%j")):
        text = (folder / f"{name}.sbatch").read_text()
        assert f"#SBATCH --output='{str(folder).replace('%', '%%')}/{log}.log'\n" in text, "%j is the job's, %% a %"
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_grid_is_an_array_with_a_table_after_it(slurm: Slurm, tmp_path: Path) -> None:
    sweeps = ["--sweep", "pruning.sparsity=0.8,0.9", "--sweep", "train.seed=1,2"]
    done = slurm("run.yaml", "train.output=runs/grid", *sweeps, "--ranks-per-node", "2")
    assert done.returncode == 0, done.stderr
    folder, output = tmp_path / "runs" / "grid.job", tmp_path / "runs" / "grid"
    assert "#SBATCH --array=0-3\n" in (folder / "job.sbatch").read_text()
    configs = [settings.load(str(folder / f"run-{number}.yaml"), []) for number in range(4)]
    assert (configs[1].pruning.sparsity, configs[1].train.seed) == (0.8, 2)
    assert configs[1].train.output == f"{output}/run/pruning.sparsity=0.8,train.seed=2"
    assert len({config.train.output for config in configs}) == 4
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert submitted[0] == f"--parsable --array=0-3 {folder}/job.sbatch"
    assert submitted[1] == f"--parsable --dependency=afterany:1 {folder}/table.sbatch"
    assert all(config.model.path == "student" for config in configs)
    table = f"python -m distprune sweep {folder}/grid.yaml --table"
    assert table in (folder / "table.sbatch").read_text()
    sweep = read_sweep(folder / "grid.yaml")
    assert (sweep.output, sweep.config) == (str(output), str(tmp_path / "run.yaml"))
    assert sweep.methods["run"].grid == {"pruning.sparsity": [0.8, 0.9], "train.seed": [1, 2]}
    assert (folder / "revision.txt").read_text().strip()
    again = slurm("run.yaml", "train.output=runs/grid", *sweeps)
    assert again.returncode == 2
    assert "exists: the job was written before" in again.stderr


def test_a_job_of_an_array_runs_its_own_configuration(slurm: Slurm, tmp_path: Path) -> None:
    slurm("run.yaml", "train.output=runs/grid", "--sweep", "train.seed=1,2")
    script = (tmp_path / "runs" / "grid.job" / "job.sbatch").read_text()
    shown = script.replace("exec bash ", "printf '%s\\n' ")
    done = subprocess.run(
        ["bash", "-c", shown], env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"}, capture_output=True, text=True
    )
    *_, path = done.stdout.splitlines()
    assert settings.load(path, []).train.output == str(tmp_path / "runs" / "grid" / "run" / "train.seed=2")


SWEEP = """
config: run.yaml
output: runs/both
methods:
  dense: {grid: {train.seed: [1, 2]}}
  pruned:
    set: {pruning.sparsity: 0.8, train.epochs: 10, pruning.every: 3 steps}
    grid: {train.seed: [1, 2], lr.peak: [1e-4, 2e-4]}
    models: {model.path: dense}
"""


def test_a_job_that_is_refused_leaves_nothing_in_the_way(slurm: Slurm, tmp_path: Path) -> None:
    options = ["run.yaml", "train.output=runs/grid", "--sweep", "train.seed=1,2"]
    done = slurm(*options, answers="exit 1")
    assert (done.returncode, "sbatch refuses" in done.stderr) == (2, True)
    assert not (tmp_path / "runs" / "grid.job").exists()
    assert slurm(*options).returncode == 0


def test_a_table_has_the_options_that_are_not_for_runs(slurm: Slurm, tmp_path: Path) -> None:
    options = [
        f"--sbatch={option}" for option in ("--qos long", "--gres=gpu:4", "--mem 64G", "--exclusive", "--comment='a b'")
    ]
    done = slurm("run.yaml", "train.output=runs/grid", "--sweep", "train.seed=1,2", *options)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "submitted").read_text().splitlines()[-1]
    assert "--dependency=afterany:1 --qos long --comment=a b " in table
    assert "gpu" not in table
    assert "64G" not in table
    assert "exclusive" not in table


def test_a_sweep_is_an_array_for_each_wave_of_models(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    options = ["--gpus-per-node", "1", "--partition", "gpu"]
    done = slurm("sweep.yaml", "train.batch_size=8", *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "both.job"
    assert (tmp_path / "submitted").read_text().splitlines() == [
        f"--parsable --array=0-1 {folder}/job.sbatch",
        f"--parsable --array=2-5 --dependency=afterany:1 {folder}/job.sbatch",
        f"--parsable --dependency=afterany:2 --partition=gpu {folder}/table.sbatch",
    ]
    assert "job 3: their table, runs/both/results.md" in done.stdout
    configs = [settings.load(str(folder / f"run-{number}.yaml"), []) for number in range(6)]
    assert [config.pruning.sparsity for config in configs] == [0.0] * 2 + [0.8] * 4
    assert {config.train.batch_size for config in configs} == {8}
    assert configs[5].pruning.every == "3 steps"
    assert configs[5].model.path == "runs/both/dense/train.seed=2/final"
    table = (folder / "table.sbatch").read_text()
    assert table.splitlines()[-2:] == [
        f"cd {tmp_path}",
        '"${CONTAINER[@]}" python -m distprune sweep sweep.yaml train.batch_size=8 --table',
    ]


def test_a_dry_run_of_a_sweep_shows_its_waves_and_ranks(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP + "ranks: 4\n")
    said = slurm("sweep.yaml", "--dry-run").stdout.splitlines()
    assert "#SBATCH --ntasks-per-node=4" in said
    assert said[-6] == "# --array=0-1: runs/both/dense/train.seed=1"
    assert said[-1] == "# --array=2-5: runs/both/pruned/train.seed=2,lr.peak=0.0002"


def test_of_a_sweep_only_what_has_no_result_is_submitted(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    output = tmp_path / "runs" / "both"
    for seed in (1, 2):
        for name in (f"dense/train.seed={seed}", f"pruned/train.seed={seed},lr.peak=0.0001"):
            (output / name).mkdir(parents=True)
            (output / name / "summary.json").write_text("{}")
    done = slurm("sweep.yaml")
    assert done.returncode == 0, done.stderr
    assert "--array=0-1 " in (tmp_path / "submitted").read_text().splitlines()[0]
    configs = [settings.load(str(tmp_path / "runs" / "both.job" / f"run-{number}.yaml"), []) for number in range(2)]
    assert {config.lr.peak for config in configs} == {2e-4}
    for seed in (1, 2):
        (output / f"pruned/train.seed={seed},lr.peak=0.0002").mkdir()
        (output / f"pruned/train.seed={seed},lr.peak=0.0002" / "summary.json").write_text("{}")
    assert "every run of sweep.yaml has ended" in slurm("sweep.yaml").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["sweep.yaml", "task.train=c.jsonl"], "task.train is 'c.jsonl', which is not there"),
        (["sweep.yaml", "--sweep", "train.seed=1"], "--sweep is 'train.seed=1' and sweep.yaml a sweep"),
        (["run.yaml", "--sweep", "train.seed"], "--sweep 'train.seed'; allowed: KEY=V1,V2"),
        (["run.yaml", "--sweep", "model.freeze=[a"], "--sweep 'model.freeze=[a'; allowed: KEY=V1,V2"),
        (["run.yaml", "--sweep", "train.seed=1", "--sweep", "train.seed=2"], "--sweep train.seed is given twice"),
        (["run.yaml", "--sweep", "train.sed=1,2"], "did you mean train.seed?"),
        (["run.yaml", "--sweep", "train.seed=1,1"], "has a value of train.seed twice"),
        (["run.yaml", "--sweep", "pruning.sparsity=0.5,1.5"], "pruning.sparsity is 1.5; allowed: at least 0"),
    ],
)
def test_mistakes_are_said_before_anything_is_submitted(
    slurm: Slurm, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    done = slurm(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "submitted").exists()
    assert not list(tmp_path.glob("runs/*"))
