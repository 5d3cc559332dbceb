"""What a forward pass holds, counted on one real example: for the backward pass, or at once where there is none."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors while they come into being and go; those that are told to it are left out."""

    def __init__(self, known: set[int]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (each for each in tree_leaves(result) if isinstance(each, Tensor)):
            self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._now -= size


@torch.no_grad()
def most_at_once(model: nn.Module, work: Callable[[], object]) -> int:
    """Return the most bytes of tensors that are there at once while ``work`` runs, without parameters and buffers."""
    alive = _Alive({each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())})
    with alive:
        work()
    return alive.peak
