"""This rank's slices of each parameter, for any ZeRO stage.

ZeRO keeps the fp32 weights that the optimizer updates (the master), their moments and their averaged gradient in
flat tensors, cut differently at each stage. A `Shard` is the part of one parameter that this rank holds there:

* stage 0: the whole parameter, on every rank; for counting, rank r owns the r-th part of it;
* stages 1 and 2: the piece of the flat partition that overlaps the parameter (``param._hp_mapping``);
* stage 3: the rank's piece of the parameter, less its padding (``param.ds_tensor``).

Read in DeepSpeed 0.19; other versions are refused rather than guessed at.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from packaging.version import Version
from torch import Tensor, nn

from distprune.errors import UserError

KNOWN_VERSIONS = ("0.19.8", "0.20")
"""The first of them is the first that stops at gradients which are not finite; those before it clip and apply them."""


@dataclass(frozen=True)
class Shard:
    """One parameter's slice ``[start, end)``, in the flattened parameter, that this rank holds.

    ``own_start`` and ``own_end`` bound the part that this rank counts: over all ranks, each element once.
    ``base`` is the tensor that the optimizer steps, and ``offset`` where in it the slice begins.
    """

    name: str
    start: int
    end: int
    own_start: int
    own_end: int
    base: Tensor
    offset: int
    low_precision: Tensor

    @property
    def master(self) -> Tensor:
        """The fp32 weights, shape [end - start]; writing to it changes the optimizer's own."""
        return self.base.data.view(-1)[self.offset : self.offset + self.end - self.start]

    @property
    def owned(self) -> slice:
        """The part of the slice that this rank counts."""
        return slice(self.own_start - self.start, self.own_end - self.start)

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the optimizer's state of the slice by name, each of shape [end - start]; {} before the first step."""
        return {
            name: value.view(-1)[self.offset : self.offset + self.end - self.start]
            for name, value in optimizer.state.get(self.base, {}).items()
            if torch.is_tensor(value) and value.shape == self.base.shape and value.dim() > 0
        }


class ShardedParameters(ABC):
    """This rank's shards of some trainable parameters of an engine, in the order of their names."""

    def __init__(self, engine: Any, names: Iterable[str]):
        self.engine = engine
        self.parameters: dict[str, Any] = dict(engine.module.named_parameters())
        self.names = list(names)
        self.numel = {name: self.shape(name).numel() for name in self.names}
        self.shards = [shard for name in self.names if (shard := self._shard(name)) is not None]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a whole parameter."""
        return full_shape(self.parameters[name])

    @abstractmethod
    def _shard(self, name: str) -> Shard | None:
        """Return this rank's slice of a parameter, None where it holds nothing of it."""

    @abstractmethod
    def gradient(self, shard: Shard) -> Tensor | None:
        """Return the averaged gradient of a slice, shape [end - start], to be written in place.

        It is there between the backward pass of an accumulation boundary and ``engine.step()``; None where the
        parameter took no part in the loss.
        """

    def drop_gradients(self) -> None:
        """Forget the gradients of a backward pass, as if it had not been: no step is taken on them."""
        self.engine.optimizer.zero_grad()

    def gradients_changed(self, shards: Iterable[Shard]) -> None:
        """Tell DeepSpeed that gradients were written: under optimizer offload it noted their norms beforehand."""
        optimizer = self.engine.optimizer
        noted = getattr(optimizer, "norm_for_param_grads", None)
        if noted is None:
            return
        for shard in shards:
            parameter_id = optimizer.get_param_id(self.parameters[shard.name])
            gradient = self.gradient(shard)
            if gradient is not None and parameter_id in noted:
                noted[parameter_id] = gradient.float().norm(2).to(noted[parameter_id].device)


class ReplicatedParameters(ShardedParameters):
    """Stage 0: every rank holds every parameter whole; the fp32 copy is apart in bf16."""

    def __init__(self, engine: Any, names: Iterable[str]):
        optimizer = engine.optimizer
        low = [p for group in getattr(optimizer, "fp16_groups", []) for p in group]
        high = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        self._master_of: dict[int, Tensor] = {id(low_p): high_p for low_p, high_p in zip(low, high, strict=True)}
        super().__init__(engine, names)

    def _shard(self, name: str) -> Shard:
        parameter = self.parameters[name]
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        numel = parameter.numel()
        return Shard(
            name,
            0,
            numel,
            numel * rank // world,
            numel * (rank + 1) // world,
            self._master_of.get(id(parameter), parameter),
            0,
            parameter.data.view(-1),
        )

    def gradient(self, shard: Shard) -> Tensor | None:  # noqa: D102 - as in the base class
        gradient = self.parameters[shard.name].grad
        return None if gradient is None else gradient.view(-1)


