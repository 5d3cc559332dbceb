"""Invariants 1 to 5: exact, the same everywhere, never undone, monotone, frozen; at every world, stage and layout."""

from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, prune

from distprune.errors import UserError
from distprune.pruning.masks import PRUNED
from tests.distributed.engines import (
    ALL_LAYOUTS,
    FP16_LAYOUTS,
    OTHER_LAYOUTS,
    Layout,
    Student,
    plain_model,
    random_batch,
    reference_masks,
    target_weights,
    write_model,
)
from tests.world import Worlds, by_world

LADDER = [Fraction("0.29"), Fraction("0.5"), Fraction("0.97")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"distinct": write_model(root / "distinct"), "tied": write_model(root / "tied", levels=12)}


# ------------------------------------------------------------------------------ 1 and 2: exact, the same everywhere


def climb(directory: Path, layouts: list[Layout]) -> list[list[tuple[int, dict[str, Tensor]]]]:
    """Prune along the ladder from equal weights, without training; return the counts and the masks."""
    found = []
    for layout in layouts:
        student = Student(directory, layout)
        rungs = []
        for sparsity in LADDER:
            student.pruner.prune(sparsity)
            masks = student.masks()
            assert not any(master[masks[name]].any() for name, master in student.masters().items())
            rungs.append((student.pruner.masked, masks))
        found.append(rungs)
        student.close()
    return found


@by_world
@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_masks_are_the_reference_at_every_layout(world: Worlds, models: dict[str, Path], kind: str, size: int) -> None:
    ranks = world(size).run(climb, models[kind], ALL_LAYOUTS)
    scores = {name: weight.abs() for name, weight in target_weights(plain_model(models[kind])).items()}
    total = sum(score.numel() for score in scores.values())
    for layout, *rungs_of_ranks in zip(ALL_LAYOUTS, *ranks, strict=True):
        for rungs in rungs_of_ranks:
            before = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
            for sparsity, (count, masks) in zip(LADDER, rungs, strict=True):
                # Pruned first, then by magnitude, then by index.
                scored = {name: score.masked_fill(before[name], -1.0) for name, score in scores.items()}
                before = reference_masks(scored, sparsity)
                assert list(masks) == list(before), layout
                assert all(torch.equal(masks[name], before[name]) for name in before), f"{layout} at {sparsity}"
                assert count == floor(sparsity * total) == sum(int(mask.sum()) for mask in masks.values())


@by_world
def test_masks_are_those_of_torch(world: Worlds, models: dict[str, Path], size: int) -> None:
    layouts = [Layout(stage) for stage in range(4)]
    (found, *_) = world(size).run(climb, models["distinct"], layouts)
    model = plain_model(models["distinct"])
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in target_weights(model)}
    magnitudes = torch.cat([module.weight.detach().abs().flatten() for module in modules.values()])
    assert magnitudes.unique().numel() == magnitudes.numel(), "torch's choice among ties is not defined"
    amount = floor(LADDER[1] * magnitudes.numel())
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=amount)
    for rungs in found:
        for name, mask in rungs[1][1].items():
            assert torch.equal(mask, modules[name].weight_mask.flatten() == 0), name


def prune_with_nan(directory: Path, layout: Layout) -> str:
    student = Student(directory, layout)
    for shard in student.pruner.shards[:1]:
        if student.rank == student.world - 1:
            shard.master[shard.owned][-1] = torch.nan
    with pytest.raises(UserError) as caught:
        student.pruner.prune(Fraction("0.5"))
    assert student.pruner.masked == 0, "nothing was pruned"
    student.close()
    return str(caught.value)


@by_world
def test_a_nan_score_is_never_pruned_silently(world: Worlds, models: dict[str, Path], size: int) -> None:
    for stage in range(4):
        messages = world(size).run(prune_with_nan, models["distinct"], Layout(stage))
        assert len(set(messages)) == 1, "the same sentence on every rank"
        assert "has scores of Magnitude that are NaN" in messages[0]
        assert ".weight" in messages[0]


# ------------------------------------------------------------------------------ 3 and 4: never undone, monotone


