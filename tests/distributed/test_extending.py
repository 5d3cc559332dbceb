"""The task that docs/extending.md writes, as it stands there: trained, pruned and distilled from a teacher's cache."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForTokenClassification

from distprune import settings
from distprune.commands.train import train
from tests.unit.task_files import make_tokenizer
from tests.world import Worlds

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def write(folder: Path) -> list[str]:
    """Write the page's module, data and a model; return a run's overrides."""
    (code,) = re.findall(r"```python\n(# tagging.py.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "tagging.py").write_text(code)
    rows = [{"words": list("abcd"[: 2 + n % 3]), "tags": ["NAME" if n % 2 else "O"] * (2 + n % 3)} for n in range(40)]
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
