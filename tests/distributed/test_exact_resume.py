"""A run that is cut off at a step goes on to the very bits that it would have ended with."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from distprune.checkpoints.files import read_manifest
from tests.distributed.runs import EVERY_STEP, TAUGHT, CutOff, cut_off, run, run_patched, same_weights, stage, told
from tests.world import Worlds

DROPOUT = "model.dropout=0.1"


@pytest.mark.parametrize(
    ("size", "student"),
    [
        (1, 0),
        *(pytest.param(2, student, marks=pytest.mark.slow) for student in (0, 1, 2, 3)),
    ],
)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    world: Worlds, task: Path, tmp_path: Path, size: int, student: int
) -> None:
    """It is cut off while it is dense, while it prunes, and with its last mask; dropout is on."""
    whole, output = tmp_path / "whole", tmp_path / "cut"
    options = (*stage(student), *EVERY_STEP, DROPOUT, "train.select=best", "train.log_every=5")
    options += TAUGHT * (student >= 2)
    expected = world(size).run(run, task, whole, *options)[0]
    for steps in (3, 7, 9):
        cut_off(world, size, task, output, steps, *options)
    summary = world(size).run(run, task, output, *options)[0]
    assert (summary["steps"], summary["data"]) == (24, expected["data"])
    assert len(expected["data"]) == 2
    assert same_weights(whole, output)
    assert told(output) == told(whole)
    states = [read_manifest(path).state["trainer"] for path in sorted(output.glob("checkpoints/step-*"))]
    for part in ("checkpoints", "evaluations"):
        spent = [state["seconds_of"].get(part, 0.0) for state in states]
        assert spent == sorted(spent), f"what {part} took before a process counts in the next one"


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_exactly_too(world: Worlds, task: Path, tmp_path: Path) -> None:
    for student in (0, 3):
        whole, output = tmp_path / f"whole-{student}", tmp_path / f"cut-{student}"
        options = (*stage(student), *EVERY_STEP, "deepspeed.student.bf16.enabled=true", "pruning.score=movement")
        options += ("model.freeze=[embeddings]", "deepspeed.student.zero_optimization.sub_group_size=300")
        world(2).run(run, task, whole, *options)
        cut_off(world, 2, task, output, 10, *options)
        world(2).run(run, task, output, *options)
        assert same_weights(whole, output), f"stage {student}"


def supported(_: Any) -> bool:
    """Stands in for the CPU's word that it cannot compute in fp16; torch does, only slowly."""
    return True


def run_in_fp16(cut: int | None, task: Path, output: Path, *overrides: str) -> Any:
    """Run with a loss scale that changes every third step, to the end or up to a step. Collective."""
    fp16 = {"enabled": "true", "initial_scale_power": 8, "loss_scale_window": 3}
    options = [*overrides, *(f"deepspeed.student.fp16.{name}={value}" for name, value in fp16.items())]
    with patch("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", supported):
        if cut is None:
            return run(task, output, *options)
        return run_patched("distprune.training.train.set_learning_rate", CutOff(cut), task, output, *options)


@pytest.mark.slow
@pytest.mark.parametrize("student", [1, 2])
def test_a_loss_scale_goes_on(world: Worlds, task: Path, tmp_path: Path, student: int) -> None:
    whole, output, options = tmp_path / "whole", tmp_path / "cut", (*stage(student), *EVERY_STEP)
    world(2).run(run_in_fp16, None, task, whole, *options)
    assert world(2).run(run_in_fp16, 8, task, output, *options) == ["cut off"] * 2
    world(2).run(run_in_fp16, None, task, output, *options)
    scales = {
        path.name: read_manifest(path).state["loss_scaling"]["cur_scale"] for path in output.glob("checkpoints/step-*")
    }
    assert len(set(scales.values())) > 3, "the scale changed on the way"
    assert same_weights(whole, output)
