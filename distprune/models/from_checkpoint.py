"""A checkpoint as a Hugging Face directory, from the files alone: of any world and stage, on any number of ranks."""

import shutil
from math import prod
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit
from torch import Tensor

from distprune import disk, dist, turns
from distprune.checkpoints import files
from distprune.checkpoints.files import Manifest
from distprune.checkpoints.pieces import Pieces
from distprune.disk import Damaged, save
from distprune.errors import UserError, written
from distprune.models.card import chosen_by
from distprune.models.export import plan_files, write_index
from distprune.models.files import begin_directory, gone_if_it_fails
from distprune.models.packed import PREFIX, save_packed
from distprune.monitor.records import write_json


def export_checkpoint(checkpoint: Path, target: Path, packed: bool) -> dict[str, int]:
    """Write the model in a checkpoint: fp32 weights, its configuration and the tokenizer.

    Collective: every rank calls it. The ranks share out checking the checkpoint's files and writing the model's; each
    holds one file's tensors at a time.

    Args:
        checkpoint: a directory that training wrote.
        target: a new directory.
        packed: write the packed form (`distprune.models.packed`).

    Returns:
        Bytes of the weights' ``files``, and of their ``tensors`` as fp32.

    Raises:
        UserError: on every rank, where the checkpoint is damaged, or the target exists or cannot be written.
    """
    world = dist.detect()
    manifest = dist.agree(lambda: _checked(checkpoint, world.rank, world.size))

    pieces = Pieces(checkpoint)
    plan = plan_files({name: _meta(pieces, name) for name in pieces.file_of})

    def begin() -> Path:
        partial = begin_directory(checkpoint, target)
        with gone_if_it_fails(partial), written(target):
            for entry in manifest.files:
                if not entry.name.endswith(".safetensors"):
                    shutil.copy(checkpoint / entry.name, partial / entry.name)
        return partial

    def finish() -> None:
        write_index(plan, partial)  # a packed directory keeps it for what is unpacked
        if record := _record(manifest):
            write_json(partial / "pruning.json", record)
        partial.rename(target)

    partial = turns.on_main(begin)
    with gone_if_it_fails(partial):
        dist.agree(lambda: _write_files(pieces, plan, partial, packed, world.rank, world.size))
        turns.write_on_main(finish, target)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return {"files": size, "tensors": sum(_meta(pieces, name).nbytes for name in pieces.file_of)}


def _checked(checkpoint: Path, rank: int, world: int) -> Manifest:
    """Return the manifest, with this rank's part of the files checked."""
    try:
        manifest = files.read_manifest(checkpoint)
        disk.check(checkpoint, manifest.files[rank::world])
    except Damaged as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {error}") from error
    return manifest


def _meta(pieces: Pieces, name: str) -> Tensor:
    return torch.empty(pieces.shape(name), dtype=pieces.dtype(name), device="meta")


def _write_files(pieces: Pieces, plan: StateDictSplit, partial: Path, packed: bool, rank: int, world: int) -> None:
    for file, names in list(plan.filename_to_tensors.items())[rank::world]:
        tensors = {name: pieces.read(name).to(pieces.dtype(name)) for name in names}
        with written(partial / file):
            if packed:
                save_packed(tensors, partial / f"{PREFIX}{file}")
            else:
                save(tensors, partial / file, {"format": "pt"})


def _record(manifest: Manifest) -> dict[str, object] | None:
    """Return what ``pruning.json`` says: how far the pruning was, and how many weights went in each matrix."""
    pruner = manifest.state["pruner"]
    if pruner is None or not sum(pruner["masked_of"].values()):
        return None
    masked_of: dict[str, int] = pruner["masked_of"]
    weights = {name: prod(manifest.state["shapes"][name]) for name in masked_of}
    return {
        "step": manifest.step,
        "sparsity_masked": sum(masked_of.values()) / sum(weights.values()),
        "masked_weights": sum(masked_of.values()),
        "prunable_weights": sum(weights.values()),
        "layers": {name: {"masked": masked, "weights": weights[name]} for name, masked in masked_of.items()},
        **chosen_by(manifest.state["config"]),
    }
