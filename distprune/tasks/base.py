"""What the training loop needs to know about a task, and nothing more."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from distprune.errors import UserError

Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Task(ABC):
    """Tokenised data, how it is batched, the loss and the metrics of one kind of task.

    Attributes:
        auto_class: the transformers Auto class of the model.
        train: training examples without padding: ``input_ids``, ``token_type_ids`` where the tokenizer
            gives them, ``label``, and ``length`` (the number of tokens).
        validation: evaluation examples, with the same columns.
    """

    auto_class: ClassVar[Any]
    train: Dataset
    validation: Dataset

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer.

        Raises:
            UserError: it has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token, which batches need")
        self.tokenizer = tokenizer

    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """Return what the task sets in the model's config."""

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Return the model's inputs and ``labels`` for some examples, padded to the longest of them."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch, a float32 scalar."""

    @abstractmethod
    def metrics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Return the metrics of all evaluation examples, the main one first."""

    @abstractmethod
    def check_labels(self, model_config: PretrainedConfig, who: str) -> None:
        """Check that a trained model predicts what the task asks for; ``who`` names it in the message."""

    def check_teacher(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher reads the student's tokens and that its logits mean the same.

        Raises:
            UserError: the vocabularies differ.
        """
        ours, theirs = self.tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if ours != theirs:
            differing = len(ours.items() ^ theirs.items())
            raise UserError(
                f"the teacher's vocabulary ({len(theirs)} tokens) is not the student's ({len(ours)} tokens): "
                f"{differing} entries differ, and distillation needs the same tokens with the same ids"
            )

    def pad(self, examples: list[Example]) -> Batch:
        """Pad tokens to the longest of the examples, on the tokenizer's side.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the examples have them, ``token_type_ids``: int64,
            shape [B, T].
        """

        def stack(rows: list[list[int]], filler: int) -> torch.Tensor:
            tensors = [torch.tensor(row) for row in rows]
            side = self.tokenizer.padding_side
            return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)

        fillers = {
            "input_ids": self.tokenizer.pad_token_id,
            "token_type_ids": self.tokenizer.pad_token_type_id,
        }
        batch = {
            name: stack([example[name] for example in examples], filler)
            for name, filler in fillers.items()
            if name in examples[0]
        }
        batch["attention_mask"] = stack([[1] * len(example["input_ids"]) for example in examples], 0)
        return batch
