"""The local data of a sweep's runs: there before anything runs, and the same that a result was measured on."""

from collections.abc import Mapping

from distprune.config import Config
from distprune.errors import UserError
from distprune.sweeps.spec import Run
from distprune.tasks.files import hashes_of, local_files


def check_files(run: Run, config: Config) -> None:
    """Refuse a run whose local data are not there, before any is begun.

    Raises:
        UserError: with the first file that is missing.
    """
    for key, file in local_files(config.task):
        if not file.exists():
            raise UserError(f"{run.name}: {key} is {str(file)!r}, which is not there; allowed: a file, or task.hub")


def changed_data(before: Mapping[str, str], config: Config) -> str | None:
    """Return the key and name of local data that are not what they were, as far as both are known; None: none.

    Args:
        before: their hashes, by key and name.
        config: says where they are now.
    """
    now = hashes_of(config.task)
    return next((what for what in sorted(before.keys() & now.keys()) if before[what] != now[what]), None)
