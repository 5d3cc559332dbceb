"""Pruning by the inverse Fisher matrix in real engines, against one process that inverts it plainly."""

from fractions import Fraction
from math import floor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distprune import settings
from distprune.config import FisherConfig
from distprune.pruning.masks import PRUNED
from distprune.pruning.scores import OptimalBrainSurgeon
from distprune.pruning.slices import Slice
from distprune.training.curvature import estimate
from distprune.training.setup import prepare
from tests.distributed.engines import (
    Layout,
    Student,
    forward,
    plain_model,
    random_batch,
    reference_masks,
    rows,
    target_weights,
)
from tests.distributed.runs import cut_off, run, same_weights, stage
from tests.world import Worlds

FISHER = FisherConfig(block=7, samples=3, damping=1e-3)
SPARSITY = Fraction("0.6")
LAYOUTS = [Layout(0), Layout(1), Layout(2), Layout(2, offload=True), Layout(3, variant="sub-groups")]
DROPPED = [
    Layout(0),
    Layout(0, "bf16"),
    Layout(1, "bf16"),
    Layout(2, variant="overlap"),
    Layout(2, "bf16", True),
    Layout(3),
    Layout(3, "bf16", True),
]
sizes = pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))])


def backward(student: Student, number: int) -> None:
    """Take gradients of a global batch, without a step."""
    for part in range(student.accumulation):
        batch = rows(
            random_batch(number), student.rank * student.accumulation + part, student.world * student.accumulation
        )
        student.engine.set_gradient_accumulation_boundary(part + 1 == student.accumulation)
        student.engine.backward(F.cross_entropy(forward(student.engine, batch).float(), batch["labels"]))


def pruned(directory: Path, layout: Layout, accumulation: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return masks and weights right after a pruning, before any step."""
    student = Student(directory, layout, accumulation, pruning={"score": "obs"})
    assert isinstance(student.pruner.score, OptimalBrainSurgeon)
    student.pruner.score.config = FISHER
    for number in range(FISHER.samples):
        backward(student, number)
        student.pruner.learn()
    backward(student, FISHER.samples)  # the step's own, which is not asked for
    student.pruner.prune(SPARSITY)
    found = student.masks(), student.masters()
    student.close()
    return found


def reference(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same of one process: plain gradients, plain inverses of plain blocks."""
    model = plain_model(directory)
    gradients: list[dict[str, Tensor]] = []
    for number in range(FISHER.samples):
        batch = random_batch(number)
        model.zero_grad()
        F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
        every = dict(model.named_parameters())
        gradients.append({name: every[name].grad.double().flatten() for name in target_weights(model)})
    weights = {name: each.double() for name, each in target_weights(model).items()}
    inverses = {}
    for name, each in weights.items():
        place = torch.arange(len(each)) // FISHER.block
        same = place[:, None] == place[None, :]
        fisher = sum(torch.outer(each[name], each[name]) for each in gradients) / FISHER.samples
        inverses[name] = torch.linalg.inv(fisher * same + FISHER.damping * torch.eye(len(each)))
    scores = {name: each**2 / (2 * inverses[name].diagonal()) for name, each in weights.items()}
    masks = reference_masks(scores, SPARSITY)
    for name, each in weights.items():
        gone = torch.where(masks[name], each / inverses[name].diagonal(), 0)
        weights[name] = torch.where(masks[name], 0, each - inverses[name] @ gone)
    return masks, weights


@sizes
def test_masks_and_weights_are_those_of_plain_inverses(world: Worlds, directory: Path, size: int) -> None:
    masks, weights = reference(directory)
    assert any(not torch.equal(each, target_weights(plain_model(directory))[name]) for name, each in weights.items())
    for layout in LAYOUTS:
        found_masks, found = world(size).run(pruned, directory, layout, accumulation=1 + (layout.stage == 2))[0]
        for name in masks:
            assert torch.equal(found_masks[name], masks[name]), f"{layout}: {name}"
            torch.testing.assert_close(found[name].double(), weights[name], rtol=1e-3, atol=1e-5)


def learnt_behind_a_pruning(directory: Path, layout: Layout) -> tuple[int, int]:
    """Return how many gradients of pruned weights, and of others, are not zero as the score is told. Collective."""
    student = Student(directory, layout, pruning={"score": "obs"})
    score, pruner = student.pruner.score, student.pruner
    assert isinstance(score, OptimalBrainSurgeon)
    score.config = FISHER
    backward(student, 0)
    pruner.learn()
    student.engine.set_gradient_accumulation_boundary(None)
    student.step(1, SPARSITY)
    told: list[tuple[Tensor, Tensor]] = []
    backward(student, 2)
    with patch.object(score, "learn", lambda s, g, learn=score.learn: told.extend(_masked(s, g)) or learn(s, g)):
        pruner.learn()
    student.close()
    pruned = sum(int(gradient[mask == PRUNED].count_nonzero()) for mask, gradient in told)
    return pruned, sum(int(gradient.count_nonzero()) for _, gradient in told)


def _masked(slices: list[Slice], gradients: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(each.mask, part.clone()) for each, part in zip(slices, gradients, strict=True) if part is not None]


@pytest.mark.parametrize("layout", [Layout(0), Layout(2, "bf16"), Layout(3)])
def test_it_learns_nothing_of_pruned_weights(world: Worlds, directory: Path, layout: Layout) -> None:
    for pruned, every in world(2).run(learnt_behind_a_pruning, directory, layout):
        assert pruned == 0 < every


def stepped(directory: Path, layout: Layout, accumulation: int, drops: bool) -> dict[str, Tensor]:
    student = Student(directory, layout, accumulation, pruning={"score": "obs"})
    for number in range(2):
        if drops:
            backward(student, 7)
            student.pruner.parameters.drop_gradients()
            student.engine.set_gradient_accumulation_boundary(None)
        student.step(number)
    masters = student.masters()
    student.close()
    return masters


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])  # no rank knows of another's
def test_gradients_that_are_dropped_leave_no_trace(world: Worlds, directory: Path, size: int) -> None:
    for layout, accumulation in [(each, 1) for each in DROPPED] + [(Layout(2), 2), (Layout(3, offload=True), 2)]:
        without, dropped = (
            world(size).run(stepped, directory, layout, accumulation, drops)[0] for drops in (False, True)
        )
        for name in without:
            assert torch.equal(without[name], dropped[name]), f"{layout}: {name}"


