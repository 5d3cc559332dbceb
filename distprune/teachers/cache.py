"""The teacher's logits of every training row, computed once and found by row: any order, world size or later run.

A cache is a folder with a file of each rank that computed it (safetensors: ``values``, the logits of its rows one
after the other, fp32; ``rows`` and ``shapes`` say whose they are) and a manifest with checksums, and with fingerprints
of what the logits depend on. It gets its name once it is complete, as a checkpoint does.
"""

import json
import os
import shutil
import socket
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distprune import dist, turns
from distprune.checkpoints import files
from distprune.disk import Damaged, Entry, check, write_tensors
from distprune.engines.evaluate import logits_of_rows
from distprune.errors import UserError
from distprune.paths import expanded
from distprune.plugins import hashes_of_modules
from distprune.tasks.base import Batch, Task
from distprune.teachers.live import LiveTeacher, Taught

FORMAT = "distprune-teacher-1"
MANIFEST = "teacher.json"
"""Not the name that checkpoints have: what has it may be removed."""

Fingerprints = dict[str, str]


@dataclass(frozen=True)
class CacheManifest:
    """What a cache says of itself.

    Attributes:
        fingerprints: of what the logits depend on (`fingerprints`).
        rows: training rows that it has logits of.
        metrics: the teacher's, on the evaluation data.
        files: the others in the folder.
    """

    fingerprints: Fingerprints
    rows: int
    metrics: dict[str, float]
    files: list[Entry]
    format: str = FORMAT


def fingerprints(weights: str, task: Task, precision: str) -> Fingerprints:
    """Return what tells whether a cache is that of a teacher, its tokenizer and these data.

    Args:
        weights: `distprune.models.files.hash_of_weights` of the teacher.
        task: with the tokenised data.
        precision: that the teacher computes in.
    """
    vocabulary = json.dumps(sorted(task.tokenizer.get_vocab().items()))
    name = f"{type(task).__module__}:{type(task).__qualname__}"
    code = {} if name.startswith("distprune.") else hashes_of_modules(name)
    return {
        "the task": " ".join([name, *code.values()]),
        "the teacher": f"{weights} {precision}",
        "the tokenizer": xxhash.xxh3_128(vocabulary.encode()).hexdigest(),
    } | task.fingerprints


def folder_of(found: Fingerprints) -> Path:
    """Return where a cache is kept for whoever may need it: in the user's folder for caches, by its fingerprints."""
    root = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return root / "distprune" / "teachers" / xxhash.xxh3_128(json.dumps(found, sort_keys=True).encode()).hexdigest()


def find(folder: Path, expected: Fingerprints) -> CacheManifest | None:
    """Return the manifest of a cache; None where there is none.

    Raises:
        UserError: it is damaged, or of another teacher, tokenizer or data; or the folder holds something else.
    """
    if not (folder / MANIFEST).exists():
        # Asked again behind it: another run may have put its cache there meanwhile.
        if folder.exists() and (folder.is_file() or any(folder.iterdir())) and not (folder / MANIFEST).exists():
            raise UserError(f"teacher.cache is {folder}, which holds something else; allowed: a new folder, or a cache")
        return None
    try:
        content = json.loads((folder / MANIFEST).read_text())
        manifest = CacheManifest(**(content | {"files": [Entry(**entry) for entry in content["files"]]}))
        check(folder, manifest.files)
    except (OSError, ValueError, KeyError, TypeError, Damaged) as error:
        raise _refusal(folder, f"is damaged: {error}") from error
    differing = [what for what, value in expected.items() if manifest.fingerprints.get(what) != value]
    if differing or manifest.format != FORMAT:
        raise _refusal(folder, f"is not of {' and '.join(differing) or FORMAT} of this run")
    return manifest


def build(folder: Path, teacher: LiveTeacher, task: Task, found: Fingerprints, batch_size: int) -> None:
    """Compute a cache; where another run has made it meanwhile, that one stays. Collective: every rank calls it.

    Args:
        folder: where it goes.
        teacher: is run over all training and evaluation data.
        task: gives the data.
        found: its fingerprints.
        batch_size: rows in a forward pass on one rank.

    Raises:
        UserError: it cannot be written.
    """
    world = dist.detect()
    # Of this run alone: another one may make the same cache at the same time.
    name = turns.on_main(lambda: f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")
    partial = folder.with_name(name)
    turns.write_on_main(lambda: _make_empty(folder, partial), partial)
    dist.agree(lambda: refuse_unseen(partial))
    tensors = _logits_of_rank(teacher, task, batch_size)
    path = partial / f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"

    def write() -> list[Entry]:
        try:
            return [write_tensors(path, tensors)]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be written: {error}; allowed: teacher.cache=null runs the teacher"
            ) from error

    entries = dist.gather(dist.agree(write))
    manifest = CacheManifest(found, len(task.train), teacher.measure(batch_size), entries)
    turns.write_on_main(lambda: _complete(partial, folder, manifest), folder)


