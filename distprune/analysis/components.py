"""What each component of a model costs, and where pruning pays (the paper's first guideline).

A component's cost is that of its matrices; `distprune.pruning.components` says which these are. Functions of one
process's module; its parameters may be partitioned.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distprune.config import ENCODER
from distprune.pruning.components import component_matrices, layer_of
from distprune.timing import seconds, wait
from distprune.zero.shards import full_shape

ENOUGH = 0.05
"""Part of the FLOPs that a component holds where pruning it pays."""

Forward = Callable[[], object]


class Place(NamedTuple):
    """A component, and the layer where it is one of a layer's; `layer` is None for a whole component."""

    component: str
    layer: str | None = None

    def __str__(self) -> str:
        return self.component if self.layer is None else f"{self.layer} {self.component}"


@dataclass
class Part:
    """A component of the model or of a layer: what it holds, what it costs, and what the model is without some of it.

    Attributes:
        place: which it is.
        matrices: names of their parameters.
        weights: elements of the matrices.
        bytes: of the matrices in the forward pass's type.
        flops: of the matrices, for each token.
        weights_share: of all of the model's parameters.
        flops_share: of all of the model's matrices.
        latency_share: of the forward pass.
        metrics: the main metric with this part alone pruned, by sparsity.
    """

    place: Place
    matrices: list[str]
    weights: int
    bytes: int
    flops: float
    weights_share: float
    flops_share: float
    latency_share: float
    metrics: dict[float, float] = field(default_factory=dict)


def measure_parts(
    model: nn.Module, forward: Forward, tokens: int, device: torch.device, repeat: int, layers: bool
) -> list[Part]:
    """Return the model's components in their order, then those of each layer where asked for, no metrics yet.

    Args:
        model: the module that a forward pass runs.
        forward: a forward pass of one batch, in evaluation mode.
        tokens: of that batch, padding counted.
        device: of the model.
        repeat: how many forward passes are timed; shares of latency are medians.
        layers: whether attention and feed-forward of each layer follow.
    """
    every = {name: Place(component, layer_of(name)) for name, component in component_matrices(model).items()}
    parameters = dict(model.named_parameters())
    sizes = {name: full_shape(parameter).numel() for name, parameter in parameters.items()}
    flops = matrix_flops(model, forward)
    latency = latency_shares(model, every, forward, device, repeat)

    def part(place: Place) -> Part:
        def within(each: Place) -> bool:
            return each.component == place.component and place.layer in (None, each.layer)

        names = [name for name, each in every.items() if within(each)]
        part_flops = sum(flops.get(name, 0) for name in names)
        return Part(
            place,
            names,
            weights=sum(sizes[name] for name in names),
            bytes=sum(sizes[name] * parameters[name].element_size() for name in names),
            flops=part_flops / tokens,
            weights_share=sum(sizes[name] for name in names) / sum(sizes.values()),
            flops_share=part_flops / sum(flops.values()),
            latency_share=sum(share for each, share in latency.items() if within(each)),
        )

    components = dict.fromkeys(Place(each.component) for each in every.values())
    of_layers = dict.fromkeys(each for each in every.values() if layers and each.component in ENCODER and each.layer)
    return [part(place) for place in (*components, *of_layers)]


