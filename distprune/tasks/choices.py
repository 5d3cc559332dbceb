"""What tasks with choices share: which texts a row offers, which of them is right, and how both become a batch."""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import chain
from statistics import mode
from string import ascii_uppercase
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError, unknown
from distprune.tasks.base import Batch, Example, Task
from distprune.tasks.data import Split, check_text, count_train, load_splits, prepared, quiet
from distprune.tasks.metrics import check_suited, constant_remark, measure
from distprune.tasks.rows import screen

TOKENS = ("input_ids", "token_type_ids")


@dataclass(frozen=True)
class Choices:
    """What each row of a task offers.

    Attributes:
        number: of choices.
        answers: the place, from 0, of each value that the answer's column may hold.
    """

    number: int
    answers: dict[int | str, int]

    def of(self, split: Split, task: TaskConfig, notes: list[str]) -> Dataset:
        """Return the text columns, the choices as ``_choices``, the place of the right one as ``label``, and ``_row``.

        Args:
            split: the data.
            task: names the columns; ``bad_rows`` says what is done with rows that cannot be used.
            notes: a sentence is added for rows that are left out.

        Raises:
            UserError: such rows are refused, or a column holds something else.
        """
        texts, values = _texts(split, task.choices), _answers(split, task.label, task.labels)
        places = [self.answers.get(value, -1) for value in values]
        known = ", ".join(task.labels) or f"0 to {self.number - 1} or A to {ascii_uppercase[: self.number][-1]}"
        wrong = {
            f"have not {self.number} choices with text in {', '.join(task.choices)}": [
                row for row, offered in enumerate(texts) if not self._complete(offered)
            ],
            f"have an answer in column {task.label!r} that is none of {known}": [
                row for row, place in enumerate(places) if place < 0
            ],
        }
        rows = split.rows.select_columns([*task.text, "_row"])
        rows = rows.add_column("_choices", texts).add_column("label", places)
        return screen(rows, wrong, split.origin, task, notes)

    def _complete(self, offered: list[str | None]) -> bool:
        return len(offered) == self.number and all(text and text.strip() for text in offered)


def find_choices(split: Split, task: TaskConfig) -> Choices:
    """Find out what rows offer: as many choices as most rows of the training data.

    An answer is the place of the right choice from 0, or a letter from A; with ``task.labels`` it is one of these,
    which are in the order of the choices.

    Raises:
        UserError: no column of choices, one that holds no texts, a single choice, another number of labels, letters
            beside numbers, or numbers from 1, of which those below the last would name other choices.
    """
    found = {str(answer) for answer in _answers(split, task.label, task.labels)}
    if not task.labels and found & set(ascii_uppercase) and any(answer.isdecimal() for answer in found):
        raise UserError(
            f"answers in column {task.label!r} of {split.origin} are letters and numbers; allowed: one of the two, or "
            "task.labels, the answers in the order of the choices"
        )
    number = mode(map(len, _texts(split, task.choices)))
    if number < 2:
        raise UserError(f"rows of {split.origin} have {number} choices in {task.choices}; allowed: 2 or more")
    if not task.labels and str(number) in found and "0" not in found:
        raise UserError(
            f"answers in column {task.label!r} of {split.origin} count from 1; allowed: from 0, or task.labels="
            f"[{','.join(map(str, range(1, number + 1)))}]"
        )
    if task.labels and len(task.labels) != number:
        raise UserError(f"task.labels names {len(task.labels)} answers; allowed: one for each of {number} choices")
    answers: dict[int | str, int] = {}
    for place, name in enumerate(task.labels or map(str, range(number))):
        answers[name] = place
        if name.isdecimal():
            answers[int(name)] = place
    if not task.labels:
        answers.update(zip(ascii_uppercase, range(number), strict=False))
    return Choices(number, answers)


