"""Questions on contexts of any length: windows of tokens that overlap, and where in each of them the answer is."""

from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np
from datasets import Dataset, LargeList, List
from transformers import BatchEncoding, PreTrainedTokenizerBase

from distprune.config import TaskConfig
from distprune.errors import UserError
from distprune.tasks.data import Split, check_text
from distprune.tasks.rows import screen
from distprune.tasks.tokens import check_max_length, mapped

Answers = dict[str, list[Any] | None]


def check_windows(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> None:
    """Check that a tokenizer can cut a question and its context to windows.

    Raises:
        UserError: it cannot say which characters a token holds, ``task.max_length`` does not suit it, or
            ``task.text`` is not two columns.
    """
    if len(task.text) != 2:
        raise UserError(f"task.text is {task.text}; question answering allows two columns: [question, context]")
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} does not say which characters a token holds; allowed for "
            "question answering: a fast tokenizer, one with a tokenizer.json"
        )
    check_max_length(tokenizer, 2, task.max_length)


def check_questions(split: Split, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, notes: list[str]) -> Dataset:
    """Return the questions that can be used: columns ``task.text``, ``task.label`` and ``_row``.

    Args:
        split: the rows as they were read.
        tokenizer: the student's.
        task: the columns, the windows' length and ``bad_rows``.
        notes: a sentence is added for rows that are left out.

    Raises:
        UserError: columns of another type, no usable row, or unusable rows where they are refused.
    """
    check_text(split, task.text)
    held = split.rows.features[task.label]
    if not (isinstance(held, dict) and _lists(held, "text", "string", "large_string") and _lists(held, "answer_start")):
        raise UserError(
            f"column {task.label!r} of {split.origin} holds {held}; question answering needs "
            "{'text': [...], 'answer_start': [...]}, both empty where there is no answer"
        )
    room = task.max_length - tokenizer.num_special_tokens_to_add(pair=True) - task.stride
    sentences = {
        "unequal": "have answers that are not equally many texts and places",
        "elsewhere": "have an answer that is not in its context where it says",
        "long": f"have a question of {room} tokens or more, which with task.max_length {task.max_length} and "
        f"task.stride {task.stride} leaves no room for a context",
    }
    rows = split.rows.select_columns([*task.text, task.label, "_row"])
    options = {"tokenizer": tokenizer, "text": task.text, "label": task.label, "room": room}
    faults = np.array(mapped(rows, _faults, rows.column_names, **options)["fault"][:])
    wrong = {sentence: np.flatnonzero(faults == fault).tolist() for fault, sentence in sentences.items()}
    return screen(rows, wrong, split.origin, task, notes)


def windows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, places: bool) -> Dataset:
    """Return the windows of questions; cached on disk by what goes in.

    Args:
        rows: of `check_questions`.
        tokenizer: the student's.
        task: the columns, and the length and the overlap of windows.
        places: whether to add what it takes to read an answer off a window.

    Returns:
        ``input_ids``, ``token_type_ids`` where the tokenizer gives them, ``length``, ``_row``, and ``label``: the first
        and the last token of the first answer, twice the null token where not all of it is in the window. With
        ``places`` also ``null`` (the token that stands for no answer), ``context`` (its first token, and the one after
        its last), and ``starts`` and ``ends``: the characters of the context that each of its tokens holds.
    """
    options = {
        "tokenizer": tokenizer,
        "text": task.text,
        "label": task.label,
        "max_length": task.max_length,
        "stride": task.stride,
        "places": places,
    }
    return mapped(rows, _windows, rows.column_names, **options)


def _lists(held: dict[str, Any], name: str, *types: str) -> bool:
    """Return whether a field holds lists of these types, of whole numbers without any; all may be empty."""
    feature = held.get(name)
    if not isinstance(feature, List | LargeList):
        return False
    kind = str(getattr(feature.feature, "dtype", ""))
    return kind == "null" or (kind in types if types else kind.startswith(("int", "uint")))


def _faults(
    rows: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, text: list[str], label: str, room: int
) -> dict[str, list[str]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    questions, contexts = (rows[name] for name in text)
    tokens = tokenizer(questions, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    faults = [
        "long" if len(ids) >= room else _fault(answers, context)
        for ids, answers, context in zip(tokens, rows[label], contexts, strict=True)
    ]
    return {"fault": faults}


def _fault(answers: Answers, context: str) -> str:
    texts, starts = answers["text"], answers["answer_start"]
    if texts is None or starts is None or len(texts) != len(starts) or None in texts or None in starts:
        return "unequal"
    for text, start in zip(texts, starts, strict=True):
        if start < 0 or context[start : start + len(text)] != text:
            return "elsewhere"
    return ""


def _windows(
    rows: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text: list[str],
    label: str,
    max_length: int,
    stride: int,
    places: bool,
) -> dict[str, list[Any]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    tokens = tokenizer(
        *(rows[name] for name in text),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    owners, offsets = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
    answers = [_first_answer(each) for each in rows[label]]
    found = [
        _place(tokens, number, offsets[number], tokenizer, answers[owner]) | {"_row": rows["_row"][owner]}
        for number, owner in enumerate(owners)
    ]
    names = ["length", "label", "_row"] + ["null", "context", "starts", "ends"] * places
    return {**tokens, **{name: [window[name] for window in found] for name in names}}


def _first_answer(answers: Answers) -> tuple[int, int] | None:
    """Return the characters [start, end) of the first answer without space around it; None where there is none."""
    if not answers["text"] or not answers["text"][0].strip():
        return None
    assert answers["answer_start"]
    text, start = answers["text"][0], answers["answer_start"][0]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def _place(
    tokens: BatchEncoding,
    number: int,
    offsets: list[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    answer: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return where a window's context is, and where the answer, as `windows` says."""
    sides, ids = tokens.sequence_ids(number), tokens["input_ids"][number]
    count = sides.count(1)
    first = sides.index(1) if count else len(sides)
    starts, ends = ([offset[side] for offset in offsets[first : first + count]] for side in (0, 1))
    null = _null_token(ids, tokenizer)
    span = _tokens_of(answer, starts, ends) if answer else None
    label = [first + span[0], first + span[1]] if span else [null, null]
    places = {"null": null, "context": [first, first + count], "starts": starts, "ends": ends}
    return {"length": len(ids), "label": label} | places


def _null_token(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the place of the classification token, else of that of the beginning, else 0."""
    return next((ids.index(each) for each in (tokenizer.cls_token_id, tokenizer.bos_token_id) if each in ids), 0)


def _tokens_of(answer: tuple[int, int], starts: list[int], ends: list[int]) -> tuple[int, int] | None:
    """Return the first and the last token that hold characters [start, end); None where not all of them are held."""
    start, end = answer
    if not starts or start < starts[0] or ends[-1] < end:
        return None
    first, last = bisect_right(ends, start), bisect_left(starts, end) - 1
    return (first, last) if first <= last else None
