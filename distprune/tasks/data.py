"""From the hub or from files to tokenised training and evaluation data, the same on every rank."""

import csv
import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase

from distprune.config import TaskConfig
from distprune.errors import UserError, unknown

HOLDOUT_SEED = 0

# Not load_dataset, which asks a server before it reads a local file. Tab-separated fields are not quoted
# (as in GLUE): a single quote in a sentence would swallow the rows up to the next.
READERS: dict[str, Callable[..., Dataset]] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".tsv": partial(Dataset.from_csv, sep="\t", quoting=csv.QUOTE_NONE),
    ".parquet": Dataset.from_parquet,
}

UNREADABLE = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError, StopIteration)


class Split(NamedTuple):
    """Rows as they were read, and how to call their source in a message."""

    rows: Dataset
    origin: str


@contextmanager
def quiet() -> Iterator[None]:
    """Switch the progress bars of the datasets library off."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def load_splits(task: TaskConfig, columns: Sequence[str], cache_dir: Path | None) -> tuple[Split, Split]:
    """Read all training and evaluation rows; with a holdout both are the training rows.

    Args:
        task: where the data are.
        columns: columns that must be there, without missing values.
        cache_dir: of the datasets library; null: its default.

    Raises:
        UserError: a split, file or column that is not there or cannot be read, no rows, or missing values.
    """
    names = [task.train] if task.holdout else [task.train, task.validation]
    local = [] if task.hub else [_read_file(task, name, cache_dir) for name in names]
    splits = local or _read_hub(task, names, cache_dir)
    for split in splits:
        _check(split, columns)
    return splits[0], splits[-1]


def type_of(split: Split, column: str) -> str:
    """Return the name of a column's plain type (``int64``, ...); empty for named classes and nesting."""
    feature = split.rows.features[column]
    return str(feature.dtype) if isinstance(feature, datasets.Value) else ""


def is_text(split: Split, column: str) -> bool:
    """Return whether a column holds strings."""
    return type_of(split, column) in ("string", "large_string")


def check_text(split: Split, columns: Sequence[str]) -> None:
    """Check that columns hold text.

    Raises:
        UserError: one holds something else.
    """
    for column in columns:
        if not is_text(split, column):
            held = split.rows.features[column]
            raise UserError(f"column {column!r} of {split.origin} holds {held}; task.text needs text")


def choose(train: Dataset, validation: Dataset, task: TaskConfig, seed: int) -> tuple[Dataset, Dataset]:
    """Apply ``task.holdout`` and then ``task.limit``; rows keep their order.

    Args:
        train: all training rows.
        validation: all evaluation rows; not used with a holdout.
        task: the data's configuration.
        seed: draws the rows that ``task.limit`` keeps. What is held out does not depend on it.

    Raises:
        UserError: nothing is left.
    """
    if task.holdout:
        # RandomState, not default_rng: its stream is the same in all versions of numpy.
        order = np.random.RandomState(HOLDOUT_SEED).permutation(len(train))
        held = round(task.holdout * len(train))
        if not 0 < held < len(train):
            raise UserError(
                f"task.holdout {task.holdout} holds {held} of {len(train)} training examples out; "
                "both parts need at least one"
            )
        train, validation = train.select(np.sort(order[held:])), train.select(np.sort(order[:held]))
    if task.limit is not None:
        drawn = np.random.default_rng(seed).permutation(len(train))[: task.limit]
        train = train.select(np.sort(drawn))
    return train, validation


def count_train(task: TaskConfig, seed: int) -> int:
    """Return the number of training examples of a run, without tokenising them.

    Args:
        task: the data's configuration.
        seed: the run's.

    Raises:
        UserError: data that cannot be used.
    """
    with quiet():
        train, validation = load_splits(task, [*task.text, task.label], None)
        return len(choose(train.rows, validation.rows, task, seed)[0])


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, text: list[str], max_length: int) -> Dataset:
    """Replace text columns by tokens, truncated to ``max_length``; cached on disk by what goes in.

    Args:
        rows: with the text columns.
        tokenizer: the student's.
        text: one column, or two for pairs.
        max_length: tokens kept of an example, special tokens included.

    Returns:
        The other columns, ``input_ids``, ``token_type_ids`` where the tokenizer gives them, and ``length``.

    Raises:
        UserError: ``max_length`` is more than the tokenizer allows, or leaves no place for the text; a cache that
            cannot be written.
    """
    least = tokenizer.num_special_tokens_to_add(pair=len(text) == 2) + len(text)
    if not least <= max_length <= tokenizer.model_max_length:
        raise UserError(
            f"task.max_length is {max_length}; this tokenizer and {len(text)} text columns allow {least} to "
            f"{tokenizer.model_max_length:g}"
        )
    options = {"tokenizer": tokenizer, "text": text, "max_length": max_length}
    try:
        return rows.map(_encode, batched=True, remove_columns=text, fn_kwargs=options)
    except OSError as error:
        raise UserError(
            f"the tokenised data cannot be written to the cache of the datasets library: {error}; allowed: "
            "HF_DATASETS_CACHE set to a folder that can be written"
        ) from error


def _encode(
    rows: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text: list[str], max_length: int
) -> dict[str, list[Any]]:
    # The cache knows this function by its name only: when its output changes, so must the name.
    columns = [rows[name] for name in text]
    tokens = tokenizer(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    return {**tokens, "length": [len(ids) for ids in tokens["input_ids"]]}


def _read_hub(task: TaskConfig, names: list[str], cache_dir: Path | None) -> list[Split]:
    title = f"{task.hub} ({task.subset})" if task.subset else f"{task.hub}"
    try:
        splits = datasets.load_dataset(task.hub, task.subset, cache_dir=cache_dir and str(cache_dir))
    except UNREADABLE as error:
        raise UserError(f"the data set {title} cannot be loaded: {_reason(error)}") from error
    for name in names:
        if name not in splits:
            raise unknown(f"split of the data set {title}", name, splits)
    return [Split(splits[name], f"split {name!r} of {title}") for name in names]


def _read_file(task: TaskConfig, name: str, cache_dir: Path | None) -> Split:
    path = Path(name).expanduser()
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise UserError(
            f"the data file {name} has an unknown suffix; allowed: {', '.join(READERS)}, also with .gz "
            "(a split of a hub data set needs task.hub)"
        )
    if not path.is_file():
        raise UserError(f"the data file {name} does not exist (relative paths start from {Path.cwd()})")
    # "NA" and "null" are words; only an empty label is a missing value.
    is_csv = suffix in (".csv", ".tsv")
    options = {"keep_default_na": False, "na_values": {task.label: [""]}} if is_csv else {}
    pattern, cache = glob.escape(str(path.absolute())), cache_dir and str(cache_dir)
    try:
        rows = READERS[suffix](pattern, cache_dir=cache, **options)
    except UNREADABLE as error:
        raise UserError(f"the data file {name} cannot be read, or is empty: {_reason(error)}") from error
    return Split(rows, name)


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong at the root."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _check(split: Split, columns: Sequence[str]) -> None:
    if len(split.rows) == 0:
        raise UserError(f"{split.origin} has no rows; at least one is needed")
    for column in columns:
        if column not in split.rows.column_names:
            raise unknown(f"column of {split.origin}", column, split.rows.column_names)
        missing = split.rows.data.column(column).null_count
        if missing:
            raise UserError(
                f"column {column!r} of {split.origin} has no value in {missing} of {len(split.rows)} rows; "
                "every row needs one"
            )
