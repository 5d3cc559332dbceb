"""The best state of a run, and the directory that each such state is kept in."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distprune.checkpoints.files import newest_first, read_manifest
from distprune.disk import Damaged, Entry, check
from distprune.errors import UserError


@dataclass
class Best:
    """The best evaluation, by the main metric, among states at the target sparsity."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    evaluations_since: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)
    """The `Entry` of each file of the state that is kept."""

    def update(self, metrics: dict[str, float], step: int, merit: Callable[[dict[str, float]], float]) -> bool:
        """Take in an evaluation; return whether it is the best so far, by the task's `merit`."""
        if not self.metrics or merit(metrics) > merit(self.metrics):
            self.metrics, self.step, self.evaluations_since = metrics, step, 0
            return True
        self.evaluations_since += 1
        return False

    def directory(self, run_dir: Path) -> Path:
        """Return where the state is kept."""
        return run_dir / "best" / f"step-{self.step:08d}"

    def problem(self, run_dir: Path) -> str | None:
        """Return what is wrong with the state that is kept, None where it is as it was written."""
        directory = self.directory(run_dir)
        try:
            check(directory, [Entry(**each) for each in self.files])
        except Damaged as error:
            return str(error)
        return None if directory.is_dir() else f"{directory} is gone"


def remove_former(best: Path, checkpoints: Path) -> None:
    """Remove kept states that neither the run would choose, nor one that goes on from a checkpoint.

    Args:
        best: the directory of the best state.
        checkpoints: the folder of the run's checkpoints.
    """
    wanted = {best.name}
    for checkpoint in newest_first(checkpoints):
        with suppress(Damaged, UserError):
            wanted.add(f"step-{read_manifest(checkpoint).state['trainer']['best']['step']:08d}")
    for directory in best.parent.iterdir():
        if directory.name not in wanted:
            shutil.rmtree(directory, ignore_errors=True)
