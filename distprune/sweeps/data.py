"""The local data and models of a sweep's runs: those that a result was measured with."""

from collections.abc import Mapping

from distprune.config import Config, value_of
from distprune.errors import UserError
from distprune.models.files import hash_of_weights, hashed_files
from distprune.paths import expanded
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


def changed_model(before: Mapping[str, str], run: Run, config: Config) -> str | None:
    """Return the key of a local model whose files are not what they were, as far as both are known; None: none.

    Args:
        before: hashes of the models' files, by key.
        run: whose models of other runs are left out.
        config: says where the others are now.
    """
    for key in sorted(before.keys() - run.models.keys()):
        directory = expanded(str(value_of(config, key)))
        if hashed_files(directory) and hash_of_weights(directory) != before[key]:
            return key
    return None
