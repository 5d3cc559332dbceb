"""Teachers: a cached one teaches as a live one, is never another's, and gives way where more than logits is asked."""

import math
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from distprune import dist, settings
from distprune.disk import write_tensors
from distprune.tasks.base import Task
from distprune.teachers import cache, choose
from distprune.teachers.live import LiveTeacher
from distprune.training.setup import prepare
from tests.distributed.engines import write_model
from tests.distributed.runs import (
    DENSE,
    EVERY_STEP,
    TAUGHT,
    cut_off,
    heard,
    records,
    run,
    run_patched,
    same_weights,
    stage,
    told,
)
from tests.world import Worlds

MADE = "the teacher's outputs for 96 training rows are computed once"


@pytest.fixture(scope="module")
def task(task: Path) -> Path:
    """Give the task a teacher that is not the student."""
    write_model(task / "teacher", hidden_size=20)
    return task


SHORT = (*DENSE, *TAUGHT, "train.epochs=1")


def cached(task: Path, folder: Path) -> tuple[str, ...]:
    return (f"teacher.path={task / 'teacher'}", f"teacher.cache={folder}", *SHORT)


def losses(output: Path) -> list[float]:
    return [record["distillation_loss"] for record in records(output, "train")]


class NoTeacher:
    """Stands in for what builds a teacher's engine."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("the teacher was built")


@pytest.mark.slow
def test_a_cached_teacher_teaches_as_a_live_one_at_every_world_size(world: Worlds, task: Path, tmp_path: Path) -> None:
    (live, *_) = world(2).run(run, task, tmp_path / "live", f"teacher.path={task / 'teacher'}", *SHORT)
    folder = tmp_path / "cache"
    for size, name in ((3, "made"), (1, "one"), (4, "four")):
        function = (
            (heard, run) if name == "made" else (heard, run_patched, "distprune.teachers.choose._engine", NoTeacher())
        )
        (summary, said), *_ = world(size).run(*function, task, tmp_path / name, *cached(task, folder))
        assert (MADE in said) == (name == "made")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "live"), rel=1e-4)
        assert summary["dense_metrics"] == live["dense_metrics"]
        assert summary["bytes_per_rank"]["teacher"] == [{"weights": 0, "master": 0, "moments": 0}] * size


def left_of_the_teacher(task: Path, output: Path, *overrides: str) -> int:
    """Return how much of the teacher's weights this rank holds when a run has made its cache. Collective."""
    held: list[torch.Tensor] = []

    def recorded(*arguments: Any) -> Any:
        engine = build(*arguments)
        for each in engine.module.parameters():
            held.extend((each, getattr(each, "ds_tensor", each)))
        return engine

    build = choose._engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_engine", recorded)
        setup = prepare(settings.load_valid(str(task / "run.yaml"), [f"train.output={output}", *overrides]))
    assert held
    setup.student.destroy()
    return sum(each.numel() for each in held)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_rank_holds_a_teacher_whose_outputs_are_kept(world: Worlds, task: Path, tmp_path: Path, stage: int) -> None:
    options = (*cached(task, tmp_path / "cache"), f"deepspeed.teacher.zero_optimization.stage={stage}")
    assert world(2).run(left_of_the_teacher, task, tmp_path / "run", *options) == [0, 0]


