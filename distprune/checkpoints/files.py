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
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distprune.errors import UserError

FOLDER = "checkpoints"
FORMAT = "distprune-checkpoint-1"
MANIFEST, LATEST = "manifest.json", "latest"
_NAME, _SAVING, _REMOVING, _DAMAGED = "step-", "saving-", "removing-", "damaged-"
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint: its name, its size in bytes, and its 128 bits of XXH3."""

    name: str
    bytes: int
    checksum: str


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


class Damaged(Exception):
    """A checkpoint that is not what was written; the message names the file."""


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, to be read by whom the folder lets in.

    Raises:
        OSError, SafetensorError: where they cannot be written.
    """
    save_file(dict(tensors), path, metadata)
    open_to_readers(path)


def open_to_readers(path: Path) -> None:
    """Let a file be read by whom its folder lets in: safetensors writes it for its owner alone."""
    with suppress(OSError):  # some file systems know no such rights
        path.chmod(path.parent.stat().st_mode & 0o664)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """Write tensors, wait until the disk has them, and check them by reading them back.

    Raises:
        OSError, SafetensorError: where they cannot be written, or are read back as something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save(tensors, path)
    entry = entry_of(path)
    with safe_open(path, framework="pt") as reader:
        for name, tensor in tensors.items():
            if not torch.equal(reader.get_tensor(name).view(torch.uint8), tensor.contiguous().view(torch.uint8)):
                raise OSError(f"{path} does not hold the {name} that was written")
    return entry


def entry_of(path: Path) -> Entry:
    """Wait until the disk has a file, and return its entry."""
    _flush_file(path)
    return Entry(path.name, path.stat().st_size, checksum(path))


def checksum(path: Path) -> str:
    """Return the XXH3 of a file, 128 bits in hexadecimal."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    return digest.hexdigest()


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
    _write_flushed(saving / MANIFEST, text)
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
    if foreign := [entry.name for entry in files if Path(entry.name).name != entry.name]:
        raise Damaged(f"{path} names a file {foreign[0]!r} that does not lie beside it")
    return Manifest(files=files, **content)


def check(checkpoint: Path, entries: list[Entry]) -> None:
    """Compare files with what the manifest says of them.

    Raises:
        Damaged: where one is missing, or has another size or checksum.
    """
    for entry in entries:
        path = checkpoint / entry.name
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                raise Damaged(f"{path} has {size} bytes, and had {entry.bytes}")
            if checksum(path) != entry.checksum:
                raise Damaged(f"{path} has another checksum than it had")
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error}") from error


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


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(directory: Path) -> None:
    """Have the disk hold the files of a directory, and their names."""
    for path in directory.iterdir():
        if path.is_file():
            _flush_file(path)
    flush_folder(directory)


def _flush_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Have the disk know a folder's names, where its file system can be asked to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