def matrix_flops(model: nn.Module, forward: Forward) -> dict[str, int]:
    """Return the multiplications and additions of a forward pass with each matrix, by its parameter's name.

    A linear layer takes two for each weight and row of its input. An embedding takes none, but one that is tied to the
    output layer has that layer's. What has no matrix (softmax, norms, products of activations) is not counted.

    Args:
        model: the module that a forward pass runs.
        forward: one forward pass.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}

    def count(name: str, weights: int, _: nn.Module, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        rows = inputs[0].numel() // inputs[0].shape[-1]
        found[name] = found.get(name, 0) + 2 * weights * rows

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                # Not module.weight: ZeRO-3 would gather it.
                matrix = dict(module.named_parameters(recurse=False))["weight"]
                hook = partial(count, names[id(matrix)], full_shape(matrix).numel())
                hooks.enter_context(module.register_forward_hook(hook))
        forward()
    return found


def latency_shares(
    model: nn.Module, places: dict[str, Place], forward: Forward, device: torch.device, repeat: int
) -> dict[Place, float]:
    """Return the part of a forward pass's time that is spent in each place, medians over several passes.

    The time of a place is that of its outermost modules, which hold its matrices and no other place's: a whole
    attention block with its softmax. What lies between them is in none. At ZeRO-3 the gathering of weights counts.

    Args:
        model: the module that a forward pass runs.
        places: of each matrix, by its parameter's name.
        forward: one forward pass.
        device: of the model.
        repeat: how many passes are timed, after one that warms up.
    """
    spent: dict[Place, float] = {}
    started: dict[nn.Module, float] = {}

    def start(module: nn.Module, _: object) -> None:
        wait(device)
        started[module] = time.perf_counter()

    def end(place: Place, module: nn.Module, *_: object) -> None:
        wait(device)
        spent[place] = spent.get(place, 0.0) + time.perf_counter() - started[module]

    timed = outermost(model, places)
    shares: list[dict[Place, float]] = []
    with ExitStack() as hooks:
        for module, place in timed.items():
            hooks.enter_context(module.register_forward_pre_hook(start, prepend=True))
            hooks.enter_context(module.register_forward_hook(partial(end, place)))
        forward()
        for _ in range(repeat):
            spent.clear()
            whole = seconds(forward, device)
            shares.append({place: spent.get(place, 0.0) / whole for place in timed.values()})
    return {place: median(each[place] for each in shares) for place in shares[0]}


def outermost(model: nn.Module, places: dict[str, Place]) -> dict[nn.Module, Place]:
    """Return the outermost modules whose matrices are all of one place; lists of modules, which are not called, aside.

    Args:
        model: a module with tied or untied parameters.
        places: of each matrix, by its parameter's name.
    """
    of_matrix = {id(parameter): places[name] for name, parameter in model.named_parameters() if name in places}
    found: dict[nn.Module, Place] = {}

    def look(module: nn.Module) -> None:
        inside = {of_matrix[id(each)] for each in module.parameters() if id(each) in of_matrix}
        if len(inside) == 1 and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            (found[module],) = inside
            return
        for child in module.children() if inside else ():
            look(child)

    look(model)
    return found


def pays(part: Part) -> bool:
    """Return whether pruning a component pays: where its matrices do at least 5 % of the FLOPs, and are no head's.

    Zeros save arithmetic only where there is some; elsewhere they save storage. The head stays dense by the paper's
    first guideline, also that of a language model, with its many FLOPs, which may be the token embedding's too. The
    measured loss decides nothing, and is said beside it: without training between prunings it is far more than gradual
    pruning loses.
    """
    return part.flops_share >= ENOUGH and part.place.component not in ("head", "token_embedding")


def reason(part: Part, dense: float, metric: str, is_new: bool) -> str:
    """Return one line on a component: whether pruning pays, what it can save, and what the metric comes to.

    Args:
        part: the component.
        dense: the dense model's main metric.
        metric: its name.
        is_new: whether its weights were initialised anew, so that their magnitudes mean nothing.
    """
    saves = (
        f"{part.flops_share:.1%} of the FLOPs, {part.weights_share:.1%} of the parameters, "
        f"{part.latency_share:.1%} of the latency"
    )
    why = "" if part.flops else "; a lookup costs no arithmetic, so that only storage is saved"
    if part.flops and part.flops_share < ENOUGH:
        why = f"; less than {ENOUGH:.0%} of the FLOPs"
    elif part.place.component == "head":
        why = "; heads stay dense by the guideline"
    elif part.flops and part.place.component == "token_embedding":
        why = "; tied to the head, which stays dense by the guideline"
    why += "; its weights are new, and their magnitudes mean nothing" * is_new
    measured = ", ".join(f"{value:.4f} at {sparsity:.0%}" for sparsity, value in part.metrics.items())
    verdict = "pays" if pays(part) else "does not pay"
    return f"{part.place}: {verdict}: {saves}{why}; {metric} {dense:.4f} -> {measured}"


def setting(parts: Sequence[Part]) -> str:
    """Return the override that prunes the components where it pays."""
    return f"pruning.components=[{','.join(each.place.component for each in parts if pays(each))}]"


def record(part: Part) -> dict[str, Any]:
    """Return a part for JSON; the metrics' keys are sparsities as text."""
    metrics = {f"{sparsity:g}": value for sparsity, value in part.metrics.items()}
    return vars(part) | {"place": str(part.place), **part.place._asdict(), "metrics": metrics}
