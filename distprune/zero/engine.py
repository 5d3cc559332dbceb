"""What else an engine holds on this rank: frozen weights, buffers, loss scaling, bytes; and whole parameters."""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from distprune.zero.shards import full_shape, trained_shards


@torch.no_grad()
def take_back_empty_step(engine: Any) -> None:
    """Undo the step without gradients by which stage 0 makes AdamW's state in bf16: it decays, and counts."""
    engine.basic_optimizer.state.clear()
    for shard in trained_shards(engine).shards:
        shard.master.copy_(shard.low_precision)


def free_weights(module: nn.Module) -> None:
    """Free the weights of a destroyed engine, whose module lists and caches of DeepSpeed hold for good at ZeRO-3."""
    for parameter in module.parameters():
        for held in {parameter, getattr(parameter, "ds_tensor", parameter)}:
            held.data = held.new_empty(0)


@dataclass(frozen=True)
class Piece:
    """The part ``[start, start + n)`` of a flattened tensor."""

    name: str
    start: int
    values: Tensor


def frozen_pieces(engine: Any) -> list[Piece]:
    """Return this rank's share of the parameters that are not trained: over all ranks, each element once."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pieces = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        numel = full_shape(parameter).numel()
        if hasattr(parameter, "ds_tensor"):
            size = parameter.ds_tensor.ds_numel
            start, end = size * rank, min(size * (rank + 1), numel)
            values = parameter.ds_tensor.data.view(-1)[: max(0, end - start)]
        else:
            start, end = numel * rank // world, numel * (rank + 1) // world
            values = parameter.data.view(-1)[start:end]
        pieces.append(Piece(name, start, values))
    return pieces


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to a saved model, by name."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaling(engine: Any) -> dict[str, float]:
    """Return what fp16's loss scaling has come to."""
    scaler = _scaler(engine)
    return {name: float(getattr(scaler, name)) for name in _SCALING if getattr(scaler, name, None) is not None}


def set_loss_scaling(engine: Any, values: dict[str, float]) -> None:
    """Go on with the loss scaling that `loss_scaling` returned."""
    scaler = _scaler(engine)
    for name, value in values.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def _scaler(engine: Any) -> Any:
    """Return the object that scales an fp16 engine's loss, None for others."""
    return engine.optimizer.loss_scaler if engine.fp16_enabled() else None


class FullParameters:
    """Whole parameters put together on rank 0: fp32 masters of the trained ones, the others as they are."""

    def __init__(self, engine: Any):
        self.parameters = dict(engine.module.named_parameters())
        self.device = engine.device
        self.shards = {shard.name: shard for shard in trained_shards(engine).shards}

    @torch.no_grad()
    def on_main(self, name: str) -> Tensor | None:
        """Return a parameter, fp32 on the CPU, on rank 0 and None elsewhere. Collective: every rank calls it."""
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().float().cpu().clone() if torch.distributed.get_rank() == 0 else None
        whole = torch.zeros(full_shape(parameter), device=self.device)
        if (shard := self.shards.get(name)) is not None:
            whole.view(-1)[shard.own_start : shard.own_end] = shard.master[shard.owned]
        torch.distributed.reduce(whole, dst=0)
        return whole.cpu() if torch.distributed.get_rank() == 0 else None


def held_bytes(engine: Any) -> dict[str, int]:
    """Return the bytes of weights, fp32 master (where it is apart from the weights) and moments on this rank."""
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    states = {} if engine.basic_optimizer is None else engine.basic_optimizer.state
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights}
    masters = [base for base in states if base.untyped_storage().data_ptr() not in storages]
    moments = [tensor for state in states.values() for tensor in state.values() if torch.is_tensor(tensor)]
    held = {"weights": weights, "master": masters, "moments": moments}
    return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in held.items()}
