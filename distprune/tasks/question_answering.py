"""Questions whose answer is a span of a context, or that have none: SQuAD 1.1 and 2."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForQuestionAnswering, PretrainedConfig, PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError
from distprune.tasks.base import Batch, Example, Task
from distprune.tasks.data import choose, load_splits, quiet
from distprune.tasks.metrics import check_suited
from distprune.tasks.squad_metrics import (
    ANSWER_METRICS,
    best_spans,
    measure_answers,
    pick_windows,
)
from distprune.tasks.windows import check_questions, check_windows, windows

PADDING = -1e4
"""Logit of what is no token: no part of any softmax, and finite in half precision."""


class Question(NamedTuple):
    """What an answer is read off, and held against."""

    context: str
    answers: list[str]


class QuestionAnswering(Task):
    """Extractive question answering; a row is a window of a question's context.

    Evaluation rows have further columns: those of `windows` with places, and ``question``.
    """

    auto_class = AutoModelForQuestionAnswering
    hub_task = "question-answering"

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        super().__init__(config, tokenizer)
        task = config.task
        self._max_length, self._longest_answer = task.max_length, task.longest_answer
        self._questions: list[Question] = []
        self.metric_names = task.metrics or ANSWER_METRICS
        check_suited(self.metric_names, ANSWER_METRICS, task.name)
        check_windows(tokenizer, task)
        with quiet():
            splits = load_splits(task, [*task.text, task.label], self.notes)
            train = check_questions(splits.train, tokenizer, task, self.notes)
            held = train if task.holdout else check_questions(splits.validation, tokenizer, task, self.notes)
            more = {name: check_questions(each, tokenizer, task, self.notes) for name, each in splits.more.items()}
            train, held = choose(train, held, task, config.train.seed)
            self.train = windows(train, tokenizer, task, places=False)
            self.validation = self._evaluated(held, task)
            self.more_validation = {name: self._evaluated(rows, task) for name, rows in more.items()}

    def model_options(self) -> dict[str, Any]:
        """Return the number of labels: a start and an end."""
        return {"num_labels": 2}

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the padded tokens and ``labels``: the first and last token of each answer, int64, shape [B, 2]."""
        batch = self.pad(rows)
        labels = torch.tensor([row["label"] for row in rows])
        if self.padding_side == "left":
            labels += batch["input_ids"].shape[1] - torch.tensor([[len(row["input_ids"])] for row in rows])
        return {**batch, "labels": labels}

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the logits of starts and of ends, shape [B, 2, T], `PADDING` where there is no token."""
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        return logits.masked_fill(batch["attention_mask"][:, None] == 0, PADDING)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the cross entropy of logits [B, 2, T], the mean over all starts and ends."""
        return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())

    def split(self, logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Return the logits of each row, shape [2, length]."""
        return [row[:, mask] for row, mask in zip(logits, batch["attention_mask"].bool(), strict=True)]

    def join(self, rows: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """Return logits [B, 2, T] from those of the rows: the inverse of `split`."""
        return _padded(rows, self.padding_side)

    def mean_over_rows(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean: each row has two predictions, a start and an end."""
        return values.mean()

    def predictions(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the logits by the rows' own tokens, float32, shape [B, 2, task.max_length], the rest `PADDING`."""
        aligned = _padded(self.split(logits.float(), batch), "right")
        return F.pad(aligned, (0, self._max_length - aligned.shape[-1]), value=PADDING)

    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        """Return ``task.metrics`` of logits [N, 2, task.max_length], in their order: means over questions.

        Where some question of the data has no answer, none is predicted if its score is above the best span's.
        """
        found = self._predict(predictions, data)
        answers = [self._questions[number].answers for number in found]
        return measure_answers(self.metric_names, list(found.values()), answers)

    def check_labels(self, model_config: PretrainedConfig, who: str) -> None:
        """Check that a model predicts a start and an end.

        Raises:
            UserError: another number of labels; ``who`` says whose.
        """
        if model_config.num_labels != 2:
            raise UserError(
                f"{who} has {model_config.num_labels} labels; question answering allows 2, a start and an end"
            )

    def scored_by(self) -> Any:
        """Return the metrics, the longest answer, and all contexts and answers."""
        return [self.metric_names, self._longest_answer, self._questions]

    def _evaluated(self, rows: Dataset, task: TaskConfig) -> Dataset:
        """Return the windows with the numbers of their questions, which are kept, in ``question``."""
        context = task.text[1]
        found = windows(rows, self.tokenizer, task, places=True)
        numbers = {row: number for number, row in enumerate(rows["_row"][:], start=len(self._questions))}
        once: dict[str, str] = {}
        for row in rows.select_columns([context, task.label]):
            text = once.setdefault(row[context], row[context])  # many questions share a context
            self._questions.append(Question(text, row[task.label]["text"]))
        return found.add_column("question", np.array([numbers[row] for row in found["_row"][:]]))

    def _predict(self, predictions: torch.Tensor, data: Dataset) -> dict[int, str]:
        """Return a text for each question, by its number; an empty one for no answer."""
        logits, null = predictions.numpy(), np.array(data["null"][:])
        spans = best_spans(logits, np.array(data["context"][:]), self._longest_answer)
        nulls = logits[np.arange(len(logits)), :, null].sum(axis=1)
        picks = pick_windows(np.array(data["question"][:]), spans.score, nulls)
        numbers, scores = picks.questions.tolist(), spans.score[picks.windows]
        some_have_none = any(not any(self._questions[number].answers) for number in numbers)
        none = ~np.isfinite(scores) | (some_have_none & (picks.null > scores))
        rows = data.select_columns(["context", "starts", "ends"]).select(picks.windows)
        tokens = zip(spans.first[picks.windows].tolist(), spans.last[picks.windows].tolist(), strict=True)
        return {
            number: "" if is_none else self._read(number, row, *span)
            for number, is_none, row, span in zip(numbers, none, rows, tokens, strict=True)
        }

    def _read(self, number: int, window: Example, first: int, last: int) -> str:
        """Return the text of a question's context that some tokens of a window hold."""
        before = window["context"][0]
        return self._questions[number].context[window["starts"][first - before] : window["ends"][last - before]]


def _padded(rows: list[torch.Tensor], side: str) -> torch.Tensor:
    """Return logits of rows, each [2, length], as one tensor [B, 2, T], filled up with `PADDING` on a side."""
    turned = [row.T for row in rows]
    return pad_sequence(turned, batch_first=True, padding_value=PADDING, padding_side=side).transpose(1, 2)
