"""Saving beside the training: slices are copied while the next batch is on its way, and written by a thread.

The tensors change only where an optimizer step begins, so a copy has the whole forward and backward pass for itself
(`Saver.before_change` waits for what is left of it). When every rank has written its file, which the ranks learn with
the loss that they add up anyway, rank 0 writes the manifest and gives the checkpoint its name.
"""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from threading import Event, Thread
from typing import Any

from torch import Tensor

from distprune import disk, dist
from distprune.checkpoints import files
from distprune.checkpoints.files import Manifest
from distprune.checkpoints.pieces import packed
from distprune.disk import Entry
from distprune.pruning.pruner import came_back

logger = logging.getLogger(__name__)


class _Writing(Thread):
    """Checks and copies this rank's tensors, and writes them."""

    def __init__(self, tensors: dict[str, Tensor], path: Path, check: Callable[[], list[str]]):
        super().__init__(name="checkpoint", daemon=True)
        self._tensors, self._path, self._check = tensors, path, check
        self.copied = Event()
        self.entry: Entry | None = None
        self.error: str | None = None
        self.broken: list[str] = []

    def run(self) -> None:
        try:
            self.broken = self._check()
            copies = {key: tensor.detach().to("cpu", copy=True) for key, tensor in self._tensors.items()}
            self._tensors = {}
            self.copied.set()
            stored = {key: packed(key, values) for key, values in copies.items()}
            del copies
            self.entry = disk.write_tensors(self._path, stored)
        except Exception as error:  # whatever it is, the training goes on
            self.error = f"{self._path} cannot be written: {error}"
        finally:
            self._tensors = {}
            self.copied.set()


class Saver:
    """Writes checkpoints into a folder, one at a time.

    A checkpoint that cannot be written is a warning: the run goes on, and the checkpoints before it stay. One whose
    pruned weights are not zero stops all ranks.

    Args:
        folder: made where it is missing; the same on all nodes.
        keep: how many of the newest stay, beside the best.
        describe: writes the files that make a folder a model's directory, on rank 0.
    """

    def __init__(self, folder: Path, keep: int, describe: Callable[[Path], None]):
        self.folder, self.keep = folder, keep
        self._describe = describe
        self._writing: _Writing | None = None
        self._removing: Thread | None = None
        self._manifest: Manifest | None = None
        self._begun_at = time.monotonic()
        self.last_step: int | None = None
        """The step of the newest checkpoint, one that is being written included, and one that the run goes on from."""

    @property
    def busy(self) -> bool:
        """Whether this rank is writing."""
        return self._writing is not None and self._writing.is_alive()

    @property
    def minutes_since(self) -> float:
        """Minutes since the last save began."""
        return (time.monotonic() - self._begun_at) / 60

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        metric: float | None,
        check: Callable[[], list[str]] = list,
    ) -> None:
        """Begin to save, once the save before has ended. Collective: every rank calls it.

        Args:
            step: optimizer steps that are done; nothing happens where it is saved already.
            tensors: what this rank owns, by key; views, which must not change before `before_change`.
            state: the rest, for JSON; of rank 0.
            metric: the merit of this state, the higher the better, where it was measured at the target sparsity.
            check: returns the parameters whose masked weights are not zero; run beside the training, like the copy.
        """
        if step == self.last_step:
            return
        self.finish()
        self.last_step, self._begun_at = step, time.monotonic()
        self._manifest = Manifest(step, deepcopy(state), [], metric)
        world = dist.detect()
        name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
        self._writing = _Writing(tensors, files.saving_path(self.folder, step) / name, check)
        self._writing.start()

    def before_change(self) -> None:
        """Wait until the tensors are copied; to be called before they change."""
        if self._writing is not None:
            self._writing.copied.wait()

    def settle(self, ranks_busy: float) -> None:
        """Complete the checkpoint where every rank has written its part. Collective: every rank calls it.

        Args:
            ranks_busy: how many ranks were ``busy``, the same number on all.
        """
        if self._writing is not None and ranks_busy == 0:
            self._complete()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and complete it. Collective: every rank calls it."""
        if self._writing is not None:
            self._complete()
        if self._removing is not None:
            self._removing.join()

    def _complete(self) -> None:
        """Collective: every rank calls it."""
        assert self._writing is not None
        assert self._manifest is not None
        self._writing.join()
        reports = dist.gather([(self._writing.entry, self._writing.error)])
        broken = dist.gather(self._writing.broken)
        self._writing = None
        assert not broken, came_back(sorted(set(broken)))
        errors = [error for _, error in reports if error is not None]
        if dist.is_main():
            self._manifest.files = [entry for entry, _ in reports if entry is not None]
            try:
                if not errors:
                    self._describe_and_name(self._manifest)
            except Exception as error:  # tokenizers raises no OSError
                errors.append(f"checkpoint {self._manifest.step} in {self.folder} cannot be written: {error}")
            if errors:
                logger.warning("%s; the run goes on without this checkpoint", errors[0])
                shutil.rmtree(files.saving_path(self.folder, self._manifest.step), ignore_errors=True)

    def _describe_and_name(self, manifest: Manifest) -> None:
        saving = files.saving_path(self.folder, manifest.step)
        before = {entry.name for entry in manifest.files}
        self._describe(saving)
        others = [path for path in sorted(saving.iterdir()) if path.name not in before]
        manifest.files += [disk.entry_of(path) for path in others]
        files.complete(self.folder, manifest)
        old = files.to_remove(self.folder, self.keep)
        # A thread, because a large file takes its time to go.
        self._removing = Thread(target=_remove_all, args=(old,), name="remove checkpoints", daemon=True)
        self._removing.start()


def _remove_all(checkpoints: list[Path]) -> None:
    for checkpoint in checkpoints:
        with suppress(OSError):
            files.remove(checkpoint)
