"""Saving beside the training: what is written is what there was, however slow a copy, a disk or a rank is."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from distprune import disk, dist
from distprune.checkpoints import files
from distprune.checkpoints.files import read_manifest
from distprune.checkpoints.saver import Saver, _Writing
from distprune.disk import Entry, write_tensors
from tests.world import Worlds


def slowly(function: Any, seconds: float, rank: int | None = None) -> Any:
    """Return a function that takes its time first, on all ranks or on one."""

    def slow(*arguments: Any) -> Any:
        if rank in (None, dist.detect().rank):
            time.sleep(seconds)
        return function(*arguments)

    return slow


def test_what_a_disk_made_something_else_of_is_not_a_file(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)

    with patch.object(disk, "save", spoil), pytest.raises(OSError, match="does not hold the a that was written"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})


@pytest.mark.parametrize("left", [None, "short"])
def test_a_checkpoint_without_a_file_of_a_rank_does_not_count(tmp_path: Path, left: str | None) -> None:
    saving = files.saving_path(tmp_path, 7)
    saving.mkdir()
    if left is not None:
        (saving / "rank-00001.safetensors").write_text(left)
    entry = Entry("rank-00001.safetensors", 9, "")
    with pytest.raises(OSError, match=r"rank-00001\.safetensors is not there in its 9 bytes: do all nodes share"):
        files.complete(tmp_path, files.Manifest(7, {}, [entry]))
    assert not files.newest_first(tmp_path)


def save_and_change(folder: Path) -> float:
    """Save, and change the tensors as soon as that is allowed; return how long `save` itself took. Collective."""
    tensors = {"a[0:4].master": torch.arange(4.0), "b[0:9].mask": torch.full((9,), -1, dtype=torch.int8)}
    saver = Saver(folder, 2, lambda path: (path / "config.json").write_text("{}"))
    with patch.object(_Writing, "run", slowly(_Writing.run, 0.3)):
        began = time.monotonic()
        saver.save(7, tensors, {"here": [1]}, None)
        took = time.monotonic() - began
        saver.before_change()
        for tensor in tensors.values():
            tensor.zero_()
        saver.finish()
    return took


def test_what_changes_after_a_save_is_not_in_it(world: Worlds, tmp_path: Path) -> None:
    (took,) = world(1).run(save_and_change, tmp_path)
    assert took < 0.2, "training goes on at once"
    (file,) = (tmp_path / "step-00000007").glob("rank-*")
    written = load_file(file)
    assert written["a[0:4].master"].tolist() == [0, 1, 2, 3]
    assert written["b[0:9].mask"].numel() == 2, "a bit a weight"
    manifest = read_manifest(tmp_path / "step-00000007")
    assert (manifest.step, manifest.state) == (7, {"here": [1]})
    assert sorted(entry.name for entry in manifest.files) == ["config.json", file.name]


def save_beside_a_slow_disk(folder: Path) -> list[tuple[bool, bool]]:
    """Take steps of 50 ms while rank 1's disk takes 400 ms; return after each whether there is a checkpoint."""
    saver = Saver(folder, 2, lambda path: None)
    seen = []
    with patch.object(disk, "write_tensors", slowly(write_tensors, 0.4, rank=1)):
        saver.save(1, {f"w[{dist.detect().rank}:1].master": torch.ones(1)}, {}, None)
        for _ in range(30):
            time.sleep(0.05)
            busy = dist.all_sum([float(saver.busy)])[0]
            saver.settle(busy)
            dist.barrier()
            seen.append((busy > 0, (folder / "step-00000001").exists()))
    return seen


def test_a_rank_with_a_slow_disk_holds_nobody_up(world: Worlds, tmp_path: Path) -> None:
    seen, other = world(2).run(save_beside_a_slow_disk, tmp_path)
    assert seen == other
    assert all(exists is not busy for busy, exists in seen), "complete when every rank is done, and not before"
    assert seen[0] == (True, False)
    assert seen[-1] == (False, True)