class ChoiceTask(Task):
    """A task whose rows offer equally many texts, one of which is right; the model gives each a score.

    A row holds ``input_ids``, and ``token_type_ids`` where the tokenizer gives them, as lists of one list for each
    choice; its ``length`` is that of the longest.

    Attributes:
        choices: what each row offers.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        super().__init__(config, tokenizer)
        task = config.task
        check_suited(task.metrics, ["accuracy"], task.name)
        with quiet():
            splits = load_splits(task, _columns(task), self.notes)
            for split in (splits.train, splits.validation, *splits.more.values()):
                check_text(split, task.text)
            self.choices = find_choices(splits.train, task)
            self.train, self.validation, self.more_validation = prepared(
                splits, config, self.notes, self.usable, lambda rows: self.encode(rows, task)
            )

    @abstractmethod
    def encode(self, rows: Dataset, task: TaskConfig) -> Dataset:
        """Return tokenised rows with ``cut``, whether some of a choice's text was cut off."""

    def usable(self, split: Split, task: TaskConfig) -> Dataset:
        """Return the rows of a split that can be used, as of `Choices.of`.

        Raises:
            UserError: there are others, and they are refused.
        """
        return self.choices.of(split, task, self.notes)

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the padded tokens of all choices, shape [B, C, T], and ``labels``, int64, shape [B]."""
        names = [name for name in TOKENS if name in rows[0]]
        flat = [
            dict(zip(names, choice, strict=True))
            for row in rows
            for choice in zip(*(row[name] for name in names), strict=True)
        ]
        tokens = {name: by_choice(tensor, len(rows)) for name, tensor in self.pad(flat).items()}
        return {**tokens, "labels": torch.tensor([row["label"] for row in rows])}

    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        """Return the accuracy of scores [N, C]."""
        return measure(["accuracy"], predictions, torch.tensor(data["label"][:]), regression=False)

    def remark(self, metrics: dict[str, float]) -> str | None:  # noqa: D102
        return constant_remark(metrics, self.validation["label"][:])

    @classmethod
    def count_train(cls, config: Config) -> int | None:
        """Return the number of training rows; None where some may be left out."""
        return count_train(config.task, _columns(config.task), config.train.seed)


def by_choice(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return what came choice by choice, shape [B * C, ...], row by row, shape [B, C, ...]."""
    return tensor.view(rows, -1, *tensor.shape[1:])


def grouped(values: list[Any], number: int) -> list[list[Any]]:
    """Return what came choice by choice as lists of ``number``, one for each row."""
    return [values[start : start + number] for start in range(0, len(values), number)]


def flattened(choices: list[list[str]]) -> list[str]:
    """Return the choices of all rows, one after another."""
    return list(chain.from_iterable(choices))


def _columns(task: TaskConfig) -> list[str]:
    """Return the columns that the data must have, each once."""
    return list(dict.fromkeys([*task.text, *(path.partition(".")[0] for path in task.choices), task.label]))


def _texts(split: Split, paths: list[str]) -> list[list[str | None]]:
    """Return the choices of each row, also where one has too few, or some are missing."""
    if not paths:
        raise UserError("task.choices is empty; allowed: the column of all choices, or a column for each")
    columns = [_column(split, path, is_list=len(paths) == 1) for path in paths]
    if len(columns) > 1:
        return [list(row) for row in zip(*columns, strict=True)]
    return [row or [] for row in columns[0]]


def _column(split: Split, path: str, is_list: bool) -> list[Any]:
    """Return a column, or a part of a column, that holds texts, or lists of them."""
    name, _, part = path.partition(".")
    feature = split.rows.features[name]
    if part:
        parts = feature if isinstance(feature, dict) else {}
        if part not in parts:
            raise unknown(f"part of column {name!r} of {split.origin}", part, parts)
        feature = parts[part]
    held = getattr(feature, "feature", None) if is_list else feature
    if not (isinstance(held, Value) and held.dtype in ("string", "large_string")):
        raise UserError(
            f"{path!r} of {split.origin} holds {feature}; task.choices allows one column of lists of texts, or a "
            "column of texts for each choice"
        )
    values: list[Any] = split.rows[name][:]
    return [value[part] for value in values] if part else values


def _answers(split: Split, column: str, labels: list[str]) -> list[int | str]:
    feature = split.rows.features[column]
    if not isinstance(feature, Value | ClassLabel):
        raise UserError(f"column {column!r} of {split.origin} holds {feature}; answers are whole numbers or texts")
    answers: list[int | str] = split.rows[column][:]
    if isinstance(feature, ClassLabel) and labels:
        names = dict(enumerate(feature.names))
        return [names.get(int(answer), answer) for answer in answers]
    return answers
