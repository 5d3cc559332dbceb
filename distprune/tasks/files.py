"""A task's data as local files."""

import csv
import gzip
import json
import zlib
from codecs import BOM_UTF8
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from distprune.config import TaskConfig
from distprune.disk import hash_of
from distprune.paths import expanded


def local_files(task: TaskConfig) -> list[tuple[str, Path]]:
    """Return the keys of local data, and their files; none where the data are of the hub."""
    if task.hub is not None:
        return []
    held = [] if task.holdout else [("task.validation", task.validation)]
    more = [("task.more_validation", file) for file in task.more_validation]
    return [(key, expanded(file)) for key, file in (("task.train", task.train), *held, *more)]


def hashes_of(task: TaskConfig) -> dict[str, str]:
    """Return the hashes of the local data that are there, by key and file name."""
    return {f"{key} {file.name}": hash_of(file) for key, file in local_files(task) if file.is_file()}


def defect_of(path: Path, suffix: str) -> str | None:
    """Return in words what is wrong with a file that could not be read; None where that does not show.

    The reader counts the lines of a JSON file anew in each of its blocks.

    Args:
        path: of the file.
        suffix: that says how it is read.
    """
    if path.stat().st_size == 0:
        return "is empty"
    return _defect_of_json(path) if suffix in (".json", ".jsonl") else None


def begins_as_rows(path: Path) -> bool:
    """Return whether a JSON file begins as an object or an array, as far as it can be read.

    The reader ends the process, without a word, where it begins with null.
    """
    with _opened(path) as file, suppress(OSError, EOFError, zlib.error):
        start = file.read(1 << 16).removeprefix(BOM_UTF8).lstrip()
        return start[:1] in (b"", b"{", b"[")
    return True


def doubled_column(path: Path, suffix: str) -> str | None:
    """Return a name that a table's header has twice, the second of which its reader would call otherwise."""
    dialect: dict[str, Any] = {} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    with _opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        header = next(csv.reader(text, **dialect), [])
    return next((name for name in header if name and header.count(name) > 1), None)


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _defect_of_json(path: Path) -> str | None:
    has_rows = False
    with _opened(path) as file, suppress(OSError, EOFError, zlib.error):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if not has_rows and line.lstrip().startswith(b"["):
                return None  # an array, over many lines
            has_rows = True
            try:
                json.loads(line)
            except ValueError as error:
                return f"cannot be read: line {number} is no JSON ({error})"
        return None if has_rows else "is empty"
    return None
