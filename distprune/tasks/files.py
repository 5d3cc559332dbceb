"""A task's data as local files."""

from functools import cache
from pathlib import Path

from distprune.checkpoints.files import checksum
from distprune.config import TaskConfig


def local_files(task: TaskConfig) -> list[tuple[str, Path]]:
    """Return the keys of local data, and their files; none where the data are of the hub."""
    if task.hub is not None:
        return []
    held = [] if task.holdout else [("task.validation", task.validation)]
    more = [("task.more_validation", file) for file in task.more_validation]
    return [(key, Path(file).expanduser()) for key, file in (("task.train", task.train), *held, *more)]


def hashes_of(task: TaskConfig) -> dict[str, str]:
    """Return the hashes of the local data that are there, by key and file name."""
    return {
        f"{key} {file.name}": _hash(file, file.stat().st_mtime_ns, file.stat().st_size)
        for key, file in local_files(task)
        if file.is_file()
    }


@cache
def _hash(file: Path, changed_at: int, size: int) -> str:
    return checksum(file)