class PartitionedOptimizer(ShardedParameters):
    """Stages 1 and 2: each rank's optimizer holds one partition of each flattened parameter group."""

    def _shard(self, name: str) -> Shard | None:
        mapping = self.parameters[name]._hp_mapping
        if mapping is None:
            return None
        held, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        start, end = held.start, held.start + held.numel
        base = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return Shard(name, start, end, start, end, base, flat.start, mapping.lp_fragment.data.view(-1))

    def gradient(self, shard: Shard) -> Tensor | None:  # noqa: D102 - as in the base class
        parameter = self.parameters[shard.name]
        if self.engine.optimizer.cpu_offload:
            get_accelerator().synchronize()  # its copy from a GPU may be under way
        fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        gradient: Tensor = fragment.view(-1)
        assert gradient.numel() == shard.end - shard.start, f"gradient of {shard.name} is not its partition's"
        return gradient

    def drop_gradients(self) -> None:  # noqa: D102
        optimizer = self.engine.optimizer
        super().drop_gradients()
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
            return
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None


class PartitionedParameters(ShardedParameters):
    """Stage 3: each rank holds one piece of each parameter; the last pieces end in padding that is never set."""

    def __init__(self, engine: Any, names: Iterable[str]):
        optimizer = engine.optimizer
        self._place = {
            id(parameter): (sub_group, index)
            for sub_group, group in enumerate(optimizer.fp16_groups)
            for index, parameter in enumerate(group)
        }
        super().__init__(engine, names)

    def _shard(self, name: str) -> Shard | None:
        parameter, optimizer = self.parameters[name], self.engine.optimizer
        sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        end = min(start + size, parameter.ds_numel)
        if end <= start:
            return None
        base = optimizer.fp32_partitioned_groups_flat[sub_group]
        return Shard(name, start, end, start, end, base, offset, parameter.ds_tensor.data[: end - start])

    def gradient(self, shard: Shard) -> Tensor | None:  # noqa: D102 - as in the base class
        optimizer, length = self.engine.optimizer, shard.end - shard.start
        if optimizer.offload_optimizer:
            flat: Tensor = shard.base.grad  # type: ignore[assignment]
            return flat[shard.offset : shard.offset + length]
        sub_group, index = self._place[id(self.parameters[shard.name])]
        piece: Tensor = optimizer.averaged_gradients[sub_group][index]
        return piece.view(-1)[:length]


_LAYOUTS: dict[str, type[ShardedParameters]] = {
    "AdamW": ReplicatedParameters,
    "FP16_UnfusedOptimizer": ReplicatedParameters,
    "DeepSpeedZeroOptimizer": PartitionedOptimizer,
    "DeepSpeedZeroOptimizer_Stage3": PartitionedParameters,
}


def shards_of(engine: Any, names: Iterable[str]) -> ShardedParameters:
    """Return this rank's shards of the named parameters, whatever the engine's ZeRO stage.

    Raises:
        UserError: where DeepSpeed's version or layout is not one that is known here.
    """
    low, high = KNOWN_VERSIONS
    if not Version(low) <= Version(deepspeed.__version__.split("+")[0]) < Version(high):
        raise UserError(f"DeepSpeed {deepspeed.__version__} is not known to distprune; allowed: >={low},<{high}")
    wrapper = type(engine.optimizer).__name__
    if wrapper not in _LAYOUTS:
        raise UserError(
            f"DeepSpeed wrapped the optimizer in {wrapper}, whose layout distprune does not know; allowed: a "
            f"configuration that leads to one of {', '.join(_LAYOUTS)}"
        )
    zero = engine._config.zero_config
    if zero.zero_hpz_partition_size > 1:
        raise UserError("zero_hpz_partition_size is not supported; allowed: leave it out")
    if zero.round_robin_gradients and zero.stage in (1, 2):
        # DeepSpeed stores the parameters in another order, and maps them as if it had not.
        raise UserError("round_robin_gradients is not supported at ZeRO stages 1 and 2; allowed: leave it out")
    if zero.offload_optimizer is not None and zero.offload_optimizer.ratio != 1.0:
        raise UserError("offload_optimizer.ratio is not supported; allowed: 1.0, or leave it out")
    parameters = _LAYOUTS[wrapper](engine, names)
    if any(shard.base.dtype != torch.float32 for shard in parameters.shards):
        raise UserError("the optimizer's weights are not fp32; allowed: no *_master_weights_and_grads options")
    return parameters


def trained_shards(engine: Any) -> ShardedParameters:
    """Return this rank's shards of all trained parameters, as `shards_of` does."""
    return shards_of(engine, [name for name, each in engine.module.named_parameters() if each.requires_grad])


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, also where ZeRO-3 holds only a piece of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
