"""The right one of several texts, each read together with what was asked."""

from string import Formatter
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForMultipleChoice, PretrainedConfig, PreTrainedTokenizerBase

from distprune.config import Config, TaskConfig
from distprune.errors import UserError, unknown
from distprune.tasks.base import Batch
from distprune.tasks.choices import ChoiceTask, flattened, grouped
from distprune.tasks.tokens import are_cut, check_max_length, mapped

CHOICE = "choice"

Template = list[tuple[str, str]]
"""What stands before a field, and the field; the last may be no field."""


class MultipleChoice(ChoiceTask):
    """Multiple choice by a score for each choice, such as CommonsenseQA, RACE and WinoGrande.

    A choice is read in ``task.form``: one text, or two that go in as a pair, of which only the first is cut to
    ``task.max_length``. What SMC-Bench reads:

    - CommonsenseQA: ``["Q: {question}", "A: {choice}"]``, with choices ``[choices.text]``;
    - RACE: ``["{article}", "{question} {choice}"]``, with choices ``[options]``. It puts the choice into the blank of a
      question that has one, which is to be done to the data.
    """

    auto_class = AutoModelForMultipleChoice
    hub_task = "multiple-choice"

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load, check and tokenise the data.

        Raises:
            UserError: input that cannot be used.
        """
        self._templates = parse_form(config.task)
        check_max_length(tokenizer, len(self._templates), config.task.max_length)
        super().__init__(config, tokenizer)

    def encode(self, rows: Dataset, task: TaskConfig) -> Dataset:
        """Return tokenised rows with ``cut``, whether some of a choice's text was cut off."""
        options = {"tokenizer": self.tokenizer, "templates": self._templates, "max_length": task.max_length}
        return mapped(rows, _encode_choices, [*task.text, "_choices"], **options)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean cross entropy of scores [B, C]."""
        return F.cross_entropy(logits.float(), batch["labels"])

    def check_teacher(self, teacher_config: PretrainedConfig, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher reads the student's tokens, and can tell the texts of a pair apart.

        Raises:
            UserError: another vocabulary, or token types that the student's tokenizer does not give.
        """
        super().check_teacher(teacher_config, teacher_tokenizer)
        if len(self._templates) == 2:
            self.check_token_types(teacher_config, teacher_tokenizer)


def parse_form(task: TaskConfig) -> list[Template]:
    """Return the templates of ``task.form``; without one, the text columns and then the choice, as a pair.

    Nothing but the texts themselves can stand in a field, which is what it is named and nothing within it.

    Raises:
        UserError: more than two templates, one that cannot be read, a field that is no text column, or a choice that
            is nowhere, or in the first of a pair, which may be cut.
    """
    if CHOICE in task.text:
        raise UserError(f"task.text is {task.text}; allowed: other columns than {CHOICE!r}, which stands for a choice")
    if not task.form:
        return [[(" " if number else "", column) for number, column in enumerate(task.text)], [("", CHOICE)]]
    templates = [_parse(template, [*task.text, CHOICE]) for template in task.form]
    has_choice = [any(field == CHOICE for _, field in template) for template in templates]
    if has_choice not in ([True], [False, True]):
        raise UserError(f"task.form is {task.form}; allowed: one text with {{choice}}, or two with it in the second")
    return templates


def _parse(template: str, columns: list[str]) -> Template:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"task.form: {template!r} cannot be read: {error}; allowed: columns in braces, and {{{{ or }}}} for a brace"
        ) from error
    parsed: Template = []
    for before, field, specification, conversion in parts:
        if field is None:
            parsed.append((before, ""))
            continue
        name = field + (f"!{conversion}" if conversion else "") + (f":{specification}" if specification else "")
        if name not in columns:
            raise unknown(f"task.form: the field {{{name}}} of {template!r} is no column of task.text:", name, columns)
        parsed.append((before, name))
    return parsed


def _render(template: Template, values: dict[str, str]) -> str:
    return "".join(before + values.get(field, "") for before, field in template)


def _encode_choices(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, templates: list[Template], max_length: int
) -> dict[str, list[Any]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    number = len(rows["_choices"][0])
    values = [
        {name: column[place // number] for name, column in rows.items()} | {CHOICE: choice}
        for place, choice in enumerate(flattened(rows["_choices"]))
    ]
    texts = [[_render(template, each) for each in values] for template in templates]
    tokens = _tokens(texts, tokenizer, max_length)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    cut = are_cut(tokenizer, texts, lengths, max_length)
    return {
        **{name: grouped(column, number) for name, column in tokens.items()},
        "length": [max(group) for group in grouped(lengths, number)],
        "cut": [any(group) for group in grouped(cut, number)],
    }


def _tokens(texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    """Return tokens by name; of a pair only the first text is cut, unless the second alone is too long."""
    if len(texts) == 1:
        return dict(tokenizer(texts[0], truncation=True, max_length=max_length, return_attention_mask=False))
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - 1
    seconds = tokenizer(texts[1], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens: dict[str, list[Any]] = {}
    for fits, truncation in ((True, "only_first"), (False, "longest_first")):
        places = [place for place, ids in enumerate(seconds) if (len(ids) <= room) == fits]
        if places:
            pair = ([text[place] for place in places] for text in texts)
            encoded = tokenizer(*pair, truncation=truncation, max_length=max_length, return_attention_mask=False)
            for name, column in encoded.items():
                whole = tokens.setdefault(name, [None] * len(seconds))
                for place, ids in zip(places, column, strict=True):
                    whole[place] = ids
    return tokens
