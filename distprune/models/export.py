"""A model out of its engine, at any ZeRO stage, into a Hugging Face directory that needs no distprune to load."""

import json
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from distprune import turns
from distprune.disk import save
from distprune.zero.engine import FullParameters, stored_buffers
from distprune.zero.shards import full_shape

_FILE_SIZE = "4GB"


def export(engine: Any, tokenizer: Any, directory: Path) -> None:
    """Write the fp32 weights and the buffers that belong to the model, its configuration and the tokenizer.

    Frozen weights have no fp32 master: in a bf16 run they are written as they were used, rounded to bf16.

    Collective: every rank calls it. One tensor at a time is put together, and rank 0 writes a file as soon as it is
    full, so that no rank holds more than one file's tensors.

    Args:
        engine: a student's engine.
        tokenizer: saved beside the weights.
        directory: made where it is missing; a model that is there is replaced.

    Raises:
        UserError: on every rank, where it cannot be written.
    """
    model = engine.module
    meta = {name: torch.empty(full_shape(parameter), device="meta") for name, parameter in model.named_parameters()}
    buffers = stored_buffers(model)
    meta |= {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
    plan = plan_files(meta)

    def clear() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob("model*.safetensors*"):
            stale.unlink()

    turns.write_on_main(clear, directory)
    full = FullParameters(engine)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: buffers[name].cpu() if name in buffers else full.on_main(name) for name in names}
        save = partial(_save, tensors, directory / file)
        turns.write_on_main(save, directory / file)

    def complete() -> None:
        write_index(plan, directory)
        describe(model, tokenizer, directory)

    turns.write_on_main(complete, directory)


def plan_files(tensors: dict[str, Tensor]) -> StateDictSplit:
    """Return which file each tensor goes to; only their shapes and types are looked at."""
    return split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_FILE_SIZE
    )


def write_index(plan: StateDictSplit, directory: Path) -> None:
    """Write which file holds each tensor, where there are several."""
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def describe(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write what makes a directory of fp32 weights a model's: its configurations and the tokenizer.

    Args:
        model: a student, as `distprune.engines.build.build_student` loads it.
        tokenizer: its own.
        directory: that is there.
    """
    config = model.written_config
    config.architectures, config.dtype = [type(model).__name__], "float32"
    config.save_pretrained(directory)
    if model.can_generate():  # as it was read: transformers saves none that it finds fault with
        model.generation_config.to_json_file(directory / GENERATION_CONFIG_NAME)
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # that of the tokenizers library is of no kind, whatever the disk says
        raise OSError(f"the tokenizer cannot be saved: {error}") from error


class Counts(NamedTuple):
    """What a written tensor holds."""

    zeros: int
    elements: int
    bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes in packed form (`packed`): a bit an element, and the values that are not zero."""
        of_values = (self.elements - self.zeros) * self.bytes // max(self.elements, 1)
        return min(self.bytes, ceil(self.elements / 8) + of_values)


def count_zeros(directory: Path) -> dict[str, Counts]:
    """Count what each tensor of the written files holds."""
    counts: dict[str, Counts] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dict
                tensor = reader.get_tensor(name)
                counts[name] = Counts(int((tensor == 0).sum()), tensor.numel(), tensor.nbytes)
    return counts


def _save(tensors: dict[str, Tensor | None], file: Path) -> None:
    save({name: _present(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
