"""Texts to tokens, kept in the cache of the datasets library."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distprune.errors import UserError


def check_max_length(tokenizer: PreTrainedTokenizerBase, texts: int, max_length: int) -> None:
    """Check that a tokenizer can cut to a length.

    Raises:
        UserError: it is more than the tokenizer allows, or leaves no place for this number of texts.
    """
    least = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if not least <= max_length <= tokenizer.model_max_length:
        raise UserError(
            f"task.max_length is {max_length}; this tokenizer and {texts} text columns allow {least} to "
            f"{tokenizer.model_max_length:g}"
        )


def mapped(
    rows: Dataset,
    function: Callable[..., Any],
    removed: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> Dataset:
    """Return what a function makes of batches of rows; cached on disk by what goes in, and by the function's name only.

    Args:
        rows: columns.
        function: of a batch of rows, as lists by column, ``tokenizer`` and ``options``.
        removed: columns that are left out of what comes back.
        tokenizer: the student's.
        options: of the function.

    Raises:
        UserError: a cache that cannot be written.
    """
    options["tokenizer"] = _without_origin(tokenizer)
    try:
        return rows.map(function, batched=True, remove_columns=list(removed), fn_kwargs=options)
    except OSError as error:
        raise UserError(
            f"the tokenised data cannot be written to the cache of the datasets library: {error}; allowed: "
            "HF_DATASETS_CACHE set to a folder that can be written"
        ) from error


def _without_origin(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy that the cache knows by what it does, and not by the directory that it came from.

    A call changes a fast tokenizer: its last truncation goes into the files that it writes. The copy keeps that.
    """
    twin = copy.deepcopy(tokenizer)
    twin.name_or_path, twin.init_kwargs = "", {}
    vars(twin).pop("vocab_file", None)
    return twin


def are_cut(
    tokenizer: PreTrainedTokenizerBase, columns: list[list[str]], lengths: list[int], max_length: int
) -> list[bool]:
    """Return which texts, or pairs of texts, have more tokens than those that were kept.

    Args:
        tokenizer: that they were tokenised by.
        columns: one list of texts, or two.
        lengths: tokens that were kept of each.
        max_length: the most that are kept.
    """
    full = [place for place, length in enumerate(lengths) if length == max_length]
    cut = [False] * len(lengths)
    if full:  # few: only these can be longer
        whole = tokenizer(*([column[place] for place in full] for column in columns), verbose=False)["input_ids"]
        for place, ids in zip(full, whole, strict=True):
            cut[place] = len(ids) > max_length
    return cut
