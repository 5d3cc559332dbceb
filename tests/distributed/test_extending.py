"""The task that docs/extending.md writes, as it stands there: trained, pruned and distilled from a teacher's cache."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from distprune import dist, settings
from distprune.commands.train import train
from tests.distributed.runs import run, told
from tests.unit.task_files import make_tokenizer
from tests.world import Worlds

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def write(folder: Path) -> list[str]:
    """Write the page's module, data and a model; return a run's overrides."""
    (code,) = re.findall(r"```python\n(# tagging.py.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "tagging.py").write_text(code)
    rows = [{"words": list("abcd"[: 2 + n % 3]), "tags": ["NAME" if n % 2 else "O"] * (2 + n % 3)} for n in range(40)]
    rows[7]["tags"] = rows[7]["words"] = []
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = make_tokenizer()
    BertForTokenClassification(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    (command,) = re.findall(r"distprune train CONFIG (task.name=tagging.*)", PAGE.read_text())
    return [
        *command.split(),
        f"model.path={folder}/model",
        f"teacher.path={folder}/model",
        f"teacher.cache={folder}/cache",
        f"task.train={folder}/rows.jsonl",
        f"task.validation={folder}/rows.jsonl",
        "task.holdout=0.2",
        f"train.output={folder}/run",
        "train.batch_size=4",
        "train.epochs=2",
        "pruning.sparsity=0.5",
        "pruning.start=2 steps",
        "pruning.end=10 steps",
        "pruning.every=2 steps",
        "distillation.hardness=0.5",
    ]


def pruned_by_hand(stage: int) -> tuple[float, float]:
    """Carry out the page's loop; return the sparsity, and which part of the encoder is zero. Collective."""
    (code,) = re.findall(r"```python\n(# loop.py.*?)```", PAGE.read_text(), re.DOTALL)
    module: dict[str, Any] = {}
    linear = torch.nn.functional.linear
    exec(code, module)
    torch.manual_seed(1)
    model = BertForTokenClassification(BertConfig(vocab_size=50, num_labels=2, **SIZES))
    rows = 4 * dist.detect().size
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(4, 50, (rows, 8), generator=generator) for _ in range(9)]
    mine = [each[dist.detect().rank :: dist.detect().size] for each in ids]
    engine, sparsity = module["train_pruned"](model, [{"input_ids": each, "labels": each % 2} for each in mine], stage)
    assert torch.nn.functional.linear is linear, "DeepSpeed has left the process's own"
    zeros = weights = 0
    for name, parameter in engine.module.named_parameters():
        if ".encoder.layer." in name and name.endswith("weight") and "LayerNorm" not in name:
            with deepspeed.zero.GatheredParameters([parameter]):
                zeros, weights = zeros + int((parameter == 0).sum()), weights + parameter.numel()
    engine.destroy()
    return sparsity, zeros / weights


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loop_of_ones_own_prunes_as_a_run_does(world: Worlds, stage: int) -> None:
    for sparsity, zeros in world(2).run(pruned_by_hand, stage):
        assert sparsity == zeros == pytest.approx(0.9, abs=1e-3)


OTHER = """
from distprune.pruning.scores import Score

class Mine(Score):
    def scores(self, part):
        return {}part.weights
"""


def run_with_a_copy_of_each_rank(task: Path, folder: Path) -> Any:
    """Run by a score whose module is another file on each rank. Collective."""
    mine = folder / f"{dist.detect().rank}"
    mine.mkdir(parents=True)
    (mine / "copied.py").write_text(OTHER.format("+-"[dist.detect().rank]))
    sys.path.insert(0, str(mine))
    try:
        return run(task, folder / "run", "pruning.score=copied:Mine")
    finally:
        sys.path.remove(str(mine))


def test_a_module_that_differs_between_nodes_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = "the hashes of the modules of task.name and pruning.score on rank 0 are"
    assert all(str(each).startswith(said) for each in world(2).run(run_with_a_copy_of_each_rank, task, tmp_path))


def trained(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Collective."""
    sys.path.insert(0, str(folder))
    try:
        return train(settings.load_valid(None, overrides))
    finally:
        sys.path.remove(str(folder))


@pytest.mark.slow
def test_a_task_of_another_module_trains_like_any_other(world: Worlds, tmp_path: Path) -> None:
    summary, _ = world(2).run(trained, tmp_path, write(tmp_path))
    assert (summary["metric_name"], summary["sparsity_masked"]) == ("accuracy", 0.5)
    assert list((tmp_path / "cache").glob("rank-*"))
    assert "AutoModelForTokenClassification" in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.slow
def test_losses_do_not_depend_on_how_a_batch_is_cut(world: Worlds, tmp_path: Path) -> None:
    """Though rows have one to four predictions, and one has none."""
    overrides = [*write(tmp_path), "train.batch_size=8", "train.epochs=3", "train.log_every=1", "model.dropout=0"]
    torch.manual_seed(1)
    model = BertForTokenClassification(BertConfig(vocab_size=len(make_tokenizer()), initializer_range=0.5, **SIZES))
    model.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    found = []
    for size, accumulation in ((1, 1), (1, 8), (2, 2)):
        output = tmp_path / f"run-{size}-{accumulation}"
        options = (f"train.accumulation={accumulation}", f"train.output={output}", f"teacher.path={tmp_path}/teacher")
        world(size).run(trained, tmp_path, [*overrides, *options])
        found.append(
            [(step["task_loss"], step["distillation_loss"]) for step in told(output) if step["split"] == "train"]
        )
    for other in found[1:]:
        assert np.allclose(other, found[0], rtol=1e-4)
