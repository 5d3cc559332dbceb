"""What there is to save of a student on this rank, and the way back into an engine of any world size and stage."""

from typing import Any

import torch
from torch import Tensor

from distprune import dist
from distprune.checkpoints.pieces import WEIGHTS, Pieces, key_of
from distprune.pruning.pruner import Pruner
from distprune.zero.engine import frozen_pieces, loss_scaling, set_loss_scaling, stored_buffers
from distprune.zero.shards import Shard, full_shape, trained_shards


def owned_tensors(engine: Any, pruner: Pruner | None) -> dict[str, Tensor]:
    """Return views of everything that this rank owns of a student, by key; masks with a byte a weight."""
    tensors: dict[str, Tensor] = {}

    def add(name: str, start: int, kind: str, values: Tensor) -> None:
        if values.numel():
            tensors[key_of(name, start, values.numel(), kind)] = values

    for shard in trained_shards(engine).shards:
        add(shard.name, shard.own_start, "master", shard.master[shard.owned])
        for kind, moment in shard.moments(engine.basic_optimizer).items():
            add(shard.name, shard.own_start, kind, moment[shard.owned])
    for piece in frozen_pieces(engine):
        add(piece.name, piece.start, "frozen", piece.values)
    if dist.is_main():
        for name, buffer in stored_buffers(engine.module).items():
            add(name, 0, "buffer", buffer.view(-1))
    if pruner is not None:
        for shard, each in zip(pruner.shards, pruner.slices, strict=True):
            if pruner.masked:
                add(shard.name, shard.own_start, "mask", each.mask[shard.owned])
            if each.state is not None:
                add(shard.name, shard.own_start, "score", each.state[shard.owned])
            if each.removed is not None:
                add(shard.name, shard.own_start, "removed", each.removed[shard.owned])
    return tensors


def state_of(engine: Any, pruner: Pruner | None) -> dict[str, Any]:
    """Return what is to be saved of a student beside its tensors, for JSON."""
    return {
        "world_size": dist.detect().size,
        "zero_stage": engine.zero_optimization_stage(),
        "shapes": _shapes_of(engine.module),
        "optimizer_steps": _optimizer_steps(engine.basic_optimizer),
        "loss_scaling": loss_scaling(engine),
        "pruner": None if pruner is None else pruner.state(),
    }


def _shapes_of(model: Any) -> dict[str, list[int]]:
    """Return the whole shape of every parameter and stored buffer."""
    shapes = {name: list(full_shape(parameter)) for name, parameter in model.named_parameters()}
    return shapes | {name: list(buffer.shape) for name, buffer in stored_buffers(model).items()}


@torch.no_grad()
def restore(engine: Any, pruner: Pruner | None, pieces: Pieces, state: dict[str, Any]) -> None:
    """Give this rank's slices the weights, moments, masks and scores that a checkpoint has of them.

    Collective: every rank calls it.

    Args:
        engine: loaded from the checkpoint: its low-precision weights and frozen ones are not touched.
        pruner: of the engine.
        pieces: the checkpoint's tensors.
        state: as `state_of` returned it.
    """
    shards = trained_shards(engine).shards
    for shard in shards:
        _copy(shard.master, pieces, shard, "master")
    _restore_moments(engine.basic_optimizer, shards, pieces, state["optimizer_steps"])
    set_loss_scaling(engine, state["loss_scaling"])
    if pruner is None:
        return
    for shard, each in zip(pruner.shards, pruner.slices, strict=True):
        _copy(each.mask, pieces, shard, "mask")
        if each.state is not None:
            _copy(each.state, pieces, shard, "score")
        if each.removed is not None:
            _copy(each.removed, pieces, shard, "removed")
    if state["pruner"] is not None:
        pruner.resume(state["pruner"])


def _restore_moments(optimizer: Any, shards: list[Shard], pieces: Pieces, steps: int) -> None:
    """Make the state that AdamW would make at its first step, and fill it."""
    for shard in shards:
        for kind in pieces.kinds(shard.name):
            if kind in (*WEIGHTS, "mask", "score", "removed"):
                continue
            state = optimizer.state[shard.base]
            state["step"] = torch.tensor(float(steps), device=shard.base.device)
            if kind not in state:
                state[kind] = torch.zeros_like(shard.base)
            _copy(shard.moments(optimizer)[kind], pieces, shard, kind)


def _copy(target: Tensor, pieces: Pieces, shard: Shard, kind: str) -> None:
    values = pieces.part(shard.name, kind, shard.start, shard.end)
    if values is not None:
        target.copy_(values)


def _optimizer_steps(optimizer: Any) -> int:
    """Return the steps that an optimizer has taken, without those that fp16 skipped."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
