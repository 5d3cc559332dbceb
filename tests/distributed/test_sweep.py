"""A sweep in processes of its own: stopped and gone on with, with runs that fail among others."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distprune import settings
from distprune.tasks.files import hashes_of
from tests.distributed.processes import BIN, Started, start
from tests.distributed.runs import run_command
from tests.world import Worlds

MADE = "the teacher's outputs for 96 training rows are computed once"


def write_sweep(task: Path, folder: Path, more: str = "") -> Path:
    """Write a sweep of a dense method and one that starts from its models, on the small task."""
    path = folder / "methods.yaml"
    path.write_text(f"""
config: {task / "run.yaml"}
output: {folder / "runs"}
results: {folder / "kept" / "results.jsonl"}
ranks: 1
baseline: dense
set: {{train.log_every: 1, train.epochs: 8}}
grid: {{train.seed: [1, 2]}}
methods:
  dense: {{set: {{pruning.sparsity: 0}}}}
  after:
    set: {{pruning.start: 0 steps, pruning.end: 0 steps, pruning.initial: 0.5, pruning.sparsity: 0.5}}
    models: {{model.path: dense}}
{more}""")
    return path


BROKEN = """  broken: {set: {train.batch_size: 1000}}
  behind: {models: {model.path: broken}}
"""


@pytest.mark.slow
def test_a_sweep_stops_goes_on_past_runs_that_fail_and_then_needs_its_lines_alone(
    begin: Callable[..., Started], world: Worlds, task: Path, tmp_path: Path
) -> None:
    path = write_sweep(task, tmp_path)
    command = [str(BIN / "distprune"), "sweep", str(path)]
    kept, second = tmp_path / "kept" / "results.jsonl", tmp_path / "runs" / "dense" / "train.seed=2"
    alone = path.read_text()
    path.write_text(alone.replace("ranks: 1", "ranks: 2"))
    started = begin(command)
    started.wait_for(lambda: (second / "metrics.jsonl").exists())
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 75, started.said
    assert "dense/train.seed=2 has stopped with status 75, and can go on" in started.said
    assert [json.loads(line)["run"] for line in kept.read_text().splitlines()] == ["dense/train.seed=1"]
    path.write_text(alone.replace("ranks: 1", "ranks: 1\nat_once: 2") + BROKEN)
    done = start([*command])
    assert done.returncode == 2, done.stdout + done.stderr
    log = tmp_path / "runs" / "broken" / "train.seed=1.log"
    assert f"2 of 7 runs failed, see their logs: broken/train.seed=1 ({log}), " in done.stderr
    assert "not run without them: behind/train.seed=1, behind/train.seed=2" in done.stderr
    assert "train.batch_size is 1000" in log.read_text()
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    rows.sort(key=lambda row: (row["method"] == "after", row["point"]["train.seed"]))
    assert [row["method"] for row in rows] == ["dense", "dense", "after", "after"]
    assert "going on with the run in" in second.with_name(second.name + ".log").read_text()
    assert [row["world_size"] for row in rows] == [2, 1, 1, 1]
    assert json.loads((second / "summary.json").read_text())["launcher"] == "sweep"
    given = settings.load(str(task / "run.yaml"), []).task
    assert all(row["data"] == hashes_of(given) != {} for row in rows), "as the run has noted them"
    assert [row["masked_weights"] for row in rows[2:]] == [rows[2]["prunable_weights"] // 2] * 2
    assert "| after |  |" in done.stdout
    assert kept.with_suffix(".png").exists()
    path.write_text(alone)
    whole = kept.read_text()
    kept.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    ((status, said),) = world(1).run(run_command, "sweep", path)
    assert (status, "4 runs, 3 with a result, 1 to run" in said) == (0, True), said
    assert "begins" not in said, "the run had ended; only its line was missing"
    assert kept.read_text() == whole
    shutil.rmtree(tmp_path / "runs")
    ((status, said),) = world(1).run(run_command, "sweep", path)
    assert (status, "4 runs, 4 with a result, 0 to run" in said) == (0, True), said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".lock"]


@pytest.mark.slow
def test_runs_share_a_teachers_outputs(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "taught.yaml"
    path.write_text(f"""
config: {task / "run.yaml"}
output: {tmp_path / "runs"}
results: {tmp_path / "results.jsonl"}
ranks: 1
baseline: dense
set: {{train.log_every: 1}}
methods:
  dense: {{set: {{pruning.sparsity: 0}}}}
  taught:
    set: {{distillation.hardness: 0.5, teacher.cache: auto}}
    grid: {{pruning.sparsity: [0.5, 0.75]}}
    models: {{teacher.path: dense}}
""")
    done = start([str(BIN / "distprune"), "sweep", str(path)], XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(tmp_path / "runs" / "taught" / f"pruning.sparsity={target}.log").read_text() for target in (0.5, 0.75)]
    assert [MADE in log for log in logs] == [True, False], logs
    assert len(list((tmp_path / "cache" / "distprune" / "teachers").iterdir())) == 1