def remove(folder: Path) -> None:
    """Remove a cache, and nothing else. Collective: every rank calls it."""
    turns.write_on_main(lambda: files.remove(folder) if (folder / MANIFEST).exists() else None, folder)


class CachedTeacher:
    """A teacher that is not run: its logits are read from a cache."""

    def __init__(self, folder: Path, manifest: CacheManifest, task: Task, device: torch.device):
        self._task, self._device, self._metrics = task, device, manifest.metrics
        self._values: list[Any] = []
        rows, shapes, starts, files_of = [], [], [], []
        for entry in manifest.files:
            reader: Any = safe_open(folder / entry.name, framework="pt")
            held = reader.get_tensor("rows")
            if len(held) == 0:
                continue
            rows.append(held)
            shapes.append(reader.get_tensor("shapes"))
            sizes = shapes[-1].prod(1)
            starts.append(sizes.cumsum(0) - sizes)
            files_of.append(torch.full(held.shape, len(self._values), dtype=torch.int32))
            self._values.append(reader.get_slice("values"))
        order = torch.cat(rows).argsort()
        assert torch.equal(torch.cat(rows)[order], torch.arange(manifest.rows)), f"{folder} lacks rows"
        self._shapes, self._starts, self._files = (torch.cat(each)[order] for each in (shapes, starts, files_of))

    def outputs(self, batch: Batch, rows: list[int], **options: bool) -> Taught:
        """Return the teacher's logits for a batch.

        Args:
            batch: on the student's device.
            rows: the training rows that it holds.
            options: none; there is no forward pass.
        """
        assert not options, "hidden states and attention are not kept"
        return Taught(self._task.join([self._read(row) for row in rows], batch).to(self._device))

    def _read(self, row: int) -> Tensor:
        shape, start = self._shapes[row].tolist(), int(self._starts[row])
        values: Tensor = self._values[int(self._files[row])][start : start + prod(shape)]
        return values.reshape(shape)

    def measure(self, batch_size: int) -> dict[str, float]:
        """Return the teacher's metrics on the evaluation data, as they were when the cache was made."""
        return self._metrics

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that it holds on this rank: none."""
        return dict.fromkeys(("weights", "master", "moments"), 0)


def _logits_of_rank(teacher: LiveTeacher, task: Task, batch_size: int) -> Mapping[str, Tensor]:
    """Return this rank's share of the logits. Collective: every rank calls it."""
    rows, shapes, values = array("q"), array("q"), array("f")
    dimensions = 0
    for row, logits in logits_of_rows(teacher.engine, task, task.train, batch_size):
        rows.append(row)
        shapes.extend(logits.shape)
        values.frombytes(logits.numpy().tobytes())
        dimensions = logits.dim()
    return {
        "rows": _tensor(rows, torch.int64),
        "shapes": _tensor(shapes, torch.int64).reshape(len(rows), dimensions),
        "values": _tensor(values, torch.float32),
    }


def _tensor(values: "array[Any]", dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def refuse_unseen(path: Path) -> None:
    """Refuse a cache that this rank does not see.

    Raises:
        UserError: with what to do.
    """
    if not path.exists():
        raise UserError(
            f"the teacher's cache {path} is not seen on all nodes; allowed: a teacher.cache on a disk that all share, "
            "or null to run the teacher"
        )


def _make_empty(folder: Path, partial: Path) -> None:
    """Make the folder of a cache that is being made, and remove those that killed processes of this node have left."""
    for path in folder.parent.glob(f"{folder.name}.partial-{socket.gethostname()}-*"):
        pid = path.name.removeprefix(f"{folder.name}.partial-{socket.gethostname()}-")
        if path == partial or (pid.isdecimal() and not psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)


def _complete(partial: Path, folder: Path, manifest: CacheManifest) -> None:
    (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / MANIFEST).exists():
            raise
        shutil.rmtree(partial)


def _refusal(folder: Path, why: str) -> UserError:
    return UserError(
        f"the teacher's cache {folder} {why}; allowed: another teacher.cache, or teacher.rebuild_cache=true"
    )
