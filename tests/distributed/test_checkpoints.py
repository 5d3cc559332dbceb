"""A run that is cut off goes on with the same masks at any world and stage, or is refused with a reason."""

import os
import shutil
import socket
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distprune.checkpoints.files import read_manifest
from distprune.checkpoints.pieces import Pieces
from distprune.checkpoints.run_directory import lock, unlock
from tests.distributed.runs import (
    DENSE,
    EVERY_STEP,
    cut_off,
    heard,
    records,
    run,
    run_patched,
    same_weights,
    stage,
    told,
)
from tests.world import Worlds


def copy(run_dir: Path, output: Path) -> None:
    """Copy a run without the checkpoint that its thread may still be writing."""
    shutil.copytree(run_dir, output, symlinks=True, ignore=shutil.ignore_patterns("saving-*"))


# ------------------------------------------------------------------------------ another world, another stage


def masks(checkpoint: Path) -> dict[str, Tensor]:
    """Return the whole masks of a checkpoint."""
    pieces, manifest = Pieces(checkpoint), read_manifest(checkpoint)
    sizes = {name: prod(manifest.state["shapes"][name]) for name in manifest.state["pruner"]["masked_of"]}
    found = {name: pieces.part(name, "mask", 0, size) for name, size in sizes.items()}
    return {name: mask for name, mask in found.items() if mask is not None}


WORLD_OF = {0: 2, 1: 4, 2: 2, 3: 3}
"""The world that a run of each stage began on."""
TO_WORLD = {(0, 0): 1, (0, 1): 3, (0, 2): 4, (0, 3): 2, (1, 0): 2, (1, 1): 3, (1, 2): 1, (1, 3): 4}
TO_WORLD |= {(2, 0): 3, (2, 1): 2, (2, 2): 1, (2, 3): 2, (3, 0): 4, (3, 1): 1, (3, 2): 2, (3, 3): 1}
FAST = {(2, 2), (2, 3)}
PAIRS = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in TO_WORLD]


@pytest.fixture(scope="module")
def interrupted(world: Worlds, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a run of a stage, cut off after step 10, or after step 14 where it went on."""
    root = tmp_path_factory.mktemp("interrupted")

    def of(student: int, further: bool = False) -> Path:
        output = root / f"{student}-{further}"
        if not output.exists():
            size, options = WORLD_OF[student], (*stage(student), *EVERY_STEP)
            cut_off(world, size, task, output, 14 if further else 10, *options)
        return output

    return of


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_goes_on_at_another_world_and_stage(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path], before: int, after: int
) -> None:
    """The checkpoint is that of step 9; step 13 prunes further, and its mask is the same too."""
    output, same = tmp_path / "run", interrupted(before, further=True)
    copy(interrupted(before), output)
    cut_off(world, TO_WORLD[before, after], task, output, 5, *stage(after), *EVERY_STEP)
    found, expected = ([line["loss"] for line in records(path, "train")] for path in (output, same))
    assert len(found) == len(expected) == 14
    assert found == pytest.approx(expected, rel=1e-5)
    for step in (9, 10, 13):
        first, second = (masks(path / "checkpoints" / f"step-{step:08d}") for path in (output, same))
        assert first.keys() == second.keys() != set()
        assert all(torch.equal(first[name], second[name]) for name in first), f"masks at step {step}"


# ------------------------------------------------------------------------------ what may have happened


def damage(checkpoint: Path, how: str) -> None:
    """Do to a checkpoint what disks and people do."""
    manifest, shard = checkpoint / "manifest.json", next(checkpoint.glob("rank-00001-*"))
    if how == "a truncated shard":
        os.truncate(shard, shard.stat().st_size - 8)
    elif how == "a changed byte":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    elif how == "a missing shard":
        shard.unlink()
    elif how == "a truncated manifest":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif how == "a changed manifest":
        manifest.write_text(manifest.read_text().replace('"step": 9', '"step": 8'))
    elif how == "a changed description":
        (checkpoint / "config.json").write_text("{}")


DAMAGES = ["a truncated shard", "a changed byte", "a missing shard", "a truncated manifest", "a changed manifest"]
DAMAGES += ["a changed description"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path], how: str
) -> None:
    output = tmp_path / "run"
    copy(interrupted(2), output)
    damage(output / "checkpoints" / "step-00000009", how)
    before = records(output, "train")
    said = cut_off(world, 2, task, output, 1, *EVERY_STEP)
    assert "step-00000009" in said
    assert "; looking for an older checkpoint" in said
    assert f"from step 8 ({output}/checkpoints/step-00000008)" in said
    assert [line["loss"] for line in records(output, "train")] == [line["loss"] for line in before[:9]]
    assert (output / "checkpoints" / "damaged-step-00000009").is_dir(), "what cannot be read now may be whole"


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    output = tmp_path / "run"
    copy(interrupted(2), output)
    damage(output / "checkpoints" / "step-00000009", "a truncated manifest")
    said = cut_off(world, 2, task, output, 2, "checkpoint.steps=1", "checkpoint.keep=1")
    assert "cannot be written" not in said
    whole = [read_manifest(path).step for path in (output / "checkpoints").glob("step-*")]
    assert whole, "every one that is left can be read"
    assert max(whole) >= 9


def test_a_run_never_begins_anew_over_damaged_checkpoints(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    output = tmp_path / "run"
    copy(interrupted(2), output)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        damage(checkpoint, "a changed byte")
    said = world(2).run(run, task, output, *EVERY_STEP)
    assert len(set(said)) == 1
    assert said[0] == (
        f"every checkpoint in {output}/checkpoints is damaged; allowed: remove it, to begin the run again"
    )
    assert len(records(output, "train")) >= 9, "what there was of the run is still there"


def test_a_run_without_a_checkpoint_begins_again_and_says_so(world: Worlds, task: Path, tmp_path: Path) -> None:
    never = ("checkpoint.epochs=false", "checkpoint.minutes=null")
    world(1).run(run, task, tmp_path / "whole", *never)
    cut_off(world, 1, task, tmp_path / "cut", 5, *never)
    ((_, said),) = world(1).run(heard, run, task, tmp_path / "cut", *never)
    assert "from the beginning: it has no checkpoint yet" in said
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    assert not (tmp_path / "cut" / "checkpoints").exists()


class FullDisk:
    """Stands in for `save`: rank 1's disk is full while the checkpoint of a step is written."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, tensors: Any, path: Path) -> None:
        if f"step-{self.step:08d}" in str(path) and path.name.startswith("rank-00001"):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(world: Worlds, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    target = "distprune.disk.save"
    (summary, said), _ = world(2).run(heard, run_patched, target, FullDisk(16), task, output, "checkpoint.keep=9")
    assert summary["steps"] == 24
    assert "No space left on device; the run goes on without this checkpoint" in said
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == ["latest", "step-00000008", "step-00000024"]
    assert (output / "checkpoints" / "latest").resolve().name == "step-00000024"


@pytest.mark.slow
def test_the_newest_and_the_best_checkpoint_stay(world: Worlds, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    world(2).run(run, task, output, "checkpoint.steps=2", "checkpoint.keep=2", "lr.peak=0.02", "train.epochs=4")
    measured = {line["step"]: line["accuracy"] for line in records(output, "validation") if line["step"] > 16}
    best = max(measured, key=lambda step: (measured[step], -step))
    kept = {int(path.name[-8:]) for path in (output / "checkpoints").glob("step-*")}
    assert kept == {30, 32, best}


# ------------------------------------------------------------------------------ what may have changed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pruning.sparsity=0.8", "pruning.sparsity is 0.8, and was 0.9 when the run began"),
        ("teacher.path=elsewhere", "teacher.path is 'elsewhere', and was "),
    ],
)
def test_what_would_make_another_run_of_it_is_refused(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path], override: str, said: str
) -> None:
    output = tmp_path / "run"
    copy(interrupted(2), output)
    before = (output / "metrics.jsonl").read_bytes(), (output / "config.yaml").read_bytes()
    answers = world(2).run(run, task, output, *EVERY_STEP, override)
    assert len(set(answers)) == 1
    assert answers[0].startswith(said)
    assert before == ((output / "metrics.jsonl").read_bytes(), (output / "config.yaml").read_bytes())