def test_a_run_with_a_cache_goes_on_exactly(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = cached(task, tmp_path / "cache")
    world(2).run(run, task, tmp_path / "whole", *options)
    cut_off(world, 2, task, tmp_path / "run", 5, *options, *EVERY_STEP)
    world(2).run(run, task, tmp_path / "run", *options, *EVERY_STEP)
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("cache", ["null", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_run_does_not_go_on_with_another_teacher_of_the_same_name(
    world: Worlds, task: Path, tmp_path: Path, cache: str
) -> None:
    teacher = shutil.copytree(task / "model", tmp_path / "teacher")
    options = (*TAUGHT, f"teacher.path={teacher}", f"teacher.cache={'null' if cache == 'null' else tmp_path / 'cache'}")
    cut_off(world, 2, task, tmp_path / "run", 5, *options, *EVERY_STEP)
    before = (teacher / "model.safetensors").read_bytes()
    tensors = load_file(teacher / "model.safetensors")
    save_file({name: 2 * each for name, each in tensors.items()}, teacher / "model.safetensors", {"format": "pt"})
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    said = world(2).run(run, task, tmp_path / "run", *options, *EVERY_STEP)
    assert said == ["the files of teacher.path are not those that the run began with; allowed: the same"] * 2
    (teacher / "model.safetensors").write_bytes(before)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    moved = f"teacher.path={teacher.rename(tmp_path / 'moved')}"
    assert world(2).run(run, task, tmp_path / "run", *options, moved, *EVERY_STEP)[0]["steps"] > 5


@pytest.mark.slow
def test_a_cache_of_something_else_is_refused_and_made_anew_where_asked(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    world(1).run(run, task, tmp_path / "first", *cached(task, folder))
    for override, what in (
        (f"teacher.path={task / 'model'}", "the teacher"),
        ("deepspeed.teacher.bf16.enabled=true", "the teacher"),
        ("task.limit=90", "the training data"),
        ("task.metrics=[macro_f1]", "the evaluation"),
        ("task.max_length=8", "the training data and the evaluation"),
    ):
        (said,) = world(1).run(run, task, tmp_path / "second", *cached(task, folder), override)
        assert (
            f"{folder} is not of {what} of this run; allowed: another teacher.cache, or teacher.rebuild_cache" in said
        )
    other = shutil.copytree(task / "teacher", tmp_path / "other")
    settings_of_it = (other / "config.json").read_text()
    (other / "config.json").write_text(settings_of_it.replace('"gelu"', '"relu"'))
    (said,) = world(1).run(run, task, tmp_path / "second", *cached(task, folder), f"teacher.path={other}")
    assert f"{folder} is not of the teacher of this run" in said, "the same weights are another function"
    again = (*cached(task, folder), f"teacher.path={task / 'model'}", "teacher.rebuild_cache=true")
    (_, said), _ = world(2).run(heard, run, task, tmp_path / "third", *again)
    assert MADE in said
    assert len(list(folder.glob("rank-*"))) == 2
    assert MADE in cut_off(world, 2, task, tmp_path / "fourth", 5, *again, *EVERY_STEP)
    (_, said), _ = world(2).run(heard, run, task, tmp_path / "fourth", *again, *EVERY_STEP)
    assert MADE not in said, "a run that goes on has made it already"


def test_a_damaged_cache_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    world(1).run(run, task, tmp_path / "first", *cached(task, folder))
    (path,) = folder.glob("rank-*")
    tensors = load_file(path)
    tensors["values"][0] += 1
    save_file(tensors, path)
    (said,) = world(1).run(run, task, tmp_path / "second", *cached(task, folder))
    assert f"the teacher's cache {folder} is damaged: {path} has another checksum than it had" in said
    (folder / "teacher.json").write_text("{")
    (said,) = world(1).run(run, task, tmp_path / "second", *cached(task, folder))
    assert "is damaged" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").touch()  # a checkpoint has one
    for rebuild in ("false", "true"):
        options = (*cached(task, tmp_path / "other"), f"teacher.rebuild_cache={rebuild}")
        (said,) = world(1).run(run, task, tmp_path / "second", *options)
        assert "which holds something else; allowed: a new folder, or a cache" in said
    assert (tmp_path / "other" / "manifest.json").exists()


class FullDisk:
    """Stands in for `save`: what safetensors raises is no OSError."""

    def __call__(self, tensors: Any, path: Path) -> None:
        raise SafetensorError("No space left on device")


def test_a_cache_that_cannot_be_written_is_one_sentence(world: Worlds, task: Path, tmp_path: Path) -> None:
    target, options = "distprune.disk.save", cached(task, tmp_path / "cache")
    for said in world(2).run(run_patched, target, FullDisk(), task, tmp_path / "run", *options):
        assert "cannot be written: No space left on device; allowed: teacher.cache=null runs the teacher" in said


def with_cache_home(home: Path, *arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        return heard(run, *arguments)


@pytest.mark.slow
def test_other_teachers_have_other_places_in_the_users_cache(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = {}
    for name, path in (("a", "teacher"), ("b", "model"), ("c", "teacher")):
        options = ("teacher.cache=auto", f"teacher.path={task / path}", *SHORT)
        ((_, said[name]),) = world(1).run(with_cache_home, tmp_path / "home", task, tmp_path / name, *options)
    assert [MADE in said[name] for name in "abc"] == [True, True, False]
    assert len(list((tmp_path / "home" / "distprune" / "teachers").iterdir())) == 2


@pytest.mark.slow
def test_features_of_the_teacher_are_learnt_at_every_world_and_stage(world: Worlds, task: Path, tmp_path: Path) -> None:
    features = (
        "distillation.hidden=0.5",
        "distillation.attention=0.5",
        "model.dropout=0",
        "teacher.cache=auto",
        *SHORT,
    )
    seen = []
    for size, number in ((1, 0), (2, 2), (2, 3)):
        output = tmp_path / f"{size}-{number}"
        (summary, *_) = world(size).run(run, task, output, *features, *SHORT, *stage(number))
        assert summary["bytes_per_rank"]["teacher"][0]["weights"] > 0, "what is not kept needs the teacher itself"
        lines = records(output, "train")
        seen.append([(line["hidden_loss"], line["attention_loss"], line["loss"]) for line in lines])
    for other in seen[1:]:
        assert torch.allclose(torch.tensor(seen[0]), torch.tensor(other), rtol=1e-3, atol=1e-5)
    assert seen[0][0][:2] == (0.0, pytest.approx(0, abs=1e-6)), "the student begins as its teacher"
    assert max(line[0] for line in seen[0]) > 0


def unseen(folder: Path, task: Path, output: Path) -> Any:
    """Run where rank 1 makes its folders on a disk of its own. Collective."""
    seen = Path.exists
    with pytest.MonkeyPatch.context() as patch:
        if dist.detect().rank == 1:
            patch.setattr(Path, "exists", lambda path: seen(path) and ".partial-" not in path.name)
        return run(task, output, *cached(task, folder))


def test_a_cache_that_a_node_does_not_see_is_refused_before_it_is_made(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    said = world(2).run(unseen, tmp_path / "cache", task, tmp_path / "run")
    assert all("is not seen on all nodes; allowed: a teacher.cache on a disk that all share" in each for each in said)
    assert not (tmp_path / "cache").exists()


def test_what_a_killed_process_has_left_is_removed(world: Worlds, task: Path, tmp_path: Path) -> None:
    left = tmp_path / f"cache.partial-{socket.gethostname()}-999999999"
    left.mkdir()
    world(1).run(run, task, tmp_path / "run", *cached(task, tmp_path / "cache"))
    assert [path.name for path in tmp_path.glob("cache*")] == ["cache"]


@pytest.mark.slow
def test_a_student_may_be_of_another_kind_than_its_teacher(world: Worlds, task: Path, tmp_path: Path) -> None:
    """DistilBERT takes no token types, which its teacher and the tokenizer know."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(task / "model", model_input_names=names)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=2)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "distil")
    tokenizer.save_pretrained(tmp_path / "distil")
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path / "distil")("a film")
    summary, _ = world(2).run(run, task, tmp_path / "run", f"model.path={tmp_path}/distil", *TAUGHT, *stage(3))
    assert len(summary["layers"]) == 2 * 6
    assert summary["zeros_in_file"] == math.floor(0.9 * summary["prunable_weights"])


def test_what_the_teacher_can_is_said_before_the_first_step(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("train.epochs=0.5", "lr.rewind_every=null", *DENSE, *TAUGHT)
    (summary, said), (_, other) = world(2).run(heard, run, task, tmp_path / "run", *options)
    assert f"the teacher: accuracy {summary['dense_metric']:.4f}" in said.partition("validation at step")[0]
    assert "the teacher" not in other, "one rank says it"
    first = told(tmp_path / "run")[0]
    assert (first["step"], first["split"], first["accuracy"]) == (0, "teacher", summary["dense_metric"])


def test_a_rank_without_rows_has_its_part_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of an evaluation for several ranks leaves the others none."""
    monkeypatch.setattr(cache, "logits_of_rows", lambda *_: iter(()))
    teacher, task = cast("LiveTeacher", SimpleNamespace(engine=None)), cast("Task", SimpleNamespace(train=None))
    entry = write_tensors(tmp_path / "part.safetensors", cache._logits_of_rank(teacher, task, 1))
    assert load_file(tmp_path / entry.name).keys() == {"rows", "shapes", "values"}


@pytest.mark.slow
def test_a_teacher_that_comes_later_is_measured(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = (f"teacher.path={task / 'teacher'}", "teacher.cache=null", "train.eval_every=2 steps", *EVERY_STEP)
    cut_off(world, 1, task, tmp_path / "run", 5, "distillation.hardness=0", *options)
    (summary, said), *_ = world(1).run(heard, run, task, tmp_path / "run", "distillation.hardness=0.5", *options)
    (measured,) = records(tmp_path / "run", "teacher")
    assert "the teacher: accuracy " in said
    assert (measured["step"], measured["accuracy"]) == (4, summary["dense_metric"])


@pytest.mark.slow
def test_teacher_and_student_hold_fewer_bytes_on_more_ranks(world: Worlds, task: Path, tmp_path: Path) -> None:
    held: dict[int, dict[str, Any]] = {}
    for size in (1, 2, 4):
        summary = world(size).run(run, task, tmp_path / f"run{size}", *TAUGHT, *stage(3, 3))[0]
        held[size] = summary["bytes_per_rank"]
    for part, kind in (("student", "weights"), ("student", "master"), ("student", "moments"), ("teacher", "weights")):
        one = held[1][part][0][kind]
        for size in (2, 4):
            per_rank = [rank[kind] for rank in held[size][part]]
            assert one <= sum(per_rank) < 1.1 * one, f"{kind} of the {part} at world {size}: {per_rank}"
            assert max(per_rank) < 1.1 * one / size
