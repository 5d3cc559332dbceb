"""Every kind of task, evaluated on real ranks: the metrics do not depend on how many there are."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from distprune.config import Config
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import evaluate
from distprune.tasks import TASKS
from distprune.training.setup import load_task
from tests.unit.task_files import make_masked_tokenizer
from tests.world import Worlds, by_world

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
ROWS = 29  # no world size above 1 divides it

TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"text": ["text"], "choices": ["choices"], "label": "answer"},
    "choice_by_masked_lm": {"text": ["blank"], "choices": ["choices"], "label": "answer"},
    "masked_lm": {"text": ["text"], "max_length": 8, "metrics": ["accuracy", "perplexity", "nll"]},
    "causal_lm": {"text": ["text"], "max_length": 8},
}


def words(most: int) -> str:
    return " ".join(random.choices("abcdefghij", k=random.randint(1, most)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows that every kind of task can read, and a model for each."""
    folder = tmp_path_factory.mktemp("kinds")
    random.seed(0)
    torch.manual_seed(0)
    for name in ("train", "validation"):
        rows = [
            {
                "text": words(9),
                "blank": f"{words(5)} _ {words(3)}",
                "choices": [words(3), words(3)],
                "answer": "AB"[i % 2],
            }
            for i in range(ROWS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_masked_tokenizer()
    for name in TASK_OPTIONS:
        kind = LlamaConfig if name == "causal_lm" else BertConfig
        shape = {"vocab_size": len(tokenizer), "initializer_range": 0.5}
        TASKS[name].auto_class.from_config(kind(**shape, **SIZES)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def measured(folder: Path, name: str, stage: int) -> dict[str, float]:
    config = Config()
    options = {"name": name, "train": f"{folder}/train.jsonl", "validation": f"{folder}/validation.jsonl"}
    for key, value in (options | TASK_OPTIONS[name]).items():
        setattr(config.task, key, value)
    task = load_task(config, folder / name)
    section = {"zero_optimization": {"stage": stage}}
    engine = build_frozen(section, folder / name, task.auto_class, task.model_options(), 4)
    found = evaluate(engine, task, 4)
    engine.destroy()
    return found


@pytest.mark.parametrize("name", TASK_OPTIONS)
@by_world
def test_metrics_are_the_same_at_every_world_size(world: Worlds, data: Path, name: str, size: int) -> None:
    (alone,) = world(1).run(measured, data, name, 0)
    assert alone
    for stage in (0, 3):
        assert world(size).run(measured, data, name, stage) == [alone] * size
