"""Pruned weights that come back, by movement and by regrowth, in real engines, against one plain process."""

import shutil
from fractions import Fraction
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.commands import oneshot
from distprune.config import RegrowthConfig
from tests.distributed.engines import Layout, Student, plain_model, random_batch, reference_masks, target_weights
from tests.distributed.runs import EVERY_STEP, cut_off, records, run, same_weights, stage
from tests.world import Worlds

MOVEMENT = [None, Fraction("0.2"), None, Fraction("0.4"), Fraction("0.5"), None, Fraction("0.5"), None]
# Adam moves all weights that come back alike at first: nearly tied, they would go by rounding in the steps after.
REGROWTH = [Fraction("0.5"), None, 0.3, None, None, 0.2, None]
LAYOUTS = [Layout(0), Layout(1), Layout(2, offload=True), Layout(3, variant="sub-groups")]
sizes = pytest.mark.parametrize("size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 4))])


class Plain:
    """One process's model, optimizer and masks."""

    def __init__(self, directory: Path):
        self.model = plain_model(directory)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0, betas=(0.9, 0.999))
        self.weights = target_weights(self.model)
        every = dict(self.model.named_parameters())
        self.parameters = [every[name] for name in self.weights]
        self.masks = {name: torch.zeros_like(each, dtype=torch.bool) for name, each in self.weights.items()}

    def backward(self, step: int) -> dict[str, Tensor]:
        """Return the gradients of the weights to prune, flat."""
        batch = random_batch(step)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
        return {name: each.grad.flatten() for name, each in zip(self.weights, self.parameters, strict=True)}

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with masked gradients, then zero what is masked, moments too."""
        for name, each in zip(self.weights, self.parameters, strict=True):
            each.grad.view(-1)[self.masks[name]] = 0
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for name, each in zip(self.weights, self.parameters, strict=True):
            state = self.optimizer.state[each]
            for values in (each, state["exp_avg"], state["exp_avg_sq"]):
                values.view(-1)[self.masks[name]] = 0


def plain_movement(directory: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the masks after every step, and the last weights; a pruned weight is remembered as it was."""
    plain = Plain(directory)
    scores = {name: torch.zeros_like(each) for name, each in plain.weights.items()}
    whole = {name: each.clone() for name, each in plain.weights.items()}
    history = []
    for number, sparsity in enumerate(MOVEMENT):
        gradients = plain.backward(number)
        for name, each in plain.weights.items():
            whole[name] = torch.where(plain.masks[name], whole[name], each)
            scores[name] -= whole[name] * gradients[name]
        if sparsity is not None:
            plain.masks = reference_masks(scores, sparsity)
            for name, each in plain.weights.items():
                each.copy_(torch.where(plain.masks[name], 0, whole[name]))
        plain.step()
        history.append(plain.masks)
    return history, plain.weights


