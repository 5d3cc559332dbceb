"""Plain text: masked tokens from those around them, or each token from those before it."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks.base import Batch, Example, Task
from distprune.tasks.data import check_text, choose, load_splits, quiet
from distprune.tasks.metrics import check_suited
from distprune.tasks.tokens import check_max_length, mapped

IGNORED = -100
MASKED, KEPT = 0.8, 0.1
"""What becomes of the tokens that are predicted, as in BERT; the others are replaced by random ones."""
_TOKENS_AT_ONCE = 1 << 24
"""Tokens that are cut into blocks at once: cutting takes several times their memory."""


class LanguageModelling(Task):
    """Prediction of the tokens of one text column.

    Texts are joined with the special tokens that the tokenizer adds to each, or with its end token where it adds none,
    and cut into blocks of ``task.max_length`` tokens; what is left at the end, and blocks without text, are dropped.
    A row is a block, while ``task.limit`` and ``task.holdout`` count texts. Every rank holds all blocks in
    memory, four bytes a token.

    Attributes:
        allowed: the metrics; the first two are the default.
    """

    cacheable = False
    pads = False
    allowed: ClassVar[list[str]] = ["perplexity", "nll"]

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        super().__init__(config, tokenizer)
        task = config.task
        if len(task.text) != 1:
            raise UserError(f"task.text is {task.text}; allowed for {task.name}: one column")
        if task.max_length < 2:
            raise UserError(f"task.max_length is {task.max_length}; allowed for {task.name}: at least 2")
        check_max_length(tokenizer, 1, task.max_length)
        check_suited(task.metrics, self.allowed, task.name)
        self.metric_names = task.metrics or self.allowed[:2]
        self._length = task.max_length
        with quiet():
            splits = load_splits(task, task.text, self.notes)
            for split in (splits.train, splits.validation, *splits.more.values()):
                check_text(split, task.text)
            train, validation = choose(splits.train.rows, splits.validation.rows, task, config.train.seed)
            self.train = self._blocks(train, task.text[0], splits.train.origin)
            self.validation = self._blocks(validation, task.text[0], splits.validation.origin)
            self.more_validation = {
                name: self._blocks(split.rows, task.text[0], split.origin) for name, split in splits.more.items()
            }

    @abstractmethod
    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return ``input_ids`` and ``labels``, int64, shape [B, T]: what each place's logits predict, or -100."""

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the logits where something is predicted, shape [N, V], row by row."""
        return super().logits(outputs, batch)[batch["labels"] != IGNORED]

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean over rows of the cross entropy of logits [N, V], in nats a predicted token."""
        return self.mean_over_rows(F.cross_entropy(logits.float(), _targets(batch), reduction="none"), batch)

    def split(self, logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Return what there is of each predicted token, such as logits [N, V], for each row of a batch."""
        return list(torch.split(logits, _counts(batch)))

    def join(self, rows: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return the logits of a batch from those of its rows: the inverse of `split`."""
        return torch.cat(rows)

    def predictions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return each row's sum of nats, number of predicted tokens, and how many are right: float32, shape [B, 3]."""
        rows = [
            torch.stack(
                [
                    F.cross_entropy(row.float(), targets, reduction="sum"),
                    torch.tensor(float(len(targets)), device=row.device),
                    (row.argmax(-1) == targets).sum().float(),
                ]
            )
            for row, targets in zip(self.split(logits, batch), self.split(_targets(batch), batch), strict=True)
        ]
        return torch.stack(rows)

    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        """Return ``task.metrics`` over all predicted tokens; ``nll`` is in nats a token, ``perplexity`` is exp(nll)."""
        nats, tokens, hits = predictions.double().sum(0)
        nll = nats / tokens
        measured = {"nll": nll, "perplexity": nll.exp(), "accuracy": hits / tokens}
        return {name: float(measured[name]) for name in self.metric_names}

    def check_outputs(self, student: PretrainedConfig, teacher: PretrainedConfig) -> None:
        """Check that the teacher puts out as many logits: models may have more than the tokenizer has tokens.

        Raises:
            UserError: another number of logits.
        """
        if student.vocab_size != teacher.vocab_size:
            raise UserError(
                f"the teacher's vocab_size is {teacher.vocab_size} and the student's {student.vocab_size}; "
                "they must be equal"
            )

    def _blocks(self, rows: Dataset, column: str, origin: str) -> Dataset:
        """Return blocks of tokens as ``input_ids``, their ``length``, and their number as ``_row``.

        Raises:
            UserError: there is not one.
        """
        texts = mapped(rows, _encode_texts, rows.column_names, tokenizer=self.tokenizer, column=column)
        pieces: list[Dataset] = []
        rest, tokens, number = np.zeros(0, np.int32), 0, 0
        for piece in _pieces(texts.data.column("input_ids")):
            joined, tokens = np.concatenate([rest, *piece]), tokens + sum(map(len, piece))
            blocks, rest = np.split(joined, [len(joined) // self._length * self._length])
            blocks = blocks.reshape(-1, self._length)
            blocks = blocks[self.is_text(blocks).any(axis=1)]
            if len(blocks):
                pieces.append(self._rows(blocks, number))
                number += len(blocks)
        if number == 0:
            raise UserError(
                f"column {column!r} of {origin} gives no block: it has {tokens} tokens; "
                f"allowed: at least task.max_length, {self._length}"
            )
        return concatenate_datasets(pieces)

    def _rows(self, blocks: npt.NDArray[Any], first: int) -> Dataset:
        numbers = np.arange(first, first + len(blocks))
        return Dataset.from_dict({"input_ids": blocks, "length": np.full(len(blocks), self._length), "_row": numbers})

    def is_text(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which tokens are not special."""
        return ~np.isin(ids, self.tokenizer.all_special_ids)


class MaskedLM(LanguageModelling):
    """Masked language modelling: in each block as many tokens are predicted, never special ones.

    Which they are is drawn anew in each step of training, and is always the same in evaluations.
    """

    auto_class = AutoModelForMaskedLM
    hub_task = "fill-mask"
    allowed: ClassVar[list[str]] = ["perplexity", "nll", "accuracy"]

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used, or a tokenizer without a mask token.
        """
        self._mask_token = mask_token(tokenizer)
        super().__init__(config, tokenizer)
        self._predicted = max(1, round(config.task.mask * config.task.max_length))

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return tokens, some of them masked or replaced, and ``labels``: the tokens that are predicted, else -100."""
        masked = [self._mask(row, draw) for row in rows]
        return {name: torch.from_numpy(np.stack([row[name] for row in masked])) for name in masked[0]}

    def _mask(self, row: Example, draw: int) -> dict[str, npt.NDArray[np.int64]]:
        random = np.random.default_rng([draw, row["_row"]])
        ids = np.array(row["input_ids"], dtype=np.int64)
        text = np.flatnonzero(self.is_text(ids))
        places = random.choice(text, min(self._predicted, len(text)), replace=False)
        labels = np.full_like(ids, IGNORED)
        labels[places] = ids[places]
        fate = random.random(len(places))
        ids[places[fate < MASKED]] = self._mask_token
        replaced = places[fate >= MASKED + KEPT]
        ids[replaced] = random.integers(len(self.tokenizer), size=len(replaced))
        return {"input_ids": ids, "labels": labels}


class CausalLM(LanguageModelling):
    """Causal language modelling: each token of a block but the first is predicted from those before it."""

    auto_class = AutoModelForCausalLM
    hub_task = "text-generation"

    def check_architecture(self, model_config: PretrainedConfig) -> None:
        """Refuse an encoder, whose attention sees the tokens that are to be predicted.

        Raises:
            UserError: with what makes a decoder of it.
        """
        is_encoder = model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if is_encoder and not any(getattr(model_config, name, False) for name in ("is_decoder", "causal")):
            raise UserError(
                f"task.name is causal_lm, and a {model_config.model_type} sees the tokens that it is to predict; "
                "allowed: a decoder, as is_decoder (XLM: causal) makes of it where it is true in config.json"
            )

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the tokens, and as ``labels`` the next ones; -100 at the end of a block."""
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": F.pad(ids[:, 1:], (0, 1), value=IGNORED)}


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of the mask token.

    Raises:
        UserError: there is none.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no mask token; allowed: that of a masked language model"
        )
    number: int = tokenizer.mask_token_id
    return number


def _counts(batch: Batch) -> list[int]:
    """Return how many tokens of each row are predicted."""
    counts: list[int] = (batch["labels"] != IGNORED).sum(1).tolist()
    return counts


def _targets(batch: Batch) -> torch.Tensor:
    """Return the tokens that are predicted, shape [N], row by row."""
    return batch["labels"][batch["labels"] != IGNORED]


def _pieces(texts: Any) -> Iterator[list[npt.NDArray[np.int32]]]:
    """Yield the tokens of all texts, so many at a time: those of a piece are what is in memory of them.

    Args:
        texts: a column of lists, as pyarrow's ChunkedArray.
    """
    held: list[npt.NDArray[np.int32]] = []
    for chunk in texts.chunks:
        tokens = chunk.flatten().to_numpy()
        while (missing := _TOKENS_AT_ONCE - sum(map(len, held))) <= len(tokens):
            yield [*held, tokens[:missing]]
            held, tokens = [], tokens[missing:]
        held.append(tokens)
    yield held


def _encode_texts(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, column: str
) -> dict[str, list[npt.NDArray[np.int32]]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    texts = tokenizer(rows[column], return_attention_mask=False, return_token_type_ids=False, verbose=False)
    added = tokenizer.num_special_tokens_to_add()
    end = [] if added or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {"input_ids": [np.array([*ids, *end] if len(ids) > added else [], np.int32) for ids in texts["input_ids"]]}
