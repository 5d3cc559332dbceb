"""What a model must have in common with a run."""

from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from distprune.config import Config
from distprune.errors import UserError
from distprune.models.weights import skeleton
from distprune.pruning.targets import freeze
from distprune.tasks.base import Task
from distprune.training.fit import check_model, check_zeros
from distprune.training.plan import make_plan
from tests.distributed.engines import write_model

WORDS = "bert.embeddings.word_embeddings.weight"


class Read:
    """Stands in for a task, with what is looked at before a model is read."""

    auto_class = AutoModelForSequenceClassification
    tokenizer: tuple[str, ...] = ()
    train: ClassVar = {"length": [3]}

    def check_order(self, *_: Any) -> None:
        """Take any order."""

    def check_architecture(self, model_config: PretrainedConfig) -> None:
        if model_config.num_labels == 7:
            raise UserError("this architecture is not for the task")

    def evaluations(self) -> dict[str, Any]:
        return {"": self.train}

    def model_options(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("score", "regrows", "option", "part"),
    [
        ("magnitud", 0.0, {}, r"score 'magnitud' is unknown \(did you mean 'magnitude'\?\)"),
        ("taylor", 0.0, {"fp16": {"enabled": True}}, "pruning.score is 'taylor', and fp16 scales the gradients"),
        ("magnitude", 0.5, {"fp16": {"enabled": True}}, "regrowth.part is 0.5, and fp16 scales the gradients"),
        ("movement", 0.5, {}, "with which weights come back already"),
    ],
)
def test_a_score_is_looked_at_before_models_are_read(
    tmp_path: Path, score: str, regrows: float, option: dict[str, Any], part: str
) -> None:
    """So `distprune prepare` finds it, and no teacher is run before."""
    directory, config = write_model(tmp_path / "model"), Config()
    config.pruning.sparsity, config.pruning.score, config.regrowth.part = 0.5, score, regrows
    config.pruning.start, config.pruning.end, config.deepspeed.student = "1 epochs", "2 epochs", option
    plan, task = make_plan(config, 64), cast("Task", Read())
    with pytest.raises(UserError, match=part):
        check_model(config, plan, task, directory)
    config.pruning.score, config.regrowth.part = "magnitude", 0.0
    check_model(config, plan, task, directory)


@pytest.mark.parametrize("rows", [0, 3])
def test_zeros_that_a_run_would_not_keep_are_not_said_to_stay(tmp_path: Path, rows: int) -> None:
    """Rows for padding are no such zeros."""
    directory, config = write_model(tmp_path / "model"), Config()
    config.pruning.start_sparse = True
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[WORDS][torch.arange(rows) + 1] = 0.0
    tensors[WORDS][0] = 0.0
    save_file(tensors, file, {"format": "pt"})
    model, _ = skeleton(directory, AutoModelForSequenceClassification, {})
    assert model.get_submodule(WORDS.removesuffix(".weight")).padding_idx == 0
    if rows == 0:
        check_zeros(config, model, directory)
        return
    with pytest.raises(UserError, match=rf"^{10 * rows} of \d+ weights of {WORDS} are zero, and it is not among what"):
        check_zeros(config, model, directory)
    config.pruning.components = [*config.pruning.components, "token_embedding"]
    check_zeros(config, model, directory)
    config.pruning.components.remove("token_embedding")
    config.pruning.start_sparse = False
    check_zeros(config, model, directory)
    config.pruning.start_sparse = True
    freeze(model, ["embeddings"])
    check_zeros(config, model, directory)


def test_a_model_that_does_not_fit_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that is not reached, a target of less than a unit, an architecture that the task is not for."""
    directory, config = write_model(tmp_path / "model"), Config()
    AutoConfig.from_pretrained(directory, hidden_dropout_prob=0.1).save_pretrained(directory)
    config.pruning.sparsity, config.pruning.structure, config.pruning.end = 0.001, "heads", "3 epochs"
    plan, task = make_plan(config, 64), Read()
    with pytest.raises(UserError, match=r"pruning.sparsity is 0.001, less than one unit of heads"):
        check_model(config, plan, cast("Task", task), directory)
    config.pruning.sparsity, config.model.dropout = 0.5, 0.25
    check_model(config, plan, cast("Task", task), directory)
    monkeypatch.setattr("distprune.training.fit.set_dropout", lambda options, *_: options)
    with pytest.raises(UserError, match=r"model.dropout is 0.25, and .* keeps 0.1"):
        check_model(config, plan, cast("Task", task), directory)
    config.model.dropout = None
    monkeypatch.setattr(task, "model_options", lambda: {"num_labels": 7})
    with pytest.raises(UserError, match="this architecture is not for the task"):
        check_model(config, plan, cast("Task", task), directory)