def train_pruned(directory: Path, layout: Layout, accumulation: int, checkpointing: bool) -> None:
    """Train under weight decay, momentum and clipping; after each step look at every copy of the pruned weights."""
    student = Student(
        directory, layout, accumulation, clip=0.05, weight_decay=0.1, lr=3e-2, checkpointing=checkpointing
    )
    rungs = {1: Fraction("0.3"), 3: Fraction("0.5"), 4: Fraction("0.9")}
    before = student.masks()
    start = student.masters()
    for step in range(7):
        student.step(step, rungs.get(step))
        student.pruner.verify()
        masks, masters, used = student.masks(), student.masters(), student.forward_weights()
        moments = [student.moments(kind) for kind in ("exp_avg", "exp_avg_sq")]
        for name, mask in masks.items():
            assert (mask | ~before[name]).all(), f"{layout}: a pruned weight of {name} is back"
            for kind, held in (("master", masters), ("forward", used), ("moment", moments[0]), ("moment", moments[1])):
                pruned = held[name][mask]
                assert not pruned.any(), f"{layout}, step {step}: {kind} of {name} is not zero"
                assert not torch.signbit(pruned).any(), f"{layout}, step {step}: {kind} of {name} is -0.0"
        before = masks
    total = sum(mask.numel() for mask in before.values())
    assert sum(int(mask.sum()) for mask in before.values()) == floor(Fraction("0.9") * total)
    moved = [~torch.isclose(masters[name], start[name]) & ~before[name] for name in before]
    assert sum(int(each.sum()) for each in moved) > 0.9 * (total - floor(Fraction("0.9") * total)), "survivors train"
    student.close()


@by_world
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pruned_weights_stay_zero_in_every_copy_and_masks_only_grow(
    world: Worlds, models: dict[str, Path], dtype: str, size: int
) -> None:
    for layout in ALL_LAYOUTS:
        if layout.dtype == dtype:
            world(size).run(train_pruned, models["tied"], layout, 1, False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", OTHER_LAYOUTS, ids=str)
def test_masks_hold_under_other_options_of_deepspeed(world: Worlds, models: dict[str, Path], layout: Layout) -> None:
    for size in (2, 3):
        world(size).run(train_pruned, models["tied"], layout, 2, False)


@by_world
def test_masks_hold_under_accumulation_and_activation_checkpointing(
    world: Worlds, models: dict[str, Path], size: int
) -> None:
    for layout in (Layout(0), Layout(2, "bf16"), Layout(2, "fp32", True), Layout(3)):
        world(size).run(train_pruned, models["distinct"], layout, 2, True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_masks_hold_in_fp16_with_loss_scaling(world: Worlds, models: dict[str, Path], size: int) -> None:
    for layout in FP16_LAYOUTS:
        world(size).run(train_pruned, models["distinct"], layout, 2, False)


def overflow(directory: Path, layout: Layout) -> None:
    """Let the step overflow that was to carry a new mask, so that DeepSpeed skips it."""
    student = Student(directory, layout)
    student.step(0)
    student.step(1, Fraction("0.5"), loss_factor=1e9)
    assert student.engine.optimizer.overflow, "the step must have been skipped"
    assert not student.pruner.carried
    masks = student.masks()
    assert not any(master[masks[name]].any() for name, master in student.masters().items())
    student.step(2)
    assert not student.engine.optimizer.overflow
    assert student.pruner.carried
    student.pruner.verify()
    used = student.forward_weights()
    assert not any(used[name][mask].any() for name, mask in masks.items())
    student.step(3, loss_factor=1e9)
    assert student.engine.optimizer.overflow
    assert student.pruner.carried, "a later step that is skipped takes nothing back"
    student.pruner.verify()
    student.close()


@pytest.mark.slow
def test_a_mask_outlives_the_fp16_step_that_overflowed(world: Worlds, models: dict[str, Path]) -> None:
    for layout in FP16_LAYOUTS:
        world(2).run(overflow, models["distinct"], layout)


def zero_a_survivor(directory: Path, layout: Layout) -> None:
    """Make a survivor of a smaller global index than any pruned weight zero: at the next rung they tie."""
    student = Student(directory, layout)
    student.pruner.prune(Fraction("0.5"))
    before = student.masks()
    first = student.names[0]
    survivors = (~before[first]).nonzero().flatten()[:20]
    for shard in student.pruner.shards:
        if shard.name == first:
            mine = survivors[(survivors >= shard.start) & (survivors < shard.end)] - shard.start
            shard.master[mine] = 0.0
    student.pruner.prune(Fraction("0.5"))
    assert all(torch.equal(mask, before[name]) for name, mask in student.masks().items()), layout
    total = sum(mask.numel() for mask in before.values())
    student.pruner.prune((floor(Fraction("0.5") * total) + Fraction(20)) / total)
    after = student.masks()
    assert after[first][survivors].all(), "zeros that were no pruned ones go next"
    assert all((after[name] | ~before[name]).all() for name in after)
    student.close()


@by_world
def test_a_pruned_weight_stays_pruned_where_a_survivor_is_zero_too(
    world: Worlds, models: dict[str, Path], size: int
) -> None:
    for layout in (*map(Layout, range(4)), Layout(3, variant="persistent")):
        world(size).run(zero_a_survivor, models["distinct"], layout)


def spoil_each_copy(directory: Path, layout: Layout) -> None:
    student = Student(directory, layout)
    for step, sparsity in enumerate((Fraction("0.9"), None)):
        student.step(step, sparsity)
    pruner = student.pruner
    assert pruner.unmasked() == []
    shard, mask = next((shard, each.mask) for shard, each in zip(pruner.shards, pruner.slices, strict=True))
    place = int((mask == PRUNED).nonzero()[-1])
    copies = {"master": shard.master, "low": shard.low_precision} | shard.moments(student.engine.basic_optimizer)
    assert len({held.data_ptr() for held in copies.values()}) == 4
    with torch.no_grad():
        for name, held in copies.items():
            held[place] = 1.0
            assert pruner.unmasked() == [shard.name], name
            held[place] = 0.0
    assert pruner.unmasked() == []
    student.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_weight_that_is_back_in_one_copy_alone_is_seen(world: Worlds, models: dict[str, Path], stage: int) -> None:
    world(2).run(spoil_each_copy, models["distinct"], Layout(stage, "bf16"))


# ------------------------------------------------------------------------------ 3: the clipping norm

CLIP = 0.01


def clipped_step(directory: Path, layout: Layout, accumulation: int) -> tuple[float | None, dict[str, Tensor]]:
    """Return the norm that DeepSpeed used in a pruned step, and the first moments that came of it.

    The plain optimizer of stage 0 in fp32 keeps no norm: there the moments alone show it.
    """
    student = Student(directory, layout, accumulation, clip=CLIP)
    student.step(0, Fraction("0.9"))
    norm = None if layout == Layout(0) else float(student.engine.get_global_grad_norm())
    moments = student.moments("exp_avg")
    student.close()
    return norm, moments


def plain_clipped_step(model: nn.Module, dtype: str) -> tuple[float, float, dict[str, Tensor]]:
    """Return the norm of the masked and of the whole gradient, and AdamW's first moments, of one process."""
    masks = reference_masks({n: w.abs() for n, w in target_weights(model).items()}, Fraction("0.9"))
    working = model if dtype == "fp32" else model.bfloat16()
    batch = random_batch(0)
    labels = batch.pop("labels")
    nn.functional.cross_entropy(working(**batch).logits.float(), labels).backward()
    gradients = {name: parameter.grad for name, parameter in working.named_parameters()}
    whole_norm = float(torch.stack([g.float().norm() for g in gradients.values()]).norm())
    for name, mask in masks.items():
        gradients[name].view(-1).masked_fill_(mask, 0.0)
    norm = float(clip_grad_norm_(working.parameters(), CLIP))
    return norm, whole_norm, {name: 0.1 * gradients[name].float().flatten() for name in masks}


@pytest.mark.parametrize(
    ("size", "accumulation"),
    [(2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 2), (2, 1), (3, 2), (4, 1)))],
)
def test_the_clipping_norm_is_that_of_the_masked_gradient(
    world: Worlds, models: dict[str, Path], accumulation: int, size: int
) -> None:
    for layout in ALL_LAYOUTS + OTHER_LAYOUTS * (size == 2):
        norm, whole_norm, moments = plain_clipped_step(plain_model(models["distinct"]), layout.dtype)
        assert norm < 0.95 * whole_norm, "the mask must matter"
        assert norm > 2 * CLIP, "clipping must be active"
        rtol = 1e-4 if layout.dtype == "fp32" else 0.03
        for used, found in world(size).run(clipped_step, models["distinct"], layout, accumulation):
            assert used in (None, pytest.approx(norm, rel=rtol)), layout
            expected, got = (torch.cat([each[name] for name in moments]) for each in (moments, found))
            assert float((got - expected).norm()) <= rtol * float(expected.norm()), layout


