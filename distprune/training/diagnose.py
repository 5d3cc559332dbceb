"""Where a NaN came from, and weights that nothing comes to."""

from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distprune import dist
from distprune.errors import UserError
from distprune.pruning.components import without_component
from distprune.pruning.pruner import Pruner
from distprune.tasks.base import Batch, Task
from distprune.zero.shards import full_shape, trained_shards

MANY = 0.01
"""The part of the weights to prune, of which others beside them are said."""


def refuse_nonfinite(engine: Any, task: Task, batch: Batch, step: int) -> NoReturn:
    """Stop a run whose loss is not finite, with the step and the layer named.

    Collective: every rank calls it.

    Args:
        engine: the student's.
        task: runs it.
        batch: this rank's micro batch of the failing step.
        step: optimizer steps completed.

    Raises:
        UserError: always, on every rank.
    """
    if weights := _first(_nonfinite_weights(engine)):
        where = f"the weights of {weights} are not finite"
    elif outputs := _first(_nonfinite_outputs(engine, task, batch)):
        where = f"the output of {outputs} is not finite"
    else:
        where = "the model's outputs are finite, its loss is not"
    raise UserError(
        f"the loss is not finite at step {step}: {where}; allowed: finite losses (a lower lr.peak, or clipping, helps)"
    )


def refuse_nonfinite_weights(engine: Any, step: int) -> None:
    """Stop a run whose weights are not finite. Collective: every rank calls it.

    Raises:
        UserError: on every rank, with the step and the weight named.
    """
    if weights := _first(_nonfinite_weights(engine)):
        raise UserError(f"at step {step} the weights of {weights} are not finite; allowed: finite ones (lower lr.peak)")


def name_unused(pruner: Pruner) -> None:
    """Say which weights to prune have no gradient: they count as pruned or kept, and the model does not use them.

    Collective: every rank calls it after a step.
    """
    mine = [
        shard.name for shard in pruner.shards for moment in shard.moments(pruner.optimizer).values() if moment.any()
    ]
    used = dist.gather(mine)
    sizes, masked = pruner.parameters.numel, pruner.masked_of
    unused = [name for name in pruner.parameters.names if name not in used and masked[name] < sizes[name]]
    if used and unused and dist.is_main():
        weights = sum(sizes[name] for name in unused)
        print(
            f"{weights:,} of the {pruner.total:,} weights to prune get no gradient, as {unused[0]}: the model does not "
            "use them here; pruning.exclude leaves them out"
        )


def name_unknown(model: nn.Module, pruner: Pruner) -> None:
    """Say which weights of the encoder stay dense because they are of no known component, where they are many."""
    sizes = {name: full_shape(model.get_parameter(name)).numel() for name in without_component(model)}
    if sum(sizes.values()) > MANY * pruner.total:
        print(
            f"{sum(sizes.values()):,} weights of the layers stay dense beside the {pruner.total:,} to prune, as "
            f"{next(iter(sizes))}, which is of no component that is known"
        )


def _nonfinite_weights(engine: Any) -> list[str]:
    return [shard.name for shard in trained_shards(engine).shards if not torch.isfinite(shard.master).all()]


def _nonfinite_outputs(engine: Any, task: Task, batch: Batch) -> list[str]:
    """Run the batch again and return the modules that put out NaN or infinity, first to last. Collective at ZeRO-3."""
    found: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in engine.module.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(hook_for(name)))
        task.forward(engine, batch)
    return found


def _first(names: list[str]) -> str | None:
    """Return the first name of the lowest rank that has any. Collective: every rank calls it."""
    return next(iter(dist.gather(names)), None)
