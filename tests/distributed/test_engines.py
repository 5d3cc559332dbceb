"""Models in engines and out of them: the export, the teacher, memory, and layouts that are not known."""

import gc
import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as torch_dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from distprune.config import Config
from distprune.engines.build import build_frozen, build_student
from distprune.errors import UserError
from distprune.models.export import count_zeros, export
from distprune.synthetic import tokenizer
from distprune.training.distill import distillation_loss
from distprune.zero import shards
from distprune.zero.engine import held_bytes
from distprune.zero.shards import shards_of
from tests.distributed.engines import (
    ALL_LAYOUTS,
    Layout,
    Student,
    forward,
    plain_model,
    random_batch,
    rows,
    target_weights,
    whole,
    write_model,
)
from tests.world import World, Worlds, by_world, by_world_slow_from_2

# ------------------------------------------------------------------------------ in


def steps_taken(directory: Path, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor], set[float]]:
    """Return the first fp32 weights, those of the forward pass, and AdamW's count after one step."""
    student = Student(directory, layout, weight_decay=0.5)
    masters, used = student.masters(), student.forward_weights()
    student.step(0)
    counts = {float(state["step"]) for state in student.engine.basic_optimizer.state.values()}
    student.close()
    return masters, used, counts


LOW = [Layout(stage, "bf16") for stage in (1, 2, 3)]


@pytest.mark.parametrize(
    "layout",
    [Layout(0), Layout(0, "bf16"), Layout(2, "fp16"), Layout(2, "bf16", True), Layout(3), *LOW],
)
def test_a_run_begins_with_the_files_weights_and_takes_no_step_before_the_first(
    world: Worlds, directory: Path, layout: Layout
) -> None:
    stored = target_weights(plain_model(directory))
    for masters, used, counts in world(2).run(steps_taken, directory, layout):
        assert masters.keys() == used.keys() == stored.keys()
        for name, values in stored.items():
            assert torch.equal(masters[name], values), "not a rounding of them"
            assert torch.equal(used[name], values.to(used[name].dtype)), "what the forward pass uses is one"
        assert counts == {1.0}


def first_moments(directory: Path, layout: Layout) -> dict[str, Tensor]:
    """Return what this rank holds of AdamW's first moments after one step."""
    student = Student(directory, layout)
    student.step(0)
    shards, optimizer = student.pruner.shards, student.engine.basic_optimizer
    found = {f"{shard.name} {shard.start}": shard.moments(optimizer)["exp_avg"].clone() for shard in shards}
    student.close()
    return found


@pytest.mark.parametrize("layout", [Layout(0, "bf16"), *(Layout(stage, "fp16") for stage in (1, 2, 3))], ids=str)
def test_gradients_of_low_precision_have_the_size_of_fp32s(world: World, directory: Path, layout: Layout) -> None:
    exact = world(2).run(first_moments, directory, Layout(layout.stage))
    for wanted, found in zip(exact, world(2).run(first_moments, directory, layout), strict=True):
        assert wanted.keys() == found.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name].norm(), values.norm(), rtol=0.1, atol=0)


# ------------------------------------------------------------------------------ out


def train_and_export(directory: Path, layout: Layout, target: Path) -> tuple[dict[str, Tensor], int]:
    """Train two steps with pruning, export, and return every fp32 weight whole, and the pruned ones' number."""
    student = Student(directory, layout, weight_decay=0.1)
    student.step(0, Fraction("0.8"))
    student.step(1)
    export(student.engine, PreTrainedTokenizerFast.from_pretrained(directory), target)
    torch_dist.barrier()
    masked = student.pruner.masked
    names = [name for name, _ in student.engine.module.named_parameters()]
    every = whole(
        names, [(shard, shard.master[shard.owned].cpu()) for shard in shards_of(student.engine, names).shards]
    )
    student.close()
    return every, masked


@by_world_slow_from_2
def test_export_is_the_same_model_at_every_layout(world: Worlds, directory: Path, tmp_path: Path, size: int) -> None:
    for layout in ALL_LAYOUTS:
        target = tmp_path / str(layout)
        masters, masked = world(size).run(train_and_export, directory, layout, target)[0]
        written = load_file(target / "model.safetensors")
        assert written.keys() == masters.keys() == load_file(directory / "model.safetensors").keys()
        for name, tensor in written.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.flatten(), masters[name]), f"{layout}: {name}"
        model = AutoModelForSequenceClassification.from_pretrained(target)
        assert all(torch.equal(parameter, written[name]) for name, parameter in model.named_parameters())
        counts = count_zeros(target)
        assert sum(counts[name].zeros for name in target_weights(model)) == masked
        assert model(torch.tensor([[2, 5, 3]])).logits.isfinite().all()


