"""A model directory in packed form: of each sparse tensor one bit a weight, and the values that are not zero.

``model*.safetensors`` become ``packed-model*.safetensors``. A tensor NAME that is smaller so is kept as ``NAME.mask``
(uint8, the bits of the flattened tensor, the first in the highest bit, padded with zeros) and ``NAME.values``, with its
shape in the file's metadata; any other as it is. Only +0.0 is left out, so that unpacking gives every bit back.
"""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distprune.disk import save
from distprune.errors import UserError, written
from distprune.models.card import mark_card
from distprune.models.files import new_directory, opened

PREFIX = "packed-"
_FORMAT = "distprune-packed"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of a tensor's values that are not +0.0, and these.

    Returns:
        uint8 of shape [ceil(n / 8)], and the tensor's type of shape [values].
    """
    flat = tensor.contiguous().view(-1)
    kept = flat.view(_BITS[flat.element_size()]) != 0
    return torch.from_numpy(np.packbits(kept.numpy())), flat[kept]


def unpack(mask: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Return the tensor that `pack` was given."""
    kept = torch.from_numpy(np.unpackbits(mask.numpy(), count=prod(shape)).astype(bool))
    flat = torch.zeros(prod(shape), dtype=values.dtype)
    flat[kept] = values
    return flat.view(shape)


def pack_directory(source: Path, target: Path) -> tuple[int, int]:
    """Write a model directory in packed form, one file at a time.

    Returns:
        The bytes of the weights' files, before and after.

    Raises:
        UserError: where there are no such files, the target exists, or one cannot be read or written.
    """
    return _convert(source, target, "", _packed)


def unpack_directory(source: Path, target: Path) -> tuple[int, int]:
    """Write a packed directory as the model directory that it was, as `pack_directory` does the reverse."""
    return _convert(source, target, PREFIX, _unpacked)


def is_packed(directory: Path) -> bool:
    """Return whether a directory holds a packed model."""
    return any(directory.glob(f"{PREFIX}model*.safetensors"))


def _convert(source: Path, target: Path, prefix: str, convert: Callable[[Path, Path], None]) -> tuple[int, int]:
    files = sorted(source.glob(f"{prefix}model*.safetensors"))
    if not files:
        raise UserError(f"{str(source)!r} holds no {prefix}model*.safetensors; allowed: a model directory")
    made = []
    with new_directory(source, target) as partial, written(target):
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        mark_card(partial / "README.md", packed=not prefix)
        for file in files:
            name = file.name.removeprefix(PREFIX)
            made.append(partial / (name if prefix else PREFIX + name))
            convert(file, made[-1])
        return sum(file.stat().st_size for file in files), sum(file.stat().st_size for file in made)


def _packed(source: Path, target: Path) -> None:
    with opened(source) as reader:
        names = list(reader.keys())
        save_packed({name: reader.get_tensor(name) for name in names}, target)


def save_packed(tensors: dict[str, Tensor], target: Path) -> None:
    """Write one file of a packed model.

    Raises:
        OSError, SafetensorError: where it cannot be written.
    """
    parts: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        mask, values = pack(tensor)
        if mask.nbytes + values.nbytes < tensor.nbytes:
            parts[f"{name}.mask"], parts[f"{name}.values"] = mask, values
            shapes[name] = list(tensor.shape)
        else:
            parts[name] = tensor
    save(parts, target, {"format": _FORMAT, "shapes": json.dumps(shapes)})


def _unpacked(source: Path, target: Path) -> None:
    tensors: dict[str, Tensor] = {}
    with opened(source) as reader:
        metadata = reader.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise UserError(f"{source} is not of the format {_FORMAT}")
        shapes = json.loads(metadata["shapes"])
        for name, shape in shapes.items():
            tensors[name] = unpack(reader.get_tensor(f"{name}.mask"), reader.get_tensor(f"{name}.values"), shape)
        parts = {f"{name}.{part}" for name in shapes for part in ("mask", "values")}
        tensors |= {name: reader.get_tensor(name) for name in set(reader.keys()) - parts}
    save(tensors, target, {"format": "pt"})
