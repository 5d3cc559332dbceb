"""A model directory pruned in one shot by a score of its weights, one file after the other.

Each rank reads, scores and writes its files, so that a model larger than the memory of one machine can be pruned by
several, and one larger than theirs by reading it once a pass.
"""

import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distprune import dist, turns
from distprune.checkpoints.files import is_checkpoint
from distprune.config import PruningConfig
from distprune.disk import save
from distprune.errors import UserError, written
from distprune.models.files import Source, auto_class_of, begin_directory, gone_if_it_fails
from distprune.models.weights import names_to_prune, skeleton
from distprune.pruning.exchange import over_ranks, summed, summed_by_name
from distprune.pruning.masks import KEPT, PRUNED, count_pruned
from distprune.pruning.scores import Score
from distprune.pruning.slices import Slice
from distprune.pruning.structures import Choice, build_structure, check_sparsity
from distprune.pruning.targets import freeze, targets_of

_OF_THE_DENSE_MODEL = ("*.safetensors", "*.bin", "README.md", "pruning.json", ".*")


class Pruned(NamedTuple):
    """What was pruned, and the directory beside the new one that holds it."""

    directory: Path
    masked: int
    prunable: int
    threshold: float


@dataclass
class _Files:
    """The part of a model's files that this rank reads and writes."""

    model: PreTrainedModel
    checkpoint: Source
    stored: dict[str, str]
    """The name in the files of each parameter to prune."""
    mine: list[Path]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters to prune."""
        return {name: tuple(self.model.get_parameter(name).shape) for name in self.stored}

    def slices(self, start_sparse: bool) -> list[Slice]:
        """Return the tensors to prune that this rank has, whole; each is read when a pass comes to it.

        Nothing is masked, for which one byte is enough; or what is zero, which takes a byte a weight.
        """
        read = lru_cache(maxsize=1)(lambda name: self.checkpoint.read(name).float().view(-1))
        kept = torch.tensor([KEPT], dtype=torch.int8)
        first, slices = 0, []
        for name, shape in self.shapes.items():
            size, stored = prod(shape), self.stored[name]
            if self.checkpoint.file_of[stored] in self.mine:
                mask = (
                    torch.where(read(stored) == 0, PRUNED, KEPT).to(torch.int8) if start_sparse else kept.expand(size)
                )
                slices.append(Slice(name, 0, size, 0, size, first, mask, partial(read, stored)))
            first += size
        return slices


def prune_files(source: Path, target: Path, pruning: PruningConfig, score: Score, frozen: list[str]) -> Pruned:
    """Write a pruned copy of a model directory beside a new one. Collective: every rank calls it.

    Args:
        source: of the model.
        target: the new directory, which is not made yet.
        pruning: which weights, and how many.
        score: of weights alone.
        frozen: regexes of what is to stay as it is.

    Raises:
        UserError: on every rank, where the model is not one that can be pruned so, or the copy cannot be written.
    """
    files = dist.agree(lambda: _open(source, pruning, frozen))
    slices = files.slices(pruning.start_sparse)
    sizes = {name: prod(shape) for name, shape in files.shapes.items()}
    heads = getattr(files.model.config, "num_attention_heads", None)
    structure = dist.agree(lambda: build_structure(pruning, files.shapes, {name: [] for name in sizes}, heads))
    dist.agree(lambda: check_sparsity(pruning, structure))
    directory = turns.on_main(lambda: begin_directory(source, target))
    with gone_if_it_fails(directory):
        device = dist.detect().device
        over_ranks(score.prepare(slices, sizes), device)
        sparsity = Fraction(str(pruning.sparsity))
        mine = ((each.name, count_pruned(each.mask)) for each in slices)
        before = over_ranks(summed_by_name(sizes, mine), device)
        choosing = structure.choose(slices, score, sparsity, before)
        choice = over_ranks(choosing, device)
        others = shutil.ignore_patterns(*_OF_THE_DENSE_MODEL)
        turns.write_on_main(lambda: shutil.copytree(source, directory, ignore=others, dirs_exist_ok=True), target)
        masked = dist.agree(lambda: _write(files, slices, choice, directory))
        (total,) = over_ranks(summed(torch.tensor([masked])), device).tolist()
        wanted = structure.masked_at(sparsity)
        assert total == wanted or (any(before.values()) and total > wanted), f"{total} were masked, and not {wanted}"
    return Pruned(directory, total, sum(sizes.values()), choice.threshold)


def _open(source: Path, pruning: PruningConfig, frozen: list[str]) -> _Files:
    """Find the weights to prune, and deal the files out to the ranks.

    Raises:
        UserError: where a weight is missing, of another shape than the model's, or there twice.
    """
    if is_checkpoint(source):
        raise UserError(f"{str(source)!r} is a checkpoint; allowed: a model directory, as distprune export makes")
    model, checkpoint = skeleton(source, auto_class_of(source), {})
    freeze(model, frozen)
    names = targets_of(pruning, model)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    stored = names_to_prune(model, checkpoint, shapes)
    for first, *others in stored.values():
        if others:
            raise UserError(
                f"{first} is to be pruned, and is also stored as {others[0]} in {source}; allowed: tied weights stored "
                "once, as transformers' save_pretrained does"
            )
    world = dist.detect()
    every = sorted(set(checkpoint.file_of.values()), key=lambda file: (-file.stat().st_size, file))
    mine = every[world.rank :: world.size]
    return _Files(model, checkpoint, {name: first for name, (first,) in stored.items()}, mine)


def _write(files: _Files, slices: list[Slice], choice: Choice, directory: Path) -> int:
    """Write this rank's files again, one at a time, with the chosen weights zero; return how many those are.

    Raises:
        UserError: where a weight is NaN, or a file cannot be written.
    """
    sliced = {files.stored[each.name]: each for each in slices}
    masked = 0
    for file in files.mine:
        tensors: dict[str, Tensor] = {}
        for name in (name for name, place in files.checkpoint.file_of.items() if place == file):
            tensor = files.checkpoint.read(name)
            if name in sliced:
                mask = sliced[name].mask.clone(memory_format=torch.contiguous_format)
                if choice.mark(replace(sliced[name], mask=mask)):
                    raise UserError(
                        f"{name} in {files.checkpoint.directory} has scores that are NaN, and no place in an order"
                    )
                tensor = tensor.masked_fill((mask == PRUNED).view_as(tensor), 0.0)
                masked += count_pruned(mask)
            tensors[name] = tensor
        with written(directory / file.name):
            save(tensors, directory / file.name, {"format": "pt"})
    return masked