def export_frozen(directory: Path, layout: Layout, target: Path) -> dict[str, Tensor]:
    """Train a step with the embeddings frozen, export, and return the trained fp32 weights whole."""
    student = Student(directory, layout, freeze=["embeddings"])
    student.engine.module.register_buffer("steps", torch.tensor([3, 1, 4]))
    student.engine.module.register_buffer("cache", torch.zeros(2), persistent=False)
    student.step(0)
    export(student.engine, PreTrainedTokenizerFast.from_pretrained(directory), target)
    torch_dist.barrier()
    names = [name for name, parameter in student.engine.module.named_parameters() if parameter.requires_grad]
    trained = whole(names, [(s, s.master[s.owned].cpu()) for s in shards_of(student.engine, names).shards])
    student.close()
    return trained


@pytest.mark.parametrize("layout", [Layout(0), Layout(2, "bf16"), Layout(3), Layout(3, "bf16")], ids=str)
def test_frozen_weights_and_buffers_are_exported_as_they_were_used(
    world: Worlds, directory: Path, tmp_path: Path, layout: Layout
) -> None:
    trained = world(2).run(export_frozen, directory, layout, tmp_path / "out")[0]
    written, used = load_file(tmp_path / "out" / "model.safetensors"), plain_model(directory, layout.dtype)
    assert torch.equal(written.pop("steps"), torch.tensor([3, 1, 4]))
    assert written.keys() == dict(used.named_parameters()).keys(), "a buffer that is no part of the model"
    for name, parameter in used.named_parameters():
        assert torch.equal(written[name].flatten(), trained.get(name, parameter.flatten())), name
        assert ("embeddings" in name) != (name in trained)


def export_decoder(directory: Path, target: Path) -> None:
    config = Config()
    config.train.batch_size, config.model.dropout = 4, 0.0
    engine, _ = build_student(config, directory, AutoModelForCausalLM, {}, 4 // torch_dist.get_world_size())
    assert engine.module.transformer.drop.p == 0.0
    export(engine, PreTrainedTokenizerFast.from_pretrained(directory), target)
    torch_dist.barrier()
    engine.destroy()


def test_a_model_stays_as_it_describes_itself(world: Worlds, tmp_path: Path) -> None:
    """A run's dropout is not the model's, and how text is generated is none of training's business."""
    words = tokenizer()
    config = GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=1, n_positions=16, embd_pdrop=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    said = {
        "eos_token_id": [3, 9],
        "temperature": 0.9,
        "do_sample": False,
        "max_new_tokens": 7,
    }  # not what may be saved
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(said))
    world(2).run(export_decoder, tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["embd_pdrop"] == 0.3
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in said} == said


def export_in_parts(directory: Path, target: Path) -> None:
    from distprune.models import export as module

    student = Student(directory, Layout(3))
    limit, module._FILE_SIZE = module._FILE_SIZE, "3KB"
    export(student.engine, PreTrainedTokenizerFast.from_pretrained(directory), target)
    module._FILE_SIZE = limit
    torch_dist.barrier()
    student.close()


