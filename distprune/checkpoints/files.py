"""What a checkpoint is on disk: complete and checked, or not there at all. Pure file work, no ranks.

::

    run/checkpoints/
        step-00000120/
            manifest.json                      the state that is no tensor; bytes and checksum of every other file
            rank-00000-of-00002.safetensors    the slices that a rank owned
            config.json, tokenizer.json, ...   with them the folder is a model's directory
        latest -> step-00000120
        saving-step-00000180/                  being written, or left by a process that was killed

A folder gets its name last, after every file in it was written, flushed and read back. Nothing is unpickled: tensors
are safetensors, the rest is JSON.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from distprune.disk import Damaged, Entry, flush_folder, write_text
from distprune.errors import UserError

FOLDER = "checkpoints"
FORMAT = "distprune-checkpoint-1"
MANIFEST, LATEST = "manifest.json", "latest"
_NAME, _SAVING, _REMOVING, _DAMAGED = "step-", "saving-", "removing-", "damaged-"


@dataclass
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps that were done.
        state: everything that is no tensor, as JSON has it.
        files: all files but this one.
        metric: the main metric (its negative where lower is better), where this very state was measured at the
            target sparsity.
    """

    step: int
    state: dict[str, Any]
    files: list[Entry]
    metric: float | None = None
    format: str = field(default=FORMAT)


def saving_path(folder: Path, step: int) -> Path:
    """Return where a checkpoint is while it is not complete."""
    return folder / f"{_SAVING}{_name(step)}"


def _name(step: int) -> str:
    return f"{_NAME}{step:08d}"


def complete(folder: Path, manifest: Manifest) -> Path:
    """Make a written checkpoint one that counts, and let ``latest`` point at it.

    Raises:
        OSError: where that fails, or a file of the manifest is not there in its size.
    """
    saving = saving_path(folder, manifest.step)
    for entry in manifest.files:
        path = saving / entry.name
        if not path.exists() or path.stat().st_size != entry.bytes:
            raise OSError(f"{path} is not there in its {entry.bytes} bytes: do all nodes share this folder?")
    content = asdict(manifest)
    text = json.dumps(content | {"checksum": _of_text(content)}, indent=1)
    write_text(saving / MANIFEST, text)
    flush_folder(saving)
    final = folder / _name(manifest.step)
    saving.rename(final)
    flush_folder(folder)
    _point_at(folder, final.name)
    return final


def _point_at(folder: Path, name: str) -> None:
    """Move ``latest``, for people: nothing reads it, and where a file system has no links there is none."""
    pointer, latest = folder / f"{LATEST}.new", folder / LATEST
    with suppress(OSError):
        if latest.is_dir() and not latest.is_symlink():
            shutil.rmtree(latest)  # a copy of the run directory that followed the link
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(name)
        pointer.rename(latest)


def read_manifest(checkpoint: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        Damaged: where it is missing, cut off or changed, or names a file elsewhere.
        UserError: where it is of a format that this version does not know.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text())
        stored = content.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{path} cannot be read: {error!r}") from error
    if _of_text(content) != stored:
        raise Damaged(f"{path} has another checksum than it had")
    if content["format"] != FORMAT:
        raise UserError(f"{path} is of the format {content['format']!r}; allowed: {FORMAT}")
    files = [Entry(**entry) for entry in content.pop("files")]
    if foreign := [entry.name for entry in files if Path(entry.name).name != entry.name or entry.name in ("", "..")]:
        raise Damaged(f"{path} names a file {foreign[0]!r} that does not lie beside it")
    return Manifest(files=files, **content)


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory is a checkpoint."""
    return (directory / MANIFEST).exists()


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, whole ones and damaged ones, the newest first."""
    found = folder.iterdir() if folder.is_dir() else ()  # of which a user's copies, step-00000020.bak, are none
    return sorted((path for path in found if path.name.removeprefix(_NAME).isdecimal()), reverse=True)


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a folder; None where there is none."""
    return next((int(path.name.removeprefix(_NAME)) for path in newest_first(folder)), None)


def clear_behind(folder: Path, step: int) -> None:
    """Clear away what a run leaves behind it as it goes on from its newest whole checkpoint.

    Those of later steps are damaged, and in the way of the run, which comes to these steps again. They are
    set aside, and not removed: a disk that could not be read for a moment looks the same.

    Args:
        folder: where the checkpoints are.
        step: of the one that the run goes on from.
    """
    for pattern in (f"{_SAVING}*", f"{_REMOVING}*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in newest_first(folder):
        if path.name > _name(step):
            aside = path.with_name(_DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def to_remove(folder: Path, keep: int) -> list[Path]:
    """Return the checkpoints that are neither among the newest nor the best of those that were measured.

    Args:
        folder: where they are.
        keep: how many of the newest stay.
    """
    every = newest_first(folder)
    measured: list[tuple[float, Path]] = []
    for path in every:
        try:
            metric = read_manifest(path).metric
        except (Damaged, UserError):
            continue
        if metric is not None:
            measured.append((metric, path))
    # Of equally good ones the first, as the run chooses them.
    best = min(measured, key=lambda each: (-each[0], each[1]))[1] if measured else None
    return [path for path in every[keep:] if path != best]


def remove(folder: Path) -> None:
    """Remove a checkpoint, or what else is complete or not there; one that is being removed has another name."""
    going = folder.with_name(_REMOVING + folder.name)
    shutil.rmtree(going, ignore_errors=True)  # of a process that was killed
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _of_text(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
