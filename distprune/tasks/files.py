"""A task's data as local files."""

import gzip
import json
from contextlib import suppress
from functools import cache
from pathlib import Path

from distprune.checkpoints.files import checksum
from distprune.config import TaskConfig
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
    return {
        f"{key} {file.name}": _hash(file, file.stat().st_mtime_ns, file.stat().st_size)
        for key, file in local_files(task)
        if file.is_file()
    }


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


def _defect_of_json(path: Path) -> str | None:
    has_rows = False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file, suppress(OSError, EOFError):
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


@cache
def _hash(file: Path, changed_at: int, size: int) -> str:
    return checksum(file)
