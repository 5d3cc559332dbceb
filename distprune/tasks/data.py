"""From the hub or from files to training and evaluation rows, the same on every rank."""

import csv
import glob
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import xxhash
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from distprune.config import Config, TaskConfig
from distprune.disk import hash_of
from distprune.errors import UserError, unknown
from distprune.paths import expanded
from distprune.tasks.files import begins_as_rows, defect_of, doubled_column
from distprune.tasks.rows import screen, settle_length

HOLDOUT_SEED = 0

# Not load_dataset, which asks a server before it reads a local file. Tab-separated fields are not quoted
# (as in GLUE): a single quote in a sentence would swallow the rows up to the next.
READERS: dict[str, Callable[..., Dataset]] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".tsv": partial(Dataset.from_csv, sep="\t", quoting=csv.QUOTE_NONE),
    ".parquet": Dataset.from_parquet,
    ".txt": Dataset.from_text,  # a row a line, in the column "text"
}

_MORE_FIELDS = "Length of header or names does not match length of data"
"""What pandas warns of where rows have more fields than the header, and goes on without the last of them."""

UNREADABLE = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError, StopIteration, EOFError, zlib.error)


class Split(NamedTuple):
    """Rows as they were read, numbered from 0 in their column ``_row``, and how to call their source in a message."""

    rows: Dataset
    origin: str


class Splits(NamedTuple):
    """All data of a task; with a holdout the validation rows are the training rows, before `choose` parts them."""

    train: Split
    validation: Split
    more: dict[str, Split]


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the progress bars of the datasets library, and what it logs of a file ahead of its error."""
    disabled, logger = are_progress_bars_disabled(), logging.getLogger("datasets.packaged_modules")
    disable_progress_bars()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
        if not disabled:
            enable_progress_bars()


def load_splits(task: TaskConfig, columns: Sequence[str], notes: list[str]) -> Splits:
    """Read all training and evaluation rows.

    Args:
        task: where the data are.
        columns: columns that must be there; rows without a value in one are refused or left out (``task.bad_rows``).
        notes: a sentence is added for rows that are left out.

    Raises:
        UserError: a split, file or column that is not there or cannot be read, no rows, or missing values.
    """
    names = [task.train, *([] if task.holdout else [task.validation]), *task.more_validation]
    local = [] if task.hub else [_read_file(task, name) for name in names]
    splits = [_check(split, columns, task, notes) for split in local or _read_hub(task, names)]
    notes += [note for name, split in zip(names, local, strict=False) if (note := _quoted(name, split, columns))]
    more = splits[len(splits) - len(task.more_validation) :]
    titles = [Path(name).name.split(".")[0] for name in task.more_validation]
    if len(set(titles)) < len(titles):
        raise UserError(f"task.more_validation is {task.more_validation}; allowed: files or splits of different names")
    return Splits(splits[0], splits[0 if task.holdout else 1], dict(zip(titles, more, strict=True)))


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


def prepared(
    splits: Splits,
    config: Config,
    notes: list[str],
    label: Callable[[Split, TaskConfig], Dataset],
    encode: Callable[[Dataset], Dataset],
) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """Return tokenised training, validation and further evaluation rows: labelled, chosen, encoded, cut to length.

    Args:
        splits: the data.
        config: of the run.
        notes: a sentence is added for rows that are left out or cut short.
        label: makes rows with what the model predicts of a split, or refuses it.
        encode: tokenises rows, with a column ``cut``.

    Raises:
        UserError: as these do.
    """
    task = config.task
    train = label(splits.train, task)
    validation = train if task.holdout else label(splits.validation, task)
    train, validation = choose(train, validation, task, config.train.seed)
    parts = {"train": (train, splits.train.origin), "": (validation, splits.validation.origin)}
    parts |= {f"more {name}": (label(split, task), split.origin) for name, split in splits.more.items()}
    ready = {name: settle_length(encode(rows), origin, task, notes) for name, (rows, origin) in parts.items()}
    return ready["train"], ready[""], {name: ready[f"more {name}"] for name in splits.more}


def fingerprint(rows: Dataset) -> str:
    """Return a hash of rows, all columns but their numbers, that is the same wherever they are."""
    digest = xxhash.xxh3_128()
    for table in rows.with_format("arrow").iter(1000):
        columns = [name for name in table.column_names if name != "_row"]
        batch = table.select(columns).replace_schema_metadata(None).combine_chunks()
        digest.update(batch.schema.to_string().encode())
        for written in batch.to_batches():
            digest.update(written.serialize())
    return digest.hexdigest()


def count_train(task: TaskConfig, columns: Sequence[str], seed: int) -> int | None:
    """Return the number of training examples of a run without tokenising them; None where some may be left out.

    Args:
        task: the data's configuration.
        columns: as of `load_splits`.
        seed: the run's.

    Raises:
        UserError: data that cannot be used.
    """
    if "skip" in (task.bad_rows, task.too_long):
        return None
    with quiet():
        splits = load_splits(task, columns, [])
        return len(choose(splits.train.rows, splits.validation.rows, task, seed)[0])


def _read_hub(task: TaskConfig, names: list[str]) -> list[Split]:
    title = f"{task.hub} ({task.subset})" if task.subset else f"{task.hub}"
    for name in names:
        if _suffix(name) in READERS:
            raise UserError(
                f"task.hub is {task.hub}, and {name} is a file; allowed with files: task.hub and task.subset null"
            )
    try:
        splits = datasets.load_dataset(task.hub, task.subset)
    except UNREADABLE as error:
        raise UserError(f"the data set {title} cannot be loaded: {_reason(error)}") from error
    for name in names:
        if name not in splits:
            raise unknown(f"split of the data set {title}", name, splits)
    found = [(splits[name], f"split {name!r} of {title}") for name in names]
    return [Split(_number(rows, origin), origin) for rows, origin in found]


def _read_file(task: TaskConfig, name: str) -> Split:
    path, suffix = expanded(name), _suffix(name)
    if suffix not in READERS:
        raise UserError(
            f"the data file {name} has an unknown suffix; allowed: {', '.join(READERS)}, also with .gz "
            "(a split of a hub data set needs task.hub)"
        )
    if not path.is_file():
        raise UserError(f"the data file {name} does not exist (relative paths start from {Path.cwd()})")
    if suffix in (".json", ".jsonl") and not begins_as_rows(path):
        raise UserError(
            f"the data file {name} begins with no row; allowed: an object in each line, or an array of them"
        )
    is_table = suffix in (".csv", ".tsv")
    options = _csv_options(task) if is_table else {}
    try:
        if is_table and (column := doubled_column(path, suffix)):
            raise UserError(f"the data file {name} has two columns {column!r}; allowed: a name for each")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=_MORE_FIELDS)
            rows = READERS[suffix](glob.escape(str(path.absolute())), cache_dir=_cache_of(path), **options)
    except UNREADABLE as error:
        defect = defect_of(path, suffix) or f"cannot be read, or is empty: {_reason(error)}"
        raise UserError(f"the data file {name} {defect}") from error
    return Split(_number(rows, name), name)


def _cache_of(path: Path) -> str:
    """Return where the datasets library keeps the rows of a file: it knows a file by its path and time alone."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "distprune" / hash_of(path))


