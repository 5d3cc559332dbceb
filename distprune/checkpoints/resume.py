"""The way back into a run: the newest checkpoint that is whole."""

import logging
from pathlib import Path
from typing import Any

from distprune import disk, dist, turns
from distprune.checkpoints import files
from distprune.checkpoints.files import Manifest
from distprune.disk import Damaged
from distprune.errors import UserError

logger = logging.getLogger(__name__)


def newest_whole(folder: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint in a folder whose files are all as they were written, None where there is none.

    Collective: every rank calls it. A damaged one is named in a warning, and the one before it is tried.

    Raises:
        UserError: on every rank, where there are checkpoints and all of them are damaged.
    """
    every = turns.on_main(lambda: files.newest_first(folder))
    for checkpoint in every:
        manifest, problem = turns.on_main(lambda path=checkpoint: _manifest_or_problem(path))  # type: ignore[misc]
        if manifest is not None:
            problem = _problem(checkpoint, manifest)
            if problem is None:
                return checkpoint, manifest
        if dist.is_main():
            logger.warning("%s; looking for an older checkpoint", problem)
    if every:
        raise UserError(f"every checkpoint in {folder} is damaged; allowed: remove it, to begin the run again")
    return None


def _manifest_or_problem(checkpoint: Path) -> tuple[Manifest | None, str | None]:
    try:
        return files.read_manifest(checkpoint), None
    except Damaged as error:
        return None, str(error)


def _problem(checkpoint: Path, manifest: Manifest) -> str | None:
    """Return what is wrong with a checkpoint's files, which the ranks share out. Collective: every rank calls it."""
    world = dist.detect()
    found = []
    try:
        disk.check(checkpoint, manifest.files[world.rank :: world.size])
    except Damaged as error:
        found.append(str(error))
    every: list[Any] = dist.gather(found)
    return every[0] if every else None
