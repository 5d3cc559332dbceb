"""Numbers that are not finite, in weights, outputs and gradients of real runs; and gradients that there are none of."""

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from distprune import dist
from distprune.engines.build import set_learning_rate
from distprune.pruning.pruner import Pruner
from distprune.training.diagnose import name_unused
from distprune.zero.shards import shards_of
from tests.distributed.engines import Layout
from tests.distributed.runs import DENSE, RATE, OnLastRank, heard, run_patched, stage
from tests.world import Worlds

LAYER = "bert.encoder.layer.1.output.dense"


def poison_weights(engine: Any) -> None:
    for shard in shards_of(engine, [f"{LAYER}.weight"]).shards:
        shard.master[shard.owned][-1] = math.nan


def poison_outputs(engine: Any) -> None:
    engine.module.get_submodule(LAYER).register_forward_hook(lambda _, __, output: output + math.inf)


def poison_gradients(engine: Any) -> None:
    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    engine.module.get_submodule(LAYER).register_forward_hook(hook)


@pytest.mark.parametrize("number", range(4))
def test_a_nan_stops_every_rank_with_the_step_and_the_layer(
    world: Worlds, task: Path, tmp_path: Path, number: int
) -> None:
    options = (*DENSE, *stage(number))
    said = world(2).run(run_patched, RATE, OnLastRank(poison_weights), task, tmp_path / "weights", *options)
    assert len(set(said)) == 1
    step = 6 if number else 5  # at stage 0 the optimizer's weights are those of the forward pass
    assert f"the loss is not finite at step {step}: the weights of {LAYER}.weight are not finite" in said[0]
    said = world(2).run(run_patched, RATE, OnLastRank(poison_outputs), task, tmp_path / "outputs", *options)
    assert len(set(said)) == 1
    assert f"the loss is not finite at step 5: the output of {LAYER} is not finite" in said[0]


@pytest.mark.parametrize("layout", [Layout(*each) for each in product(range(4), ("fp32", "bf16"))], ids=str)
def test_gradients_that_are_not_finite_stop_every_rank(
    world: Worlds, task: Path, tmp_path: Path, layout: Layout
) -> None:
    """DeepSpeed leaves such steps out, without a word, to the end of the run."""
    options = (*DENSE, *stage(layout.stage), f"deepspeed.student.bf16.enabled={layout.dtype == 'bf16'}".lower())
    said = world(2).run(run_patched, RATE, OnLastRank(poison_gradients), task, tmp_path / "run", *options)
    assert len(set(said)) == 1
    if layout == Layout(0):  # DeepSpeed takes the step
        assert "the loss is not finite at step 6: the weights of " in said[0]
    else:
        assert "the loss is finite at step 5 and its gradients are not" in said[0]
    assert not (tmp_path / "run" / "final").exists()


def test_a_nan_weight_is_not_pruned(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(run_patched, RATE, OnLastRank(poison_weights), task, tmp_path / "run", "pruning.start=6 steps")
    assert len(set(said)) == 1
    assert said[0].startswith(f"at step 6 {LAYER}.weight has scores of Magnitude that are NaN")


class Shard:
    """Stands in for a rank's slice of a matrix behind a step."""

    def __init__(self, name: str, used: bool):
        self.name, self.used = name, used

    def moments(self, _: Any) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.ones(2) * self.used}


def name_what_is_unused(used: list[list[str]]) -> None:
    """Say which of three matrices have moments on no rank. Collective."""
    names = ["a", "b", "c"]
    shards = [Shard(name, name in used[dist.detect().rank]) for name in names]
    parameters = SimpleNamespace(names=names, numel=dict.fromkeys(names, 10))
    masked = dict.fromkeys(names, 0) | {"a": 10}
    pruner = SimpleNamespace(shards=shards, parameters=parameters, optimizer=None, total=30, masked_of=masked)
    name_unused(cast("Pruner", pruner))


def test_weights_without_a_gradient_are_named(world: Worlds) -> None:
    (_, said), (_, others) = world(2).run(heard, name_what_is_unused, [["a"], ["c"]])
    assert said.startswith("10 of the 30 weights to prune get no gradient, as b: the model does not use them here")
    assert others == ""
    for used in ([["a", "b"], ["c"]], [["b"], ["c"]], [[], []]):
        assert world(2).run(heard, name_what_is_unused, used) == [(None, "")] * 2


class Unused:
    """Before the first step, takes a matrix's gradient away."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, engine: Any, rate: float) -> None:
        if not self.begun:
            engine.module.get_parameter(f"{LAYER}.weight").register_hook(torch.zeros_like)
        self.begun = True
        set_learning_rate(engine, rate)


def test_a_run_says_which_weights_have_no_gradient(world: Worlds, task: Path, tmp_path: Path) -> None:
    (_, said), _ = world(2).run(heard, run_patched, RATE, Unused(), task, tmp_path / "run")
    assert f"weights to prune get no gradient, as {LAYER}.weight: the model does not use them here" in said