@pytest.mark.slow
def test_other_changes_are_said_and_taken(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    output, moved = tmp_path / "run", tmp_path / "moved"
    copy(interrupted(2), output)
    shutil.copytree(task / "model", moved)
    shutil.copy(task / "train.jsonl", tmp_path / "sentences.jsonl")
    changed = (f"model.path={moved}", "lr.peak=0.002", "train.accumulation=2", "teacher.rebuild_cache=true")
    changed += (f"task.train={tmp_path}/sentences.jsonl",)
    (_, said), _ = world(2).run(heard, run, task, output, *EVERY_STEP, *changed)
    assert "changed since: lr.peak 0.001 -> 0.002" in said
    assert "changed since: train.accumulation 1 -> 2" in said
    assert f"changed since: model.path {str(task / 'model')!r} -> {str(moved)!r}" in said
    assert max(line["lr"] for line in records(output, "train")) == pytest.approx(0.002)
    assert "peak: 0.002" in (output / "config.yaml").read_text()


def test_a_run_that_becomes_shorter_reports_the_state_that_it_ends_with(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    """The newest checkpoint is that of step 9, and the newest evaluation of step 8."""
    output, options = tmp_path / "run", ("pruning.end=8 steps", "train.epochs=1.125")
    cut_off(world, 1, task, output, 10, *EVERY_STEP, "pruning.end=8 steps")
    summary = world(1).run(run, task, output, *EVERY_STEP, *options)[0]
    assert (summary["steps"], summary["final_step"]) == (9, 9)
    assert records(output, "validation")[-1]["step"] == 9
    assert summary["final_metric"] == records(output, "validation")[-1]["accuracy"]


def test_a_run_cannot_become_shorter_than_it_is_by_now(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("train.epochs=0.5", "lr.rewind_every=null", *DENSE)
    cut_off(world, 1, task, tmp_path / "other", 9, *EVERY_STEP, *DENSE)
    (said,) = world(1).run(run, task, tmp_path / "other", *EVERY_STEP, *options)
    assert said == "train.epochs makes a run of 4 steps, and 8 are done; allowed: more"


def test_other_data_are_refused(world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path]) -> None:
    output, other = tmp_path / "run", tmp_path / "task"
    copy(interrupted(2), output)
    shutil.copytree(task, other)
    lines = (task / "train.jsonl").read_text().splitlines()
    (task / "train.jsonl").rename(task / "kept")
    try:
        (task / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
        said = world(2).run(run, task, output, *EVERY_STEP)
    finally:
        (task / "kept").rename(task / "train.jsonl")
    assert said[0].startswith("the training or validation data are not those that the run began with")


def test_a_run_in_use_and_a_finished_one_are_refused(
    world: Worlds, task: Path, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    output = tmp_path / "run"
    copy(interrupted(2), output)
    lock(output)
    try:
        said = world(2).run(run, task, output, *EVERY_STEP)
    finally:
        unlock(output)
    name = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == [f"{str(output)!r} is in use by {name}; allowed: one run or sweep at a time"] * 2
    world(2).run(run, task, output, *EVERY_STEP)
    said = world(2).run(run, task, output, *EVERY_STEP)
    assert said[0].startswith(f"train.output {str(output)!r} holds a finished run; allowed: ")
