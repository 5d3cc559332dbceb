"""Models, versions and code that a run, its nodes or a teacher's cache were not begun with."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from distprune import dist
from distprune.errors import UserError
from distprune.teachers.cache import fingerprints
from distprune.training.setup import hash_of_model
from tests.distributed.runs import DENSE, EVERY_STEP, cut_off, heard, run, run_patched
from tests.world import Worlds


def hash_on_nodes(directory: Path, same: bool) -> str:
    """Hash a model on nodes of one rank each, whose files may be others. Collective."""
    world = dist.detect()
    node = replace(world, local_rank=0)
    with patch("socket.gethostname", lambda: f"node-{world.rank}"), patch.object(dist, "detect", lambda: node):
        try:
            return hash_of_model("teacher.path", directory / ("0" if same else str(world.rank)))
        except UserError as error:
            return str(error)


def test_a_model_of_other_files_on_another_node_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    for rank in range(2):
        folder = shutil.copytree(task / "model", tmp_path / str(rank))
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n" * rank)
    first, second = world(2).run(hash_on_nodes, tmp_path, True)
    assert first == second
    refused = world(2).run(hash_on_nodes, tmp_path, False)
    assert refused == ["the files of teacher.path are not the same on all nodes; allowed: the same"] * 2


def test_a_run_does_not_go_on_with_other_weights_that_say_what_goes(world: Worlds, task: Path, tmp_path: Path) -> None:
    other = shutil.copytree(task / "model", tmp_path / "other")
    options = (f"pruning.weights_of={other}", *EVERY_STEP)
    cut_off(world, 1, task, tmp_path / "run", 5, *options)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert world(1).run(run, task, tmp_path / "run", *options) == [
        "the files of pruning.weights_of are not those that the run began with; allowed: the same"
    ]


def test_a_run_that_goes_on_says_what_it_was_made_with_before(world: Worlds, task: Path, tmp_path: Path) -> None:
    cut_off(world, 2, task, tmp_path / "run", 5, *DENSE, *EVERY_STEP)
    made_with = partial(dict, torch="1.0")
    again = (run_patched, "distprune.training.setup.environment", made_with, task, tmp_path / "run")
    (summary, said), _ = world(2).run(heard, *again, *DENSE, *EVERY_STEP)
    assert "changed since: torch 2." in said
    assert " -> 1.0\n" in said
    assert summary["environment"] == {"torch": "1.0"}
    assert list(summary["model_files"]) == ["model.path"], "as the checkpoint has it"


@pytest.fixture
def its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write a module, and forget it in the end."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "its_task.py").write_text("class Task:\n    pass\n")
    with patch.dict(sys.modules):
        yield tmp_path / "its_task.py"


def test_a_cache_is_made_anew_where_the_module_of_ones_own_task_has_changed(its_task: Path) -> None:
    task = import_module("its_task").Task()
    task.tokenizer, task.fingerprints = SimpleNamespace(get_vocab=dict), {}
    before = fingerprints("weights", task, "fp32")
    assert fingerprints("weights", task, "fp32") == before
    its_task.write_text("class Task:\n    changed = True\n")
    assert fingerprints("weights", task, "fp32") != before