def plain_regrowth(directory: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the masks after every step, and the last weights; what was pruned before comes back as zero."""
    plain = Plain(directory)
    history = []
    for number, due in enumerate(REGROWTH):
        gradients = plain.backward(number)
        if isinstance(due, Fraction):
            plain.masks = reference_masks({name: each.abs() for name, each in plain.weights.items()}, due)
        elif due is not None:
            plain.masks = {name: exchanged(plain, name, gradients[name], due) for name in plain.weights}
        for name, each in plain.weights.items():
            each[plain.masks[name]] = 0
        plain.step()
        history.append(plain.masks)
    return history, plain.weights


def exchanged(plain: Plain, name: str, gradient: Tensor, part: float) -> Tensor:
    """Return a parameter's mask after a regrowth; sorts are stable, so that ties are in order."""
    weights, mask = plain.weights[name], plain.masks[name]
    number = ceil(part * int((~mask).sum()))
    smallest = torch.where(mask, torch.inf, weights.abs()).argsort(stable=True)[:number]
    candidates = mask.clone()
    candidates[smallest] = True
    order = torch.where(candidates, gradient.abs(), torch.inf).argsort(stable=True)
    after = torch.zeros_like(mask)
    after[order[: int(mask.sum())]] = True
    return after


def trained(
    directory: Path, layout: Layout, kind: str, accumulation: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the masks after every step, and the last weights, of an engine whose zeros are verified in every step."""
    regrowth = {"regrowth": RegrowthConfig(0.5)} if kind == "regrowth" else {}
    score = {"score": "movement"} if kind == "movement" else {}
    student = Student(directory, layout, accumulation, pruning={"sparsity": 0.5, **score}, **regrowth)
    history = []
    for number, due in enumerate(MOVEMENT if kind == "movement" else REGROWTH):
        if isinstance(due, float):
            student.step(number, regrown=due)
        else:
            student.step(number, due)
        student.pruner.verify()
        history.append(student.masks())
    masters = student.masters()
    student.close()
    return history, masters


def comes_back(history: list[dict[str, Tensor]]) -> bool:
    """Return whether a weight is masked, and later is not."""
    return any((one[name] & ~other[name]).any() for one, other in pairwise(history) for name in one)


@sizes
@pytest.mark.parametrize("kind", ["movement", "regrowth"])
def test_masks_and_weights_are_those_of_a_plain_process(world: Worlds, directory: Path, size: int, kind: str) -> None:
    history, weights = {"movement": plain_movement, "regrowth": plain_regrowth}[kind](directory)
    assert comes_back(history)
    for layout in LAYOUTS:
        found, masters = world(size).run(trained, directory, layout, kind, 1 + (layout.stage == 2))[0]
        for number, (masks, expected) in enumerate(zip(found, history, strict=True)):
            for name in expected:
                assert torch.equal(masks[name], expected[name]), f"{layout}: {name} after step {number}"
        for name in weights:
            torch.testing.assert_close(masters[name], weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(0, "bf16"), Layout(2, "bf16"), Layout(3, "bf16")], ids=str)
@pytest.mark.parametrize("kind", ["movement", "regrowth"])
def test_in_bf16_every_copy_has_the_zeros(world: Worlds, directory: Path, kind: str, layout: Layout) -> None:
    history, masters = world(2).run(trained, directory, layout, kind, 1)[0]
    assert comes_back(history)
    for name, mask in history[-1].items():
        assert torch.equal(masters[name] == 0, mask) or kind == "regrowth"
        assert not masters[name][mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["movement", "regrowth"])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    world: Worlds, task: Path, tmp_path: Path, kind: str
) -> None:
    """It goes on from what it remembers of pruned weights, at another world and stage too, and ends exactly sparse."""
    asked = {"movement": "pruning.score=movement", "regrowth": "regrowth.part=0.5"}[kind]
    options = (asked, *EVERY_STEP)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = world(2).run(run, task, whole, *options, *stage(3))[0]
    cut_off(world, 2, task, cut, 10, *options, *stage(3))
    shutil.copytree(cut, tmp_path / "moved", ignore=shutil.ignore_patterns("saving-*"))
    world(2).run(run, task, cut, *options, *stage(3))
    assert same_weights(whole, cut)
    assert (
        summary["zeros_in_file"]
        >= summary["masked_weights"]
        == int(Fraction(str(summary["sparsity_target"])) * summary["prunable_weights"])
    )
    moved = world(1).run(run, task, tmp_path / "moved", *options, *stage(2))[0]
    assert moved["masked_weights"] == summary["masked_weights"]
    assert [line["loss"] for line in records(tmp_path / "moved", "train")] == pytest.approx(
        [line["loss"] for line in records(whole, "train")], rel=1e-4
    )
    without = world(2).run(run, task, tmp_path / "without", *EVERY_STEP, *stage(3))[0]
    assert without["masked_weights"] == summary["masked_weights"]
    assert not same_weights(whole, tmp_path / "without")


def from_sparse(directory: Path, layout: Layout) -> list[dict[str, Tensor]]:
    """Return the masks before the first step and after every step of movement pruning, from a sparse model."""
    student = Student(directory, layout, pruning={"sparsity": 0.5, "score": "movement", "start_sparse": True})
    history = [student.masks()]
    for number, sparsity in enumerate(MOVEMENT):
        student.step(number, sparsity)
        student.pruner.verify()
        history.append(student.masks())
    student.close()
    return history


@pytest.mark.slow
def test_zeros_from_before_do_not_come_back(world: Worlds, directory: Path, tmp_path: Path) -> None:
    oneshot.run(str(directory), str(tmp_path / "sparse"), None, ["pruning.sparsity=0.3"])
    for layout in (Layout(0), Layout(2), Layout(3)):
        first, *later = world(2).run(from_sparse, tmp_path / "sparse", layout)[0]
        assert any(mask.any() for mask in first.values())
        assert comes_back(later), "those that movement pruned do"
        assert all((masks[name] | ~first[name]).all() for masks in later for name in first)
        last, total = later[-1], sum(mask.numel() for mask in first.values())
        assert sum(int(mask.sum()) for mask in last.values()) == total // 2
