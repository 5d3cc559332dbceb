"""A model's parameters as sizes, and how DeepSpeed's configuration cuts them."""

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn

from distprune.engines.options import dtype_of, refused, with_defaults
from distprune.errors import UserError

_ALIGNMENT = 2
"""Elements to which ZeRO 1 and 2 align each rank's partition."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model's parameters, in elements.

    Attributes:
        groups: of the optimizer's groups, the trained parameters by name, in order.
        frozen: of the parameters that are not trained.
        prunable: names of those that are pruned.
    """

    groups: tuple[dict[str, int], ...]
    frozen: tuple[int, ...]
    prunable: frozenset[str]

    @property
    def trained(self) -> list[int]:
        """Sizes of the trained parameters, group by group."""
        return [size for group in self.groups for size in group.values()]

    @property
    def sizes(self) -> list[int]:
        """Sizes of all parameters."""
        return [*self.trained, *self.frozen]


def shapes_of(model: nn.Module, groups: list[dict[str, Any]], prunable: Collection[str]) -> Shapes:
    """Return the sizes of a model, whose parameters may be on the meta device.

    Args:
        model: with ``requires_grad`` as it will be trained.
        groups: the optimizer's.
        prunable: names of the parameters that are pruned.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Shapes(
        tuple({names[id(each)]: each.numel() for each in group["params"]} for group in groups),
        tuple(each.numel() for each in model.parameters() if not each.requires_grad),
        frozenset(prunable),
    )


@dataclass(frozen=True)
class Layout:
    """How DeepSpeed holds a model on each of ``world`` ranks; sizes in elements, as DeepSpeed's options are.

    Attributes:
        bucket: in which gradients are reduced.
        buckets: how many of them there are.
        flattens: whether a bucket is copied to be reduced at stages 1 and 2, as with DeepSpeed's ``reduce_scatter``.
        prefetch: weights that ZeRO-3 gathers ahead whenever a module begins.
        live: up to how many gathered weights it does so.
        reuse: within which distance of its next use ZeRO-3 keeps a gathered weight.
        sub_group: weights that ZeRO-3 updates at once.
        accumulates: type of the gradients that a rank keeps at stages 2 and 3; None: as the weights.
    """

    stage: int
    world: int
    dtype: torch.dtype = torch.float32
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 500_000_000
    buckets: int = 1
    flattens: bool = False
    prefetch: int = 50_000_000
    live: int = 1_000_000_000
    reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    accumulates: torch.dtype | None = None

    @property
    def width(self) -> int:
        """Bytes of a weight in the forward pass."""
        return self.dtype.itemsize

    @property
    def gradient_width(self) -> int:
        """Bytes of a gradient that a rank keeps."""
        return (self.accumulates or self.dtype).itemsize

    def piece(self, size: int) -> int:
        """Return what a rank holds of a parameter whose weights are cut up, its padding included."""
        return ceil(size / self.world)

    def partition(self, group: dict[str, int]) -> int:
        """Return a rank's partition of an optimizer group at stages 1 and 2, its padding included."""
        unit = _ALIGNMENT * self.world
        return ceil(sum(group.values()) / unit) * _ALIGNMENT


def layout_of(key: str, section: dict[str, Any], world: int) -> Layout:
    """Return the layout that a section of DeepSpeed's options leads to.

    Raises:
        UserError: options that DeepSpeed refuses, or whose memory is not known here.
    """
    try:
        zero = DeepSpeedZeroConfig(**with_defaults(section)["zero_optimization"])
    except ValidationError as error:
        raise refused(key, section, error) from error
    for name, offload in (("optimizer", zero.offload_optimizer), ("param", zero.offload_param)):
        if offload is not None and offload.device not in ("cpu", "none"):
            raise UserError(f"{key} has offload_{name}.device {str(offload.device)!r}; allowed: cpu")
    accumulates = section.get("data_types", {}).get("grad_accum_dtype")
    return Layout(
        int(zero.stage),
        world,
        dtype_of(section),
        zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu",
        zero.offload_param is not None and zero.offload_param.device == "cpu",
        zero.reduce_bucket_size,
        2 if zero.overlap_comm and zero.stage < 3 else 1,
        zero.reduce_scatter and zero.stage in (1, 2),
        zero.prefetch_bucket_size,
        zero.max_live_parameters,
        zero.max_reuse_distance,
        zero.sub_group_size,
        DtypeEnum(accumulates).value if accumulates else None,
    )
