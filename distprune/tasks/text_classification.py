"""Single texts or pairs of texts to a class, or to a number (``task.regression``)."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError
from distprune.tasks.base import Batch, Example, Task
from distprune.tasks.data import Split, check_text, count_train, load_splits, prepared, quiet
from distprune.tasks.labels import encode_numbers, find_classes
from distprune.tasks.metrics import check_metrics, constant_remark, measure
from distprune.tasks.tokens import are_cut, check_max_length, mapped

_UNNAMED = re.compile(r"LABEL_\d+")


class TextClassification(Task):
    """Classification of one or two text columns; all tasks of GLUE are of this kind."""

    auto_class = AutoModelForSequenceClassification
    hub_task = "text-classification"

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        super().__init__(config, tokenizer)
        task = config.task
        self._pairs = len(task.text) == 2
        check_max_length(tokenizer, len(task.text), task.max_length)
        with quiet():
            splits = load_splits(task, [*task.text, task.label], self.notes)
            for split in (splits.train, splits.validation, *splits.more.values()):
                check_text(split, task.text)
            self.classes = None if task.regression else find_classes(splits.train, task.label, task.labels)
            self.metric_names = task.metrics or (["pearson", "spearman"] if task.regression else ["accuracy"])
            check_metrics(self.metric_names, len(self.classes.names) if self.classes else 1, task.regression)
            self.train, self.validation, self.more_validation = prepared(
                splits,
                config,
                self.notes,
                self._label,
                lambda rows: mapped(
                    rows, _encode_and_count, task.text, tokenizer, text=task.text, max_length=task.max_length
                ),
            )

    def model_options(self) -> dict[str, Any]:
        """Return the number of labels, their names where the task has any, the problem type, and the padding.

        A decoder reads its prediction at the last token that is none of padding.
        """
        padding = {"pad_token_id": self.tokenizer.pad_token_id}
        if self.classes is None:
            return {"num_labels": 1, "problem_type": "regression"} | padding
        options = {"num_labels": len(self.classes.names), "problem_type": "single_label_classification"} | padding
        if not self.classes.named:
            return options  # the model's own names stay
        numbers = {name: number for number, name in enumerate(self.classes.names)}
        return options | {"id2label": dict(enumerate(self.classes.names)), "label2id": numbers}

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the padded tokens and ``labels``, shape [B]: int64 classes, or float32 numbers."""
        dtype = torch.float32 if self.classes is None else torch.int64
        return {**self.pad(rows), "labels": torch.tensor([row["label"] for row in rows], dtype=dtype)}

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean cross entropy of logits [B, C], or the mean squared error of a regression."""
        if self.classes is None:
            return F.mse_loss(logits.float().squeeze(-1), batch["labels"])
        return F.cross_entropy(logits.float(), batch["labels"])

    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        """Return ``task.metrics`` of logits [N, C], in their order."""
        labels = torch.tensor(data["label"][:])
        return measure(self.metric_names, predictions, labels, regression=self.classes is None)

    def remark(self, metrics: dict[str, float]) -> str | None:  # noqa: D102
        return None if self.classes is None else constant_remark(metrics, self.validation["label"][:])

    @classmethod
    def count_train(cls, config: Config) -> int | None:
        """Return the number of training texts; None where some may be left out."""
        return count_train(config.task, [*config.task.text, config.task.label], config.train.seed)

    def check_teacher(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher reads the student's tokens and predicts the same labels in the same order.

        Raises:
            UserError: another vocabulary, number of labels, or order of labels; a teacher of pairs that tells the two
                texts apart by token types, where the student's tokenizer gives none.
        """
        super().check_teacher(teacher_config, teacher_tokenizer)
        if self._pairs:
            self.check_token_types(teacher_config, teacher_tokenizer)

    def check_labels(self, model_config: PretrainedConfig, who: str) -> None:
        """Check that a model predicts the task's labels in the task's order.

        Raises:
            UserError: another number of labels, or another order; ``who`` says whose.
        """
        ours, theirs = self._labels(model_config)
        if len(ours) != len(theirs):
            raise UserError(f"{who} has {len(theirs)} labels and the task {len(ours)}; they must be equally many")
        self.check_order(model_config, who)

    def check_order(self, model_config: PretrainedConfig, who: str) -> None:
        """Check that a model has not the task's labels in another order.

        Only names can show that: it is not seen where either side has none (``LABEL_0``, ...). Where the two name their
        classes differently, a note says which stand for which.

        Raises:
            UserError: it has; ``who`` says whose.
        """
        ours, theirs = self._labels(model_config)
        ours_folded, theirs_folded = ([name.casefold() for name in names] for names in (ours, theirs))
        if ours_folded != theirs_folded and sorted(ours_folded) == sorted(theirs_folded):
            raise UserError(
                f"{who}'s labels are in the order {', '.join(theirs)} and the task's in the order "
                f"{', '.join(ours)}; they must be in the same order (see task.labels)"
            )
        if not (set(ours_folded) & set(theirs_folded) or any(map(_UNNAMED.fullmatch, (*ours, *theirs)))):
            pairs = ", ".join(f"{their} for {our}" for our, their in zip(ours, theirs, strict=False))
            self.notes.append(f"{who} has other names for the classes, which are taken by their order: {pairs}")

    def _labels(self, model_config: PretrainedConfig) -> tuple[list[str], list[str]]:
        """Return the task's labels and a model's, each in their order."""
        ours = self.classes.names if self.classes else ["LABEL_0"]
        return ours, [str(name) for _, name in sorted(model_config.id2label.items())]

    def _label(self, split: Split, task: TaskConfig) -> Dataset:
        """Return the text columns and the numbers that the model predicts, as ``label``."""
        encode = self.classes.encode if self.classes else encode_numbers
        return encode(split, task.label, task, self.notes).select_columns([*task.text, "label", "_row"])


def _encode_and_count(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text: list[str], max_length: int
) -> dict[str, list[Any]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    columns = [rows[name] for name in text]
    tokens = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    return {**tokens, "length": lengths, "cut": are_cut(tokenizer, columns, lengths, max_length)}
