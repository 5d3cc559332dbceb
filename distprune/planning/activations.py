"""The activations of a forward pass: what autograd keeps for the backward pass, counted on one real example."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Activations:
    """Bytes of each tensor that autograd keeps for one example."""

    sizes: tuple[int, ...]

    def total(self, examples: int, below: int | None = None) -> int:
        """Return the bytes for a number of examples of the same length, in pieces below a size where one is given."""
        return sum(size * examples for size in self.sizes if below is None or size * examples < below)


def count(model: nn.Module, loss: Callable[[], Tensor]) -> Activations:
    """Run a loss's forward pass, and count what is kept that is not a parameter or a buffer; views count once.

    Args:
        model: in training mode, with activation checkpointing where the run has it.
        loss: of one example.
    """
    ours = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return Activations(tuple(each.untyped_storage().nbytes() for each in kept.values()))