def _csv_options(task: TaskConfig) -> dict[str, Any]:
    texts = [column for column in (*task.text, *task.choices) if column != task.label]
    return {
        "keep_default_na": False,  # "NA" and "null" are words;
        "na_values": {task.label: [""]},  # only an empty label is a missing value
        "converters": dict.fromkeys(texts, str),  # a text may look like a number
        "chunksize": 1 << 40,  # a column has one type: the first 10,000 rows would settle it for those behind them
        "index_col": False,  # with a field more than the header has, the first column would become the rows' name
    }


def _quoted(name: str, split: Split, columns: Sequence[str]) -> str | None:
    """Return a sentence on fields of a tab-separated file that were meant to be quoted, where there are any."""
    if _suffix(name) != ".tsv":
        return None
    texts = (text for column in columns if is_text(split, column) for text in split.rows[column][:] if text)
    number = sum(len(text) > 1 and text.startswith('"') and text.endswith('"') for text in texts)
    return f"fields in quotes in {name}: {number}; quotes are text in .tsv, and not in .csv" if number else None


def _suffix(name: str) -> str:
    """Return what says how a file is read; names of splits may hold dots too."""
    path = Path(name)
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _number(rows: Dataset, origin: str) -> Dataset:
    if "_row" in rows.column_names:
        raise UserError(f"{origin} has a column '_row'; allowed: another name, as distprune numbers the rows there")
    return rows if len(rows) == 0 else rows.add_column("_row", np.arange(len(rows)))


def _reason(error: BaseException) -> str:
    """Return the first line of what went wrong at the root."""
    cause = error.__cause__ or error
    if _MORE_FIELDS in str(cause):
        return "the rows have more fields than the header"
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _check(split: Split, columns: Sequence[str], task: TaskConfig, notes: list[str]) -> Split:
    if len(split.rows) == 0:
        raise UserError(f"{split.origin} has no rows; at least one is needed")
    for column in columns:
        if column not in split.rows.column_names:
            raise unknown(f"column of {split.origin}", column, split.rows.column_names[:-1])  # without _row
    wrong = {
        f"have no value in column {column!r}": np.flatnonzero(split.rows.data.column(column).is_null()).tolist()
        for column in columns
    }
    return Split(screen(split.rows, wrong, split.origin, task, notes), split.origin)
