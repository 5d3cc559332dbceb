"""Files that are whole or not there, that the disk has, and that are what was written."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_CHUNK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """A file as it was written: its name, its size in bytes, and its 128 bits of XXH3."""

    name: str
    bytes: int
    checksum: str


class Damaged(Exception):
    """What is read is not what was written; the message names the file."""


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


def entries_of(directory: Path) -> list[Entry]:
    """Wait until the disk has the files of a directory, and return their entries."""
    return [entry_of(path) for path in sorted(directory.iterdir())]


def checksum(path: Path) -> str:
    """Return the XXH3 of a file, 128 bits in hexadecimal."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(memoryview(buffer)[:read])
    return digest.hexdigest()


def hash_of(file: Path) -> str:
    """Return the hash of a file, which a process reads once as long as nothing is done to it."""
    return _hash(file, file.stat().st_ctime_ns)


@cache
def _hash(file: Path, changed_at: int) -> str:
    return checksum(file)


def check(directory: Path, entries: list[Entry]) -> None:
    """Compare files of a directory with their entries.

    Raises:
        Damaged: where one is missing, or has another size or checksum.
    """
    for entry in entries:
        path = directory / entry.name
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                raise Damaged(f"{path} has {size} bytes, and had {entry.bytes}")
            if checksum(path) != entry.checksum:
                raise Damaged(f"{path} has another checksum than it had")
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file that is, at any moment, either as before or complete."""
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def partial_of(path: Path) -> Path:
    """Return the name that a file or a directory has until it is complete."""
    return path.with_name(path.name + ".partial")


def replace(partial: Path, directory: Path) -> None:
    """Give a complete directory its name, once the disk has it; what had the name before goes."""
    flush(partial)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    flush_folder(directory.parent)


def copy_directory(source: Path, directory: Path) -> None:
    """Copy a directory; what was there goes once the copy is complete."""
    partial = partial_of(directory)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    replace(partial, directory)


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
