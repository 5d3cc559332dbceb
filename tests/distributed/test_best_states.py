"""The best state of a run: kept as long as a checkpoint may go back to it, and not chosen where it is damaged."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from distprune.checkpoints.files import read_manifest
from distprune.disk import write_tensors
from tests.distributed.runs import DENSE, EVERY_STEP, RATE, CutOff, FullDisk, cut_off, heard, run, run_patched
from tests.world import Worlds


class Rising:
    """Stands in for `evaluate`: each state is better than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> dict[str, float]:
        self.calls += 1
        return {"accuracy": self.calls / 100}


def run_with_a_slow_disk(task: Path, output: Path, step: int, *overrides: str) -> Any:
    """Run up to a step, with checkpoints that are still being written when a better state is found. Collective."""

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return write_tensors(*arguments)

    with patch("distprune.disk.write_tensors", slow), patch(RATE, CutOff(step)):
        return run_patched("distprune.training.train.evaluate", Rising(), task, output, *overrides)


def test_the_best_state_of_every_checkpoint_stays(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("train.select=best", "train.eval_every=1 steps", "checkpoint.steps=1", *DENSE)
    world(2).run(run_with_a_slow_disk, task, tmp_path / "run", 6, *options)
    checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints
    for each in checkpoints:
        best = read_manifest(each).state["trainer"]["best"]["step"]
        assert (tmp_path / "run" / "best" / f"step-{best:08d}" / "model.safetensors").exists(), each.name


def run_with_a_full_disk(task: Path, output: Path, before: int, *overrides: str) -> Any:
    """Run where every evaluation finds a better state, of which a few can be kept. Collective."""
    with patch("distprune.models.export.save", FullDisk(before)):
        return run_patched("distprune.training.train.evaluate", Rising(), task, output, *overrides)


@pytest.mark.slow
def test_the_former_best_state_stays_where_a_disk_is_full(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("train.select=best", "train.eval_every=4 steps", *DENSE)
    summary, said = world(2).run(heard, run_with_a_full_disk, task, tmp_path / "run", 2, *options)[0]
    assert (summary["final_step"], summary["final_metric"]) == (8, 0.02)
    assert "the best state so far, of step 12, is not kept: '" in said
    patient = (*options, "train.patience=2")
    assert world(2).run(run_with_a_full_disk, task, tmp_path / "patient", 2, *patient)[0]["steps"] == 16
    refused = world(2).run(run_with_a_full_disk, task, tmp_path / "none", 0, *options)
    assert all("no state could be kept in" in each for each in refused)
    assert not list((tmp_path / "none" / "best").iterdir())
    assert world(2).run(run, task, tmp_path / "none", *options)[0]["final_step"] > 0, "there is room again"


def cut_file(best: Path) -> None:
    (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("damage", [cut_file, pytest.param(shutil.rmtree, marks=pytest.mark.slow)])
def test_a_best_state_that_is_damaged_is_not_chosen(
    world: Worlds, task: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    output, options = tmp_path / "run", ("train.select=best", "train.eval_every=4 steps", *EVERY_STEP)
    cut_off(world, 2, task, output, 22, *options)
    (best,) = (output / "best").iterdir()
    assert best.name == "step-00000020"
    damage(best)
    summary, said = world(2).run(heard, run, task, output, *options)[0]
    assert "the best state, of step 20, is lost: " in said
    assert summary["final_step"] == 24
    assert summary["zeros_in_file"] == summary["masked_weights"]