# ------------------------------------------------------------------------------ 5: frozen means frozen


def train_frozen(directory: Path, layout: Layout) -> dict[str, Tensor]:
    """Train and prune with frozen embeddings; return every weight that the forward pass uses, whole."""
    student = Student(directory, layout, freeze=["embeddings"], weight_decay=0.1)
    student.names = [name for name, _ in student.engine.module.named_parameters()]
    for step in range(3):
        student.step(step, Fraction("0.9") if step == 1 else None)
    weights = student.forward_weights()
    student.close()
    return weights


@by_world
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_targets_are_pruned_and_frozen_weights_do_not_change(
    world: Worlds, models: dict[str, Path], dtype: str, size: int
) -> None:
    model = plain_model(models["distinct"], dtype)
    targets = target_weights(model)
    for stage in range(4):
        (weights, *_) = world(size).run(train_frozen, models["distinct"], Layout(stage, dtype))
        for name, start in model.named_parameters():
            held = weights[name].float()
            if "embeddings" in name:
                assert torch.equal(held, start.detach().flatten()), f"stage {stage}: {name} is frozen"
            elif name not in targets:
                assert not torch.equal(held, start.detach().flatten()), f"stage {stage}: {name} trains"
                if "LayerNorm.weight" in name or "classifier" in name:
                    assert held.all(), f"stage {stage}: {name} is not pruned"
