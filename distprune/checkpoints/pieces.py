"""The tensors of a checkpoint: each rank's own slices, found again by name and range at any world size and stage.

A tensor's key is ``NAME[START:END].KIND``: the part of a flattened parameter, and what it is of it: ``master`` (fp32
weights), a moment by its name in the optimizer (``exp_avg``), ``mask`` (a bit a weight, the first in the highest bit,
1: pruned), ``score`` (what a score has added up), ``removed`` (what pruned weights were that may come back), ``frozen``
(weights that are not trained) or ``buffer``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distprune.checkpoints.files import read_manifest
from distprune.disk import Damaged
from distprune.errors import UserError
from distprune.pruning.masks import KEPT, PRUNED

_KEY = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<end>\d+)\]\.(?P<kind>\w+)")
WEIGHTS = ("master", "frozen", "buffer")


def key_of(name: str, start: int, size: int, kind: str) -> str:
    """Return the key of a part of a flattened tensor."""
    return f"{name}[{start}:{start + size}].{kind}"


def packed(key: str, values: Tensor) -> Tensor:
    """Return a tensor as it goes to the disk: a mask with a bit a weight, anything else as it is."""
    if not key.endswith("].mask"):
        return values
    return torch.from_numpy(np.packbits((values == PRUNED).numpy()))


@dataclass(frozen=True)
class _Stored:
    """Where a piece of a tensor is."""

    start: int
    end: int
    file: Path
    key: str


@dataclass
class Pieces:
    """The tensors of a checkpoint, by name; reads as little as is asked for.

    Raises:
        UserError: where the checkpoint's files cannot be read.
    """

    directory: Path
    file_of: dict[str, Path] = field(init=False)
    """A file of each parameter and buffer of the model, as ``distprune.models.files.ModelFiles`` has it."""

    def __post_init__(self) -> None:
        try:
            manifest = read_manifest(self.directory)
        except Damaged as error:
            raise UserError(f"checkpoint {self.directory} is damaged: {error}") from error
        self._shapes: dict[str, list[int]] = manifest.state["shapes"]
        self._open: dict[Path, Any] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        for entry in manifest.files:
            if entry.name.endswith(".safetensors"):
                self._index(self.directory / entry.name)
        for pieces in self._stored.values():
            pieces.sort(key=lambda piece: piece.start)
        self.file_of = {name: pieces[0].file for (name, kind), pieces in self._stored.items() if kind in WEIGHTS}

    def shape(self, name: str) -> list[int]:
        """Return the whole shape of a parameter or buffer."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a parameter (fp32) or buffer is exported in."""
        if (name, "buffer") not in self._stored:
            return torch.float32
        (piece,) = self._stored[name, "buffer"]
        dtype: torch.dtype = self._reader(piece.file).get_tensor(piece.key).dtype
        return dtype

    def read(self, name: str) -> Tensor:
        """Return a whole parameter or buffer: the fp32 weights of one that was trained."""
        kind = next(kind for kind in WEIGHTS if (name, kind) in self._stored)
        shape = self._shapes[name]
        whole = self.part(name, kind, 0, prod(shape))
        assert whole is not None
        return whole.view(shape)

    def kinds(self, name: str) -> list[str]:
        """Return the kinds that there are of a parameter."""
        return [kind for each, kind in self._stored if each == name]

    def part(self, name: str, kind: str, start: int, end: int) -> Tensor | None:
        """Return the part ``[start, end)`` of a flattened tensor, None where nothing of it was saved.

        Masks come as int8, a byte a weight, as a pruner has them.
        """
        pieces = self._stored.get((name, kind))
        if pieces is None:
            return None
        parts = list(self._parts(pieces, kind, start, end))
        found = torch.cat(parts) if len(parts) != 1 else parts[0]
        assert found.numel() == end - start, f"the checkpoint lacks a part of {name}'s {kind}"
        return found

    def _parts(self, pieces: list[_Stored], kind: str, start: int, end: int) -> Iterator[Tensor]:
        for piece in pieces:
            first, last = max(start, piece.start), min(end, piece.end)
            if first >= last:
                continue
            within = slice(first - piece.start, last - piece.start)
            stored = self._reader(piece.file)
            if kind == "mask":
                bits = np.unpackbits(stored.get_tensor(piece.key).numpy(), count=piece.end - piece.start)[within]
                yield torch.where(torch.from_numpy(bits).bool(), PRUNED, KEPT).to(torch.int8)
            else:
                yield stored.get_slice(piece.key)[within]

    def _index(self, file: Path) -> None:
        for key in self._reader(file).keys():  # noqa: SIM118 - not a dict
            match = _KEY.fullmatch(key)
            assert match, f"{file} holds {key!r}"
            piece = _Stored(int(match["start"]), int(match["end"]), file, key)
            self._stored.setdefault((match["name"], match["kind"]), []).append(piece)

    def _reader(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read as safetensors: {error}") from error
        return self._open[file]
