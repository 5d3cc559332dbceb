"""The local data of a sweep's runs: there before anything runs, and the same that a result was measured on."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from distprune.checkpoints.files import checksum
from distprune.config import Config
from distprune.errors import UserError
from distprune.sweeps.results import Row
from distprune.sweeps.spec import Run


def check_files(run: Run, config: Config) -> None:
    """Refuse a run whose local data are not there, before any is begun.

    Raises:
        UserError: with the first file that is missing.
    """
    for key, file in _files(config):
        if not file.exists():
            raise UserError(f"{run.name}: {key} is {str(file)!r}, which is not there; allowed: a file, or task.hub")


def hashes_of(config: Config) -> dict[str, str]:
    """Return the hashes of a run's local data that are there, by key and name."""
    return {
        f"{key} {file.name}": _hash(file, file.stat().st_mtime_ns, file.stat().st_size)
        for key, file in _files(config)
        if file.is_file()
    }


def check_data(rows: Mapping[str, Row], configs: Mapping[str, Config], path: Path) -> None:
    """Refuse results that were measured on other data than those that are there now, as far as both are known.

    Args:
        rows: by the names of their runs.
        configs: of all runs, by name.
        path: where the rows are from.

    Raises:
        UserError: with the first of them.
    """
    for name in rows.keys() & configs.keys():
        before, now = rows[name].get("data", {}), hashes_of(configs[name])
        for what in sorted(before.keys() & now.keys()):
            if before[what] != now[what]:
                raise UserError(
                    f"{path}: {name} was measured on another {what} than the one that is there now; allowed: another "
                    "results file, or without that line"
                )


def _files(config: Config) -> list[tuple[str, Path]]:
    """Return the keys of local data, and their files."""
    if config.task.hub is not None:
        return []
    held = [] if config.task.holdout else [("task.validation", config.task.validation)]
    more = [("task.more_validation", file) for file in config.task.more_validation]
    return [(key, Path(file).expanduser()) for key, file in (("task.train", config.task.train), *held, *more)]


@cache
def _hash(file: Path, changed_at: int, size: int) -> str:
    return checksum(file)