def layers_run(task: Path, *overrides: str) -> int:
    """Return how often a layer runs forward while two gradients are taken of a model of two. Collective."""
    setup = prepare(settings.load_valid(str(task / "run.yaml"), ["pruning.score=obs", "fisher.samples=2", *overrides]))
    calls: list[int] = []
    for layer in setup.student.module.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
    assert setup.pruner is not None
    estimate(settings.load_valid(str(task / "run.yaml"), ["fisher.samples=2"]), setup, setup.pruner, 0, lambda: None)
    setup.student.destroy()
    return len(calls)


def test_activations_are_recomputed_for_its_gradients_where_they_are_in_training(world: Worlds, task: Path) -> None:
    assert world(1).run(layers_run, task) == [4]
    assert world(1).run(layers_run, task, "model.activation_checkpointing=true") == [8]


@pytest.mark.slow
def test_a_run_prunes_by_it_to_the_exact_number(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("pruning.score=obs", "fisher.samples=3", "fisher.block=10", "train.accumulation=2")
    for size, zero in ((1, 0), (2, 3)):
        summary = world(size).run(run, task, tmp_path / f"{size}", *options, *stage(zero))[0]
        wanted = floor(Fraction(str(summary["sparsity_target"])) * summary["prunable_weights"])
        assert summary["masked_weights"] == wanted > 0
        assert summary["zeros_in_file"] == wanted
        assert summary["score_gradients"] == 3 * 4, "of each of four prunings"
        assert summary["seconds_of"]["gradients for scores"] > 0
        world(size).run(run, task, tmp_path / f"{size}-magnitude", *options[1:], *stage(zero))
        assert not same_weights(tmp_path / f"{size}", tmp_path / f"{size}-magnitude")


@pytest.mark.slow
def test_a_run_that_was_cut_off_draws_the_same_dropout(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = (
        "pruning.score=obs",
        "fisher.samples=2",
        "fisher.dropout=true",
        "model.dropout=0.3",
        "checkpoint.steps=6",
    )
    for name in ("whole", "cut"):
        if name == "cut":
            cut_off(world, 1, task, tmp_path / name, 7, *options)
        world(1).run(run, task, tmp_path / name, *options)
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    world(1).run(run, task, tmp_path / "without", *options, "fisher.dropout=false")
    assert not same_weights(tmp_path / "whole", tmp_path / "without")