def test_a_model_of_several_files_is_exported_with_its_index(world: Worlds, directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model-00001-of-00099.safetensors").touch()
    world(2).run(export_in_parts, directory, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(target.glob("*.safetensors"))) > 2
    loaded, plain = AutoModelForSequenceClassification.from_pretrained(target), plain_model(directory)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


# ------------------------------------------------------------------------------ the teacher


def teacher_logits(directory: Path, stage: int) -> Tensor:
    section = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    engine = build_frozen(section, directory, AutoModelForSequenceClassification, {"num_labels": 2}, 4)
    assert not engine.module.training
    assert not any(parameter.requires_grad for parameter in engine.module.parameters())
    held = held_bytes(engine)
    whole = sum(p.numel() for p in plain_model(directory).parameters()) * 4
    assert held["moments"] == held["master"] == 0
    world = torch_dist.get_world_size()
    assert held["weights"] < 1.1 * whole / world if stage == 3 else held["weights"] == whole
    # A model that is loaded beside a sharded one is not sharded.
    assert all(parameter.numel() > 0 for parameter in BertForMaskedLM.from_pretrained(directory).parameters())
    with torch.no_grad():
        logits = forward(engine, random_batch(3)).clone()
    engine.destroy()
    return logits


@by_world
@pytest.mark.parametrize("stage", [0, 3])
def test_the_teacher_says_what_the_plain_model_says(world: Worlds, directory: Path, stage: int, size: int) -> None:
    batch = {name: tensor for name, tensor in random_batch(3).items() if name != "labels"}
    with torch.no_grad():
        expected = plain_model(directory).eval()(**batch).logits
    for logits in world(size).run(teacher_logits, directory, stage):
        torch.testing.assert_close(logits, expected)


# ------------------------------------------------------------------------------ memory


@pytest.fixture
def fresh() -> Iterator[World]:
    """Return ranks of their own: what ran before in those that are kept leaves tensors, which may come and go."""
    ranks = World(2)
    yield ranks
    ranks.stop()


def grow(directory: Path, student_stage: int, teacher_stage: int) -> list[tuple[int, int]]:
    """Train a student beside a teacher; return live tensors and resident bytes after each 15 of 75 steps."""
    section = {"zero_optimization": {"stage": teacher_stage, "stage3_param_persistence_threshold": 0}}
    teacher = build_frozen(section, directory, AutoModelForSequenceClassification, {"num_labels": 2}, 4)
    student = Student(directory, Layout(student_stage))
    seen = []
    for step in range(75):
        batch = rows(random_batch(step), student.rank, student.world)
        with torch.no_grad():
            target = forward(teacher, batch)
        student.engine.backward(distillation_loss(forward(student.engine, batch), target, 5.5).mean())
        student.pruner.after_backward(Fraction(step, 100) if step % 10 == 0 else None)
        student.engine.step()
        if step % 15 == 14:
            gc.collect()
            tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
            seen.append((tensors, psutil.Process().memory_info().rss))
    student.close()
    teacher.destroy()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (2, 3), (3, 3)])
def test_memory_stays_flat_with_two_engines(fresh: World, tmp_path: Path, student: int, teacher: int) -> None:
    model = write_model(tmp_path / "model", hidden_size=128, intermediate_size=512)
    size = (model / "model.safetensors").stat().st_size
    for seen in fresh.run(grow, model, student, teacher):
        # A tensor in flight and the allocator's megabytes come and go; what is kept at every step is in all four spans.
        tensors, models = zip(*((b - a, (d - c) / size) for (a, c), (b, d) in pairwise(seen)), strict=True)
        assert min(tensors) <= 0, f"each 15 steps kept {tensors} tensors"
        assert min(models) < 2, f"each 15 steps kept {models} times the model"


# ------------------------------------------------------------------------------ what is not known


def refused(directory: Path, section: dict[str, Any]) -> str:
    student = Student(directory, Layout(2))
    student.engine._config.zero_config = student.engine._config.zero_config.model_copy(update=section)
    with pytest.raises(UserError) as caught:
        shards_of(student.engine, student.names)
    student.close()
    return str(caught.value)


def refused_version(directory: Path) -> str:
    student = Student(directory, Layout(2))
    known, shards.KNOWN_VERSIONS = shards.KNOWN_VERSIONS, ("0.1", "0.2")
    with pytest.raises(UserError) as caught:
        shards_of(student.engine, student.names)
    shards.KNOWN_VERSIONS = known
    student.close()
    return str(caught.value)


def refused_wrapper(directory: Path) -> str:
    student = Student(directory, Layout(0))
    student.engine.optimizer = object()
    with pytest.raises(UserError) as caught:
        shards_of(student.engine, student.names)
    return str(caught.value)


def test_layouts_of_deepspeed_that_are_not_known_are_refused(world: Worlds, directory: Path) -> None:
    (message,) = world(1).run(refused, directory, {"zero_hpz_partition_size": 2})
    assert "zero_hpz_partition_size is not supported" in message
    (message,) = world(1).run(refused, directory, {"round_robin_gradients": True})
    assert "round_robin_gradients is not supported" in message
    (message,) = world(1).run(refused_version, directory)
    assert "is not known to distprune; allowed: >=0.1,<0.2" in message
    (message,) = world(1).run(refused_wrapper, directory)
    assert "DeepSpeed wrapped the optimizer in object" in message
