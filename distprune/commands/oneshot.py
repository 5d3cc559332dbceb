"""``distprune oneshot``: prune a model directory by global magnitude, without training."""

import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate
from math import floor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from distprune.errors import UserError
from distprune.pruning.select import CHUNK, Cut, magnitude_keys, select_smallest
from distprune.pruning.targets import find_targets
from distprune.weights import Checkpoint, match_names, read_config, resolve, skeleton

_OF_THE_DENSE_MODEL = ("*.safetensors", "*.bin", "README.md", "pruning.json", ".*")


def run(model_dir: str, out: str, sparsity: float, include: list[str], exclude: list[str]) -> None:
    """Write a copy of a model whose smallest weights are zero, reading one tensor at a time."""
    if not 0 <= sparsity < 1:
        raise UserError(f"--sparsity is {sparsity}; allowed: [0, 1)")
    source, target = resolve(model_dir, None), Path(out).expanduser()
    if target.exists():
        raise UserError(f"{out!r} exists; allowed: a new directory")
    model, checkpoint = skeleton(source, _auto_class(source), {})
    names = find_targets(model, include, exclude)
    stored = match_names(names, list(checkpoint.file_of), model.base_model_prefix)
    _refuse_unusable(model, checkpoint, names, stored)
    sizes = {stored[name]: model.get_parameter(name).numel() for name in names}
    first = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def chunks() -> Iterator[tuple[Tensor, int]]:
        for name in sizes:
            keys = magnitude_keys(checkpoint.read(name).float().view(-1))
            yield from ((piece, first[name] + CHUNK * n) for n, piece in enumerate(torch.split(keys, CHUNK)))

    total = sum(sizes.values())
    wanted = floor(Fraction(str(sparsity)) * total)
    cut = select_smallest(chunks, wanted, lambda counts: counts)
    record = {
        "method": "one-shot global magnitude",
        "sparsity": sparsity,
        "masked": wanted,
        "prunable": total,
        "threshold": cut.threshold,
    }
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*_OF_THE_DENSE_MODEL))
        _write(checkpoint, partial, first, cut)
        (partial / "pruning.json").write_text(json.dumps(record, indent=2))
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out!r} cannot be written: {error}") from error
    print(f"masked {wanted} of {total} weights -> {target}")


def _auto_class(directory: Path) -> Any:
    """Return the class that a run would load the model with, so that regexes find the same names."""
    classes = read_config(directory).architectures or []
    return AutoModelForSequenceClassification if "SequenceClassification" in "".join(classes) else AutoModel


def _refuse_unusable(model: nn.Module, checkpoint: Checkpoint, names: list[str], stored: dict[str, str]) -> None:
    """Refuse a checkpoint whose weights to prune are missing, of another shape than the model's, or NaN."""
    for name in names:
        if name not in stored:
            raise UserError(f"{checkpoint.directory} lacks {name}, which is to be pruned")
        tensor, shape = checkpoint.read(stored[name]), model.get_parameter(name).shape
        if tensor.shape != shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)} in {checkpoint.directory}, and {list(shape)} in the model"
            )
        if tensor.isnan().any():
            raise UserError(f"{name} in {checkpoint.directory} holds NaN, which has no magnitude to prune by")


def _write(checkpoint: Checkpoint, target: Path, first: dict[str, int], cut: Cut) -> None:
    """Write the files again, one at a time, with the selected weights zero."""
    for file in sorted(set(checkpoint.file_of.values())):
        tensors: dict[str, Tensor] = {}
        for name in (name for name, place in checkpoint.file_of.items() if place == file):
            tensor = checkpoint.read(name)
            if name in first:
                pruned = cut.selects(magnitude_keys(tensor.float().view(-1)), first[name])
                tensor = torch.masked_fill(tensor, pruned.view_as(tensor), 0.0)
            tensors[name] = tensor
        save_file(tensors, target / file.name, {"format": "pt"})
