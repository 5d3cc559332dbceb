"""Which of two texts fills a blank, by a masked language model and no new head: WinoGrande as in SMC-Bench."""

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError
from distprune.tasks.base import Batch, Example
from distprune.tasks.choices import ChoiceTask, by_choice, flattened, grouped
from distprune.tasks.data import Split
from distprune.tasks.language_modelling import IGNORED, mask_token
from distprune.tasks.rows import screen
from distprune.tasks.tokens import check_max_length, mapped

BLANK = "_"
WEIGHT, MARGIN = 5.0, 0.4
"""Of the loss where the wrong text is nearly as likely, or more."""


class ChoiceByMaskedLM(ChoiceTask):
    """A sentence with a blank, ``_``, and two texts for it.

    Each text is put into the blank and its tokens are masked; its score is their mean log-probability. A sentence of
    more than ``task.max_length`` tokens is cut to those around the blank.

    WinoGrande: text ``[sentence]``, choices ``[option1, option2]``, label ``answer``, labels ``["1", "2"]``.
    """

    auto_class = AutoModelForMaskedLM
    hub_task = "fill-mask"

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used; another number of text columns than one, or of choices than two.
        """
        mask_token(tokenizer)
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} does not say where in the text its tokens are; "
                "allowed for choice_by_masked_lm: a fast tokenizer"
            )
        if len(config.task.text) != 1:
            raise UserError(f"task.text is {config.task.text}; allowed for choice_by_masked_lm: one column")
        check_max_length(tokenizer, 1, config.task.max_length)
        super().__init__(config, tokenizer)

    def usable(self, split: Split, task: TaskConfig) -> Dataset:
        """Return the rows with one blank and two choices.

        Raises:
            UserError: there are others, and they are refused.
        """
        if self.choices.number != 2:
            raise UserError(f"task.choices gives {self.choices.number} choices; allowed for choice_by_masked_lm: 2")
        rows, (column,) = super().usable(split, task), task.text
        choices = self.tokenizer(flattened(rows["_choices"][:]), add_special_tokens=False, verbose=False)["input_ids"]
        wrong = {
            f"have not one blank, {BLANK!r}, in column {column!r}": [
                place for place, text in enumerate(rows[column][:]) if text.count(BLANK) != 1
            ],
            "have a choice without tokens": [
                place for place, pair in enumerate(grouped(choices, 2)) if not all(map(len, pair))
            ],
        }
        return screen(rows, wrong, split.origin, task, self.notes)

    def encode(self, rows: Dataset, task: TaskConfig) -> Dataset:
        """Return rows with masked tokens, ``targets`` (the tokens there, -100 elsewhere), and ``cut``."""
        (column,) = task.text
        options = {"tokenizer": self.tokenizer, "column": column, "max_length": task.max_length}
        return mapped(rows, _encode_masked_choices, [column, "_choices"], **options)

    def collate(self, rows: list[Example], draw: int = 0) -> Batch:
        """Return the padded tokens and ``targets``, int64, shape [B, 2, T], and ``labels``, shape [B]."""
        targets = self.stack([choice for row in rows for choice in row["targets"]], IGNORED)
        return {**super().collate(rows, draw), "targets": by_choice(targets, len(rows))}

    def inputs(self, batch: Batch) -> Batch:
        """Return the tokens of all choices, shape [2 B, T]."""
        return {name: tensor.flatten(0, 1) for name, tensor in batch.items() if name not in ("targets", "labels")}

    def logits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Return the score of each choice, float32, shape [B, 2]."""
        targets = batch["targets"].flatten(0, 1)
        masked = targets != IGNORED
        found = -F.cross_entropy(outputs.logits[masked].float(), targets[masked], reduction="none")
        scores = torch.zeros(targets.shape, device=targets.device).masked_scatter(masked, found)
        return (scores.sum(-1) / masked.sum(-1)).view(-1, 2)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean of ``-q + 5 max(0, c - q + 0.4)``, q the right choice's score and c the wrong one's."""
        right = logits.float().gather(1, batch["labels"][:, None])
        wrong = logits.float().gather(1, 1 - batch["labels"][:, None])
        return (WEIGHT * F.relu(wrong - right + MARGIN) - right).mean()


def _encode_masked_choices(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> dict[str, list[Any]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    choices = flattened(rows["_choices"])
    around = [text.split(BLANK) for text in rows[column] for _ in range(2)]
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_attention_mask": False}
    texts = [choice.join(parts) for choice, parts in zip(choices, around, strict=True)]
    tokens = dict(tokenizer(texts, verbose=False, **options))
    offsets, special, whole = tokens.pop("offset_mapping"), tokens.pop("special_tokens_mask"), tokens["input_ids"]
    spans = [
        (len(before.rstrip()), len(before) + len(choice)) for choice, (before, _) in zip(choices, around, strict=True)
    ]
    masked = [_within(*each) for each in zip(offsets, special, spans, strict=True)]
    windows = [_window(hidden, added, max_length) for hidden, added in zip(masked, special, strict=True)]
    mask = [[tokenizer.mask_token_id] * len(ids) for ids in whole]
    columns = {**tokens, "input_ids": _merge(masked, mask, whole)}
    columns["targets"] = _merge(masked, whole, [[IGNORED] * len(ids) for ids in whole])
    kept = {
        name: [[values[token] for token in window] for values, window in zip(column, windows, strict=True)]
        for name, column in columns.items()
    }
    cut = [len(window) < len(ids) for window, ids in zip(windows, whole, strict=True)]
    return {
        **{name: grouped(values, 2) for name, values in kept.items()},
        "length": [max(map(len, group)) for group in grouped(windows, 2)],
        "cut": [any(group) for group in grouped(cut, 2)],
    }


def _within(offsets: list[tuple[int, int]], special: list[int], span: tuple[int, int]) -> list[bool]:
    """Return which tokens are of a part of the text; some tokenizers' begin before their offset says, with a space."""
    return [
        begin < span[1] and end > span[0] and not added for (begin, end), added in zip(offsets, special, strict=True)
    ]


def _window(masked: list[bool], special: list[int], max_length: int) -> list[int]:
    """Return the places that are kept of a text: what the tokenizer adds, and as many on either side of the blank."""
    text = [place for place, added in enumerate(special) if not added]
    room = max_length - (len(special) - len(text))
    first, hidden = text.index(masked.index(True)), sum(masked)
    start = max(0, min(first - max(0, room - hidden) // 2, len(text) - room))
    kept = {*text[start : start + room]}
    return [place for place, added in enumerate(special) if added or place in kept]


def _merge(masked: list[list[bool]], inside: list[list[int]], outside: list[list[int]]) -> list[list[int]]:
    """Return for each text one list of numbers at the masked places, and another elsewhere."""
    return [
        [yes if hidden else no for hidden, yes, no in zip(*each, strict=True)]
        for each in zip(masked, inside, outside, strict=True)
    ]
