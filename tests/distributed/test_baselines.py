"""The one-shot methods that SMC-Bench compares: masks from another model's weights, and lottery tickets in rounds."""

from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.engines import (
    Layout,
    Student,
    plain_model,
    reference_masks,
    target_weights,
    write_model,
)
from tests.distributed.runs import DENSE, run, stage
from tests.world import Worlds, by_world_slow_from_2

AT_ONCE = ('pruning.start="0 steps"', 'pruning.end="0 steps"')
STANDSTILL = ("lr.peak=1e-30", "lr.final=0")
"""A learning rate at which no weight of fp32 changes."""
LAYOUTS = [Layout(0), Layout(1, "bf16"), Layout(2), Layout(2, "bf16", True), Layout(3), Layout(3, "bf16")]


@pytest.fixture(scope="module")
def trained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with the same shapes as that of ``directory``, and other weights."""
    other = write_model(tmp_path_factory.mktemp("other") / "model")
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(11)
    changed = {name: each[torch.randperm(len(each), generator=generator)].clone() for name, each in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    return other


def prune_twice(
    directory: Path, layout: Layout, weights_of: str
) -> list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:
    """Prune to two sparsities with a step in each; return the masks, and the weights before and behind the step."""
    student = Student(directory, layout, pruning={"weights_of": weights_of}, lr=0.0)
    found = []
    for number, sparsity in enumerate((Fraction("0.2"), Fraction("0.36"))):
        student.pruner.prune(sparsity)
        at_once = student.masters()
        student.step(number)
        student.pruner.verify()
        found.append((student.masks(), at_once, student.masters()))
    student.close()
    return found


@by_world_slow_from_2
def test_masks_are_those_of_the_other_weights_and_survivors_keep_their_own(
    world: Worlds, directory: Path, trained: Path, size: int
) -> None:
    scores = {name: weight.abs() for name, weight in target_weights(plain_model(trained)).items()}
    for layout in LAYOUTS:
        own = target_weights(plain_model(directory))
        for rank in world(size).run(prune_twice, directory, layout, str(trained)):
            for sparsity, (masks, *weights) in zip((Fraction("0.2"), Fraction("0.36")), rank, strict=True):
                expected = reference_masks(scores, sparsity)
                for name, mask in masks.items():
                    assert torch.equal(mask, expected[name]), f"{layout} {name} at {sparsity}"
                    for each in weights:
                        assert torch.equal(each[name], own[name].masked_fill(mask, 0.0)), f"{layout} {name}"


@pytest.mark.slow
def test_a_lottery_ticket_is_drawn_in_rounds_and_rewound_to_the_start(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    """Each round keeps the larger of the weights that the round before has trained, at their first values."""
    world(2).run(run, task, tmp_path / "0", *DENSE)
    start = target_weights(plain_model(task / "model"))
    before = None
    for number in (1, 2, 3):
        kept = Fraction(8, 10) ** number
        sparsity = f"pruning.sparsity={float(1 - kept)} pruning.initial={float(1 - kept)}".split()
        options = (*AT_ONCE, *sparsity, f"pruning.weights_of={tmp_path / str(number - 1) / 'final'}")
        for name, more in ((str(number), ()), (f"{number}-rewound", STANDSTILL)):
            world(2).run(run, task, tmp_path / name, *options, *more, *stage(number))
        trained = target_weights(plain_model(tmp_path / str(number - 1) / "final"))
        masks = reference_masks({name: weight.abs() for name, weight in trained.items()}, 1 - kept)
        assert sum(int(mask.sum()) for mask in masks.values()) == floor((1 - kept) * sum(map(len, masks.values())))
        ticket = target_weights(plain_model(tmp_path / str(number) / "final"))
        rewound = target_weights(plain_model(tmp_path / f"{number}-rewound" / "final"))
        for name, mask in masks.items():
            assert not ticket[name][mask].any()
            assert torch.equal(rewound[name], start[name].masked_fill(mask, 0.0)), name
            assert before is None or bool(mask[before[name]].all()), "what a round has pruned stays so"
        assert any(not torch.equal(ticket[name], rewound[name]) for name in masks), "it was trained"
        before = masks


def test_other_weights_that_do_not_fit_are_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    smaller = write_model(tmp_path / "smaller", hidden_size=16, intermediate_size=8)
    for options, sentence in (
        ((f"pruning.weights_of={smaller}",), "has shape [8, 16] in"),
        ((f"pruning.weights_of={tmp_path / 'none'}",), "is not a directory"),
        ((f"pruning.weights_of={task / 'model'}", "pruning.score=taylor"), "allowed: a score of weights alone"),
        ((f"pruning.weights_of={task / 'model'}", "pruning.score=random"), "allowed: a score of weights alone"),
        ((f"pruning.weights_of={task / 'model'}", "pruning.start_sparse=true"), "null where pruning.start_sparse"),
    ):
        said = world(2).run(run, task, tmp_path / "run", *AT_ONCE, *options)
        assert len(set(said)) == 1
        assert sentence in said[0], said[0]
