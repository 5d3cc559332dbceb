"""What is planned is what real engines hold, and the command says it."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from distprune import dist, settings
from distprune.config import PruningConfig
from distprune.engines.build import build_frozen, decay_groups
from distprune.models.weights import skeleton
from distprune.planning.held import mask_bytes, state_bytes, weight_bytes
from distprune.planning.shapes import layout_of, shapes_of
from distprune.planning.subject import subject_of
from distprune.pruning.targets import targets_of
from distprune.zero.engine import held_bytes
from tests.distributed.engines import ALL_LAYOUTS, Layout, Student
from tests.distributed.runs import TAUGHT, run_command
from tests.world import Worlds, by_world


def student_as_planned(directory: Path, layout: Layout) -> tuple[dict[str, int], list[int], dict[str, int], int]:
    student = Student(directory, layout)
    student.step(0, Fraction(1, 2))
    masks = dist.gather([sum(flat.mask.numel() for flat in student.pruner.flat_masks)])
    found = held_bytes(student.engine)
    student.close()
    model, _ = skeleton(directory, AutoModelForSequenceClassification, {"num_labels": 2})
    shapes = shapes_of(model, decay_groups(model, 0.0), targets_of(PruningConfig(), model))
    planned = layout_of("student", layout.section, dist.detect().size)
    states = {"weights": weight_bytes(shapes, planned)} | state_bytes(shapes, planned)
    return found, masks, states, mask_bytes(shapes, planned)


@by_world
@pytest.mark.parametrize("layout", [*ALL_LAYOUTS, Layout(3, variant="sub-groups")], ids=str)
def test_a_student_holds_what_is_planned(world: Worlds, directory: Path, layout: Layout, size: int) -> None:
    for found, masks, planned, planned_masks in world(size).run(student_as_planned, directory, layout):
        assert found == planned
        assert max(masks) == planned_masks


def teacher_as_planned(directory: Path, stage: int) -> tuple[int, int]:
    section = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    engine = build_frozen(section, directory, AutoModelForSequenceClassification, {"num_labels": 2}, 4)
    found = held_bytes(engine)["weights"]
    engine.destroy()
    model, _ = skeleton(directory, AutoModelForSequenceClassification, {"num_labels": 2})
    layout = layout_of("teacher", section, dist.detect().size)
    return found, weight_bytes(shapes_of(model.requires_grad_(False), [], ()), layout)


@by_world
@pytest.mark.parametrize("stage", [0, 3])
def test_a_teacher_holds_what_is_planned(world: Worlds, directory: Path, stage: int, size: int) -> None:
    for found, planned in world(size).run(teacher_as_planned, directory, stage):
        assert found == planned


def planned(world: Worlds, task: Path, *arguments: str) -> tuple[int, str]:
    """Run the command on a process that is there already; return its status and what it says."""
    ((status, said),) = world(1).run(run_command, "plan", task / "run.yaml", *arguments)
    return status, said


def test_a_plan_is_printed(world: Worlds, task: Path) -> None:
    overrides = [*TAUGHT, "deepspeed.student.zero_optimization.offload_optimizer.device=cpu", "train.accumulation=2"]
    status, said = planned(world, task, "--world", "3", "--examples-per-s", "2", *overrides)
    assert status == 0, said
    for part in (
        "GPUs: ZeRO-2, float32, 3 ranks, micro batches of 2",
        "on CPUs",
        "evaluation",
        "outputs",
        "activations",
        "gradients",
        "teacher's weights",
        "masks",
        "24 steps",
        "as given",
    ):
        assert part in said
    assert f"{24 * 12 / 2 / 3600:.2f} hours" in said


def test_gradients_for_a_score_take_time_and_are_sent(world: Worlds, task: Path) -> None:
    score = ("pruning.score=obs", "fisher.samples=3")
    status, said = planned(world, task, "--world", "2", "--examples-per-s", "2", *score)
    assert status == 0, said
    assert f"{(24 + 12) * 12 / 2 / 3600:.2f} hours for 24 steps, and 12 gradients for the score" in said
    of_steps, of_score = (
        float(re.search(rf"{name} +│ ([\d.]+) │", said)[1]) for name in ("gradients", "for the score")
    )
    assert of_score == pytest.approx(of_steps * 12 / 24, abs=0.001)


def test_a_teacher_whose_outputs_are_cached_comes_before_the_run(world: Worlds, task: Path) -> None:
    status, said = planned(world, task, "--world", "2", "--examples-per-s", "2", *TAUGHT, "teacher.cache=auto")
    assert status == 0, said
    assert "caching" in said
    assert re.search(r"teacher's weights +│ 0\.000 │", said), "it is not run beside the student"


def kept_for_the_backward_pass(task: Path, hidden: float) -> int:
    options = [*TAUGHT, f"distillation.hidden={hidden}"]
    return subject_of(settings.load_valid(str(task / "run.yaml"), options), 2).activations().total(1)


def test_what_is_held_against_a_teacher_is_counted(world: Worlds, task: Path) -> None:
    """Of hidden states the backward pass needs the differences, in fp32."""
    ((without,), (kept,)) = (world(1).run(kept_for_the_backward_pass, task, hidden) for hidden in (0.0, 1.0))
    assert kept > without


@pytest.mark.slow
def test_speed_is_measured_where_none_is_given(world: Worlds, task: Path) -> None:
    status, said = planned(world, task, "--world", "2", "model.activation_checkpointing=true")
    assert status == 0, said
    assert "2 times what one process on this machine's CPU does with its 6 longest examples" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "5"], "or start 1, 2, 3, 4, 6, 12 ranks"),
        (["--world", "0"], "--world is 0; allowed: at least 1"),
        (["--world", "2", "--examples-per-s", "0"], "--examples-per-s is 0.0; allowed: more than 0"),
        (["--world", "2", "--examples-per-s", "inf"], "--examples-per-s is inf; allowed: more than 0"),
        (["--world", "2", "pruning.structure=7:9"], "which 7:9 cannot express"),
    ],
)
def test_what_cannot_be_planned_is_refused(world: Worlds, task: Path, arguments: list[str], message: str) -> None:
    status, said = planned(world, task, *arguments)
    assert status == 2
    assert message in said
