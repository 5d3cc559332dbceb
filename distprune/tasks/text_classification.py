"""Single texts or pairs of texts to a class, or to a number (``task.regression``)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError
from distprune.tasks.base import Batch, Example, Task
from distprune.tasks.data import Split, check_text, choose, load_splits, quiet, tokenize
from distprune.tasks.labels import find_classes, find_numbers
from distprune.tasks.metrics import check_metrics, measure


class TextClassification(Task):
    """Classification of one or two text columns; all tasks of GLUE are of this kind."""

    auto_class = AutoModelForSequenceClassification

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        super().__init__(tokenizer)
        task = config.task
        self.metric_names = task.metrics
        self._pairs = len(task.text) == 2
        with quiet():
            train, validation = load_splits(task, [*task.text, task.label], cache_dir)
            for split in (train, validation):
                check_text(split, task.text)
            self.classes = None if task.regression else find_classes(train, task.label, task.labels)
            check_metrics(task.metrics, len(self.classes.names) if self.classes else 1, task.regression)
            parts = choose(self._label(train, task), self._label(validation, task), task, config.train.seed)
            self.train, self.validation = (tokenize(rows, tokenizer, task.text, task.max_length) for rows in parts)

    def model_options(self) -> dict[str, Any]:
        """Return the number of labels, their names, and the problem type."""
        if self.classes is None:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.classes.names))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def collate(self, examples: list[Example]) -> Batch:
        """Return the padded tokens and ``labels``, shape [B]: int64 classes, or float32 numbers."""
        dtype = torch.float32 if self.classes is None else torch.int64
        labels = torch.tensor([example["label"] for example in examples], dtype=dtype)
        return {**self.pad(examples), "labels": labels}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy, or the mean squared error of a regression.

        Args:
            logits: shape [B, C], any float type.
            labels: shape [B], as :meth:`collate` gives them.
        """
        if self.classes is None:
            return F.mse_loss(logits.float().squeeze(-1), labels)
        return F.cross_entropy(logits.float(), labels)

    def metrics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Return ``task.metrics`` in their order.

        Args:
            logits: shape [N, C], float32 on the CPU.
            labels: shape [N].
        """
        return measure(self.metric_names, logits, labels, regression=self.classes is None)

    def check_teacher(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher reads the student's tokens and predicts the same labels in the same order.

        Raises:
            UserError: another vocabulary, number of labels, or order of labels; a teacher of pairs that tells the two
                texts apart by token types, where the student's tokenizer gives none.
        """
        super().check_teacher(teacher_config, teacher_tokenizer)
        self.check_labels(teacher_config, "the teacher")
        has_types = getattr(teacher_config, "type_vocab_size", 0) > 1
        reads_types = has_types and "token_type_ids" in teacher_tokenizer.model_input_names
        if self._pairs and reads_types and "token_type_ids" not in self.train.column_names:
            raise UserError(
                "the teacher tells the two texts of a pair apart by token_type_ids, and the student's tokenizer gives "
                "none; allowed: a teacher of the student's kind, or model.tokenizer set to the teacher's"
            )

    def check_labels(self, model_config: PretrainedConfig, who: str) -> None:
        """Check that a model predicts the task's labels in the task's order.

        Only names can show another order: it is not seen where either side has none (``LABEL_0``, ...), or
        where the two name their classes differently.

        Raises:
            UserError: another number of labels, or another order; ``who`` says whose.
        """
        ours = self.classes.names if self.classes else ["LABEL_0"]
        theirs = [str(name) for _, name in sorted(model_config.id2label.items())]
        if len(ours) != len(theirs):
            raise UserError(f"{who} has {len(theirs)} labels and the task {len(ours)}; they must be equally many")
        ours_folded, theirs_folded = ([name.casefold() for name in names] for names in (ours, theirs))
        if ours_folded != theirs_folded and sorted(ours_folded) == sorted(theirs_folded):
            raise UserError(
                f"{who}'s labels are in the order {', '.join(theirs)} and the task's in the order "
                f"{', '.join(ours)}; they must be in the same order (see task.labels)"
            )

    def _label(self, split: Split, task: TaskConfig) -> Dataset:
        """Return the text columns and the numbers that the model predicts, as ``label``."""
        numbers = self.classes.encode(split, task.label) if self.classes else find_numbers(split, task.label)
        return split.rows.select_columns(task.text).add_column("label", numbers)
