"""What the training loop needs to know about a task, and nothing more."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xxhash
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks.data import fingerprint
from distprune.tasks.metrics import LOWER_IS_BETTER, merit_of

Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Task(ABC):
    """Tokenised data, how it is batched, the loss and the metrics of one kind of task.

    A row is what one forward pass reads of one example: the example itself, or a window of a long one.

    Attributes:
        auto_class: the transformers Auto class of the model.
        hub_task: the hub's name of this kind of task.
        pads: whether rows differ in length, so that batches need a padding token.
        cacheable: whether the teacher's logits of a training row are the same in every epoch, and small enough to keep.
        lower_is_better: names of metrics that are the better the lower.
        train: training rows without padding: ``input_ids``, ``token_type_ids`` where the tokenizer
            gives them, ``label``, and ``length`` (the number of tokens).
        validation: evaluation rows, with the same columns.
        more_validation: further evaluation data, by the name that their metrics are given.
        notes: what the user should know of the data: rows that were left out or cut short.
    """

    auto_class: ClassVar[Any]
    hub_task: ClassVar[str]
    pads: ClassVar[bool] = True
    cacheable: ClassVar[bool] = True
    lower_is_better: ClassVar[Collection[str]] = LOWER_IS_BETTER
    train: Dataset
    validation: Dataset
    more_validation: dict[str, Dataset]
    notes: list[str]

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer. Kinds of task load, check and tokenise the data of ``config.task``.

        Raises:
            UserError: the tokenizer has no padding token, and batches need one.
        """
        if self.pads and tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no padding token, which batches need; allowed: "
                "model.tokenizer with one (tokenizer.pad_token = tokenizer.eos_token; tokenizer.save_pretrained(DIR))"
            )
        self.tokenizer = tokenizer
        self.more_validation, self.notes = {}, []

    def model_options(self) -> dict[str, Any]:
        """Return what the task sets in the model's config."""
        return {}

    @abstractmethod
    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the model's inputs and ``labels`` for some rows, padded to the longest of them.

        Args:
            rows: of `train` or `validation`.
            draw: another one in each step of training, for what is drawn at random; together with the row it decides.
        """

    def inputs(self, batch: Batch) -> Batch:
        """Return what of a batch the model is given."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the logits in a model's outputs, each vector of the last dimension one prediction."""
        logits: torch.Tensor = outputs.logits
        return logits

    def run(self, engine: Any, batch: Batch, **options: bool) -> Any:
        """Return a model's outputs. Collective at ZeRO-3.

        Args:
            engine: of DeepSpeed.
            batch: of `collate`, on the engine's device.
            options: of the model's forward pass.
        """
        return engine(**self.inputs(batch), **options)

    def forward(self, engine: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of a model for a batch, as `run` and `logits` do. Collective at ZeRO-3."""
        return self.logits(self.run(engine, batch), batch)

    @abstractmethod
    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch's rows, a float32 scalar. Micro-batches and ranks count alike.

        Args:
            logits: of `forward`, any float type.
            batch: of `collate`.
        """

    def split(self, logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Return the logits of each row of a batch, or of each prediction another value, without padding."""
        return list(logits)

    def join(self, rows: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return the logits of a batch from those of its rows: the inverse of `split`."""
        return torch.stack(rows)

    def mean_over_rows(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean over a batch's rows of each row's own, 0 of one without a prediction: as `loss` counts rows.

        Args:
            values: one for each prediction, the shape of `logits` without its last dimension.
            batch: of `collate`.
        """
        rows = self.split(values, batch)
        if values.numel() and len({row.numel() for row in rows}) == 1:
            return values.mean()
        return torch.stack([row.sum() / max(1, row.numel()) for row in rows]).mean()

    def predictions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return what the metrics need of a batch, float32, shape [B, ...], with the same ... for all batches."""
        return logits.float()

    def merit(self, metrics: dict[str, float]) -> float:
        """Return what states of a model are compared by, the higher the better: `merit_of` the first metric."""
        name, value = next(iter(metrics.items()))
        return merit_of(value, name in self.lower_is_better)

    @abstractmethod
    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        """Return the metrics of evaluation data, the main one first.

        Args:
            predictions: of `predictions`, in the order of the rows, shape [N, ...], on the CPU.
            data: the rows.
        """

    def remark(self, metrics: dict[str, float]) -> str | None:
        """Return a sentence where metrics of the evaluation data are those of a model that has learnt nothing."""
        return None

    def check_labels(self, model_config: PretrainedConfig, who: str) -> None:  # noqa: B027
        """Check that a trained model predicts what the task asks for, as far as its configuration says.

        Raises:
            UserError: it does not; ``who`` names it.
        """

    def check_order(self, model_config: PretrainedConfig, who: str) -> None:  # noqa: B027
        """Check that a model that is still to be trained has not the task's labels in another order.

        Raises:
            UserError: it has; ``who`` names it.
        """

    def check_architecture(self, model_config: PretrainedConfig) -> None:  # noqa: B027
        """Check that a model, by the configuration that it has once it is built, does what the task asks of it.

        Raises:
            UserError: it does not.
        """

    @classmethod
    def count_train(cls, config: Config) -> int | None:
        """Return the number of training rows without tokenising them; None where that cannot be known."""
        return None

    def scored_by(self) -> Any:
        """Return what the metrics depend on beside predictions and rows, for JSON."""
        return getattr(self, "metric_names", None)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the training rows, and of the evaluation with all that its metrics depend on."""
        rows = {name: fingerprint(data) for name, data in self.evaluations().items()}
        evaluation = json.dumps([self.scored_by(), rows], sort_keys=True).encode()
        return {
            "the training data": fingerprint(self.train),
            "the evaluation": xxhash.xxh3_128(evaluation).hexdigest(),
        }

    def evaluations(self) -> dict[str, Dataset]:
        """Return all evaluation data by what their metrics' names begin with; the main one with nothing."""
        return {"": self.validation, **{f"{name}/": rows for name, rows in self.more_validation.items()}}

    def check_teacher(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher reads the student's tokens and that its logits mean the same.

        Raises:
            UserError: the vocabularies differ, or the labels do.
        """
        ours, theirs = self.tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if ours != theirs:
            differing = len(ours.items() ^ theirs.items())
            raise UserError(
                f"the teacher's vocabulary ({len(theirs)} tokens) is not the student's ({len(ours)} tokens): "
                f"{differing} entries differ, and distillation needs the same tokens with the same ids"
            )
        self.check_labels(teacher_config, "the teacher")

    def check_outputs(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:  # noqa: B027
        """Check what of the teacher's logits only the student's own configuration tells; most tasks have nothing.

        Raises:
            UserError: the teacher puts out others.
        """

    def check_token_types(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a teacher that tells the texts of a pair apart by token types is given them.

        Raises:
            UserError: the student's tokenizer gives none.
        """
        has_types = getattr(teacher_config, "type_vocab_size", 0) > 1
        reads_types = has_types and "token_type_ids" in teacher_tokenizer.model_input_names
        if reads_types and "token_type_ids" not in self.train.column_names:
            raise UserError(
                "the teacher tells the two texts of a pair apart by token_type_ids, and the student's tokenizer gives "
                "none; allowed: a teacher of the student's kind, or model.tokenizer set to the teacher's"
            )

    @cached_property
    def padding_side(self) -> Literal["left", "right"]:
        """Left where the tokenizer puts its classification token last, as XLNet's does, else right.

        A decoder's tokenizer may name the left, which is for generation: a model that counts its positions from the
        first place of a row, as GPT-2, would count the padding.
        """
        last = self.tokenizer("a")["input_ids"][-1]
        return "left" if last == self.tokenizer.cls_token_id else "right"

    def pad(self, rows: list[Example]) -> Batch:
        """Pad tokens to the longest of the rows, on `padding_side`.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the rows have them, ``token_type_ids``: int64,
            shape [B, T].
        """
        fillers = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        batch = {
            name: self.stack([row[name] for row in rows], filler) for name, filler in fillers.items() if name in rows[0]
        }
        batch["attention_mask"] = self.stack([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch

    def stack(self, rows: list[list[int]], filler: int) -> torch.Tensor:
        """Return numbers of each token as one tensor, int64, shape [B, T], filled up on `padding_side`."""
        longest, on_the_right = max(map(len, rows)), self.padding_side == "right"
        padded = np.full((len(rows), longest), filler, dtype=np.int64)
        for place, row in zip(padded, rows, strict=True):
            place[slice(len(row)) if on_the_right else slice(longest - len(row), None)] = row
        return torch.from_numpy(padded)
