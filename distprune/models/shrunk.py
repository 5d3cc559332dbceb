"""Heads and neurons that add nothing, taken out: smaller matrices, the same outputs.

A head or neuron whose columns of the output matrix are zero adds nothing to its layer. Its rows, their biases and those
columns go. Each layer keeps at least one, which torch's matrices need. Hugging Face configurations have one number of
heads and of neurons for all layers, so `load_shrunk` loads a shrunk directory, and takes the sizes from a file in it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from distprune.disk import open_to_readers
from distprune.errors import UserError
from distprune.models.files import SHRUNK, auto_class_of, read_config
from distprune.paths import expanded
from distprune.pruning.structures.attention import heads, is_by_columns, members, neurons
from distprune.pruning.structures.blocks import Grid


@dataclass(frozen=True)
class Removed:
    """How many heads and neurons went, of how many."""

    heads: int
    all_heads: int
    neurons: int
    all_neurons: int


def shrink(model: nn.Module, attention_heads: int) -> Removed:
    """Take out the heads and neurons that add nothing, in place.

    Args:
        model: whose layers have the names that `distprune.pruning.structures.attention` knows.
        attention_heads: in a layer.
    """
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and parameter.dim() == 2
    }
    # MPNet's attention knows its number of heads from elsewhere as well.
    of_heads = {name: shapes[name] for name in members(list(shapes), "heads") if "attention.attn." not in name}
    of_neurons = {name: shapes[name] for name in members(list(shapes), "neurons")}
    return Removed(
        *_take_out(model, _known(lambda: heads(of_heads, attention_heads))),
        *_take_out(model, _known(lambda: neurons(of_neurons))),
    )


def _known(grids: Callable[[], dict[str, Grid]]) -> dict[str, Grid]:
    """Return the grids of heads or neurons; none where this architecture has them in another way."""
    try:
        return grids()
    except UserError:
        return {}


def _take_out(model: nn.Module, grids: dict[str, Grid]) -> tuple[int, int]:
    """Take out what adds nothing of these units; return how many went, of how many."""
    removed = 0
    for layer in _layers(grids):
        kept = _useful(model, layer)
        for name, grid in layer.items():
            _keep(model.get_submodule(name.removesuffix(".weight")), grid, kept, is_by_columns(name))
        removed += int((~kept).sum())
    return removed, sum(grid.count for grid in grids.values() if grid.leads)


def save_shrunk(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write a shrunk model; `load_shrunk` reads it."""
    model.save_pretrained(directory, max_shard_size="100GB")
    open_to_readers(directory / "model.safetensors")
    tokenizer.save_pretrained(directory)
    sizes = {name: [module.out_features, module.in_features] for name, module in _linear(model)}
    (directory / SHRUNK).write_text(json.dumps(sizes, indent=2))


def load_shrunk(directory: Path | str, auto_class: Any = None) -> PreTrainedModel:
    """Return the model of a directory that `save_shrunk` wrote.

    Args:
        directory: as written.
        auto_class: the transformers auto class that builds it; None: the one that its configuration names.

    Raises:
        UserError: where the directory is no such one, or lacks weights that are not tied to others.
    """
    directory = expanded(directory)
    if not (directory / SHRUNK).exists():
        raise UserError(f"{str(directory)!r} holds no {SHRUNK}; allowed: a directory of distprune export --shrink")
    kind = auto_class or auto_class_of(directory)
    model: PreTrainedModel = kind.from_config(read_config(directory), trust_remote_code=False)
    take_sizes(model, directory)
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    model.tie_weights()
    stored = {id(each) for name, each in model.state_dict(keep_vars=True).items() if name not in missing}
    lost = [name for name in missing if id(model.state_dict(keep_vars=True)[name]) not in stored]
    if lost or unexpected:
        raise UserError(f"{str(directory)!r} lacks weights, or has others than the model: {[*lost, *unexpected]}")
    return model.eval()


def take_sizes(model: PreTrainedModel, directory: Path) -> None:
    """Give a model's matrices, new ones, the sizes of those that a shrunk directory holds.

    Raises:
        UserError: it holds those of another model.
    """
    sizes, linear = json.loads((directory / SHRUNK).read_text()), dict(_linear(model))
    if sizes.keys() != linear.keys():
        raise UserError(f"{directory / SHRUNK} has the sizes of another model than a {type(model).__name__}")
    for name, module in linear.items():
        out, into = sizes[name]
        if [out, into] != [module.out_features, module.in_features]:
            parent, _, child = name.rpartition(".")
            like: dict[str, Any] = {"dtype": module.weight.dtype, "device": module.weight.device}
            setattr(model.get_submodule(parent), child, nn.Linear(into, out, bias=module.bias is not None, **like))


def _layers(grids: dict[str, Grid]) -> Iterator[dict[str, Grid]]:
    """Yield the grids that share their units."""
    by_first: dict[int, dict[str, Grid]] = {}
    for name, grid in grids.items():
        by_first.setdefault(grid.first_unit, {})[name] = grid
    yield from by_first.values()


def _useful(model: nn.Module, layer: dict[str, Grid]) -> Tensor:
    """Return which units of a layer add something, at least one; bool, shape [units]."""
    (name,) = filter(is_by_columns, layer)
    grid = layer[name]
    columns = model.get_parameter(name).detach() != 0
    kept = columns.view(grid.shape[0], grid.count, grid.block[1]).any(2).any(0)
    if not kept.any():
        kept[0] = True
    return kept


@torch.no_grad()
def _keep(module: nn.Module, grid: Grid, kept: Tensor, by_columns: bool) -> None:
    """Keep the rows, or the columns, of these units."""
    assert isinstance(module, nn.Linear)
    weight = module.weight.detach()
    if by_columns:
        inside = kept.repeat_interleave(grid.block[1])
        module.weight = nn.Parameter(weight[:, inside].clone())
    else:
        inside = kept.repeat_interleave(grid.block[0])
        module.weight = nn.Parameter(weight[inside].clone())
        if module.bias is not None:
            module.bias = nn.Parameter(module.bias.detach()[inside].clone())
    module.out_features, module.in_features = module.weight.shape


def _linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
