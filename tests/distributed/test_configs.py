"""Every shipped configuration is built: on rows in its columns, with a small random model of its family for weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, PretrainedConfig, RobertaConfig

from distprune import settings
from distprune.config import Config
from distprune.engines.evaluate import on_device
from distprune.tasks import TASKS
from distprune.training.objective import Objective
from distprune.training.setup import prepare
from tests.unit.task_files import make_masked_tokenizer
from tests.unit.test_configs import CONFIGS, RUNS, name
from tests.world import Worlds

ROWS = 96
LETTERS = "abcdefghij"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES = {"max_position_embeddings": 530}


def text(row: int, words: int) -> str:
    return " ".join(LETTERS[(row * 7 + word * word) % 10] for word in range(words))


def row_of(task: Any, row: int) -> dict[str, Any]:
    """Return a row in a task's columns."""
    content: dict[str, Any] = {column: text(row, 6 + row % 5) for column in task.text}
    if task.name == "question_answering":
        content["answers"] = {"text": [content["context"][2:5]], "answer_start": [2]}
    elif task.name == "text_classification":
        kinds = 3 if task.subset == "mnli" else 2
        content[task.label] = 5 * row / ROWS if task.regression else row % kinds
    elif task.name in ("multiple_choice", "choice_by_masked_lm"):
        if task.name == "choice_by_masked_lm":
            content["sentence"] = f"a _ {text(row, 4)}"
        offered = [text(row + number, 2) for number in range(4 if len(task.choices) == 1 else 2)]
        for place, path in enumerate(task.choices):
            column, _, part = path.partition(".")
            value = offered if len(task.choices) == 1 else offered[place]
            content[column] = {part: value} if part else value
        content[task.label] = (task.labels or "ABCD")[row % len(offered)]
    return content


def family(path: str, vocabulary: int) -> PretrainedConfig:
    """Return a small configuration of the family that a model's name tells."""
    if "gpt2" in path:
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=vocabulary, n_positions=530)
    kind = RobertaConfig if "roberta" in path else BertConfig
    return kind(vocab_size=vocabulary, **SIZES, **PLACES)


def write_for(config: Config, folder: Path) -> None:
    """Write data and models in place of a configuration's own."""
    rows = [row_of(config.task, row) for row in range(ROWS)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_masked_tokenizer()
    labels = {} if config.task.name != "text_classification" else {"num_labels": len({row["label"] for row in rows})}
    if config.task.regression:
        labels = {"num_labels": 1}
    shape = family(config.model.path, len(tokenizer))
    shape.update(labels)
    torch.manual_seed(0)
    model = TASKS[config.task.name].auto_class.from_config(shape)
    if config.pruning.start_sparse:
        for parameter in model.base_model.encoder.parameters():
            parameter.data[..., ::2] = 0
    for each in ("model", "teacher"):
        model.save_pretrained(folder / each)
        tokenizer.save_pretrained(folder / each)


def build(path: Path, folder: Path) -> list[float]:
    """Build a run and return the losses of its first batch. Collective."""
    given = settings.load(str(path), [])
    write_for(given, folder)
    more = [f"{folder}/validation.jsonl"] * len(given.task.more_validation)
    config = settings.load_valid(
        str(path),
        [
            f"model.path={folder}/model",
            "task.hub=null",
            "task.subset=null",
            f"task.train={folder}/train.jsonl",
            f"task.validation={folder}/validation.jsonl",
            f"task.more_validation={json.dumps(more)}",
            *([f"teacher.path={folder}/teacher", "teacher.cache=null"] if given.teacher.path else []),
            # The smallest batch of the smallest model is enough; a step is no multiple of the data's.
            "train.batch_size=4",
            *(["task.max_length=32", "task.stride=8"] if given.task.max_length > 32 else []),
        ],
    )
    setup = prepare(config)
    rows = list(range(4))
    batch = on_device(setup.task.collate(setup.task.train.__getitems__(rows)), setup.student)
    losses = Objective(setup.task, setup.teacher, config.distillation).losses(setup.student, batch, rows)
    assert (setup.pruner is not None) == (config.pruning.sparsity > 0 or config.pruning.start_sparse)
    setup.student.destroy()
    return [float(each) for each in losses]


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * path.stem.endswith("ep"), id=name(path)) for path in RUNS]
)
def test_every_configuration_is_built(world: Worlds, tmp_path: Path, path: Path) -> None:
    (losses,) = world(1).run(build, path, tmp_path)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[1] != 0


def test_there_are_configurations() -> None:
    assert len(RUNS) > 40
    assert {path.parent.name for path in RUNS} == {"configs", "bert_base", "roberta_large", "small"}
    assert CONFIGS.is_dir()
