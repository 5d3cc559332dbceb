"""Models in and out of engines: loading, freezing, exporting, memory; at every world and stage."""

import gc
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as torch_dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from distprune import dist, shards
from distprune.distill import distillation_loss
from distprune.engine import build_frozen
from distprune.errors import UserError
from distprune.evaluate import forward
from distprune.export import count_zeros, export
from distprune.shards import held_bytes, shards_of
from distprune.weights import load_model
from tests.distributed.engines import (
    ALL_LAYOUTS,
    Layout,
    Student,
    plain_model,
    random_batch,
    rows,
    target_weights,
    whole,
    write_model,
)
from tests.world import World

Worlds = Callable[[int], World]
WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
by_world = pytest.mark.parametrize("size", WORLDS)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


# ------------------------------------------------------------------------------ in


def build(directory: Path, stage: int, seed: int = 0, new_weights_allowed: bool = False) -> Any:
    """Load a classifier of two classes; return it, and the names of its new weights."""
    return load_model(
        directory,
        AutoModelForSequenceClassification,
        {"num_labels": 2},
        dtype=torch.float32,
        zero3=Layout(3).section | {"train_micro_batch_size_per_gpu": 1} if stage == 3 else None,
        seed=seed,
        new_weights_allowed=new_weights_allowed,
    )


def load(directory: Path, stage: int, seed: int = 0, new_weights_allowed: bool = False, gather: bool = True) -> Any:
    """Load, and return every parameter (where asked for), the buffers, and the new ones; or what was refused."""
    import deepspeed

    try:
        model, new = build(directory, stage, seed, new_weights_allowed)
    except UserError as error:
        return str(error)
    found = {}
    for name, parameter in model.named_parameters() if gather else ():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found, dict(model.named_buffers()), new


@by_world
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("file_size", ["5GB", "3KB"])
def test_a_loaded_model_is_what_the_files_hold(
    world: Worlds, directory: Path, tmp_path: Path, stage: int, file_size: str, size: int
) -> None:
    plain = plain_model(directory)
    plain.save_pretrained(tmp_path, max_shard_size=file_size)
    ranks = world(size).run(load, tmp_path, stage)
    # Below ZeRO-3 rank 0 reads, and the engine broadcasts later.
    for found, buffers, new in ranks if stage == 3 else ranks[:1]:
        assert new == []
        assert found.keys() == dict(plain.named_parameters()).keys()
        assert all(torch.equal(found[name], parameter) for name, parameter in plain.named_parameters())
        assert all(torch.equal(buffers[name], buffer) for name, buffer in plain.named_buffers())


@pytest.mark.parametrize("size", [1, 2])
def test_a_new_head_depends_on_the_seed_alone(world: Worlds, directory: Path, tmp_path: Path, size: int) -> None:
    plain_model(directory).bert.save_pretrained(tmp_path)
    heads = []
    for stage in (0, 3):
        for seed in (1, 2):
            found, _, new = world(size).run(load, tmp_path, stage, seed, True)[0]
            assert new == ["classifier.weight", "classifier.bias"]
            assert not found["classifier.bias"].any()
            heads.append(found["classifier.weight"])
    first, second, first_sharded, second_sharded = heads
    assert torch.equal(first, first_sharded)
    assert torch.equal(second, second_sharded)
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.3, rel=0.5), "the model's own initialisation"
    again, _, _ = world(3 - size).run(load, tmp_path, 3, 1, True)[0]
    assert torch.equal(again["classifier.weight"], first), "the same at another world size"


def edited(directory: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a model directory with its weights changed."""
    plain_model(directory).save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


LAYER = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({LAYER: torch.zeros(2, 3)}), f"{LAYER} has shape [2, 3]"),
        (lambda t: t[LAYER].view(-1)[5].fill_(torch.nan), f"{LAYER} in "),
        (lambda t: t.pop(LAYER), "lacks weights of"),
        (lambda t: [t.pop(name) for name in list(t)], "no weight in"),
    ],
    ids=["shape", "nan", "missing", "empty"],
)
@pytest.mark.parametrize("stage", [0, 3])
def test_broken_weights_are_refused_on_every_rank_with_the_same_sentence(
    world: Worlds, directory: Path, tmp_path: Path, change: Callable[..., None], message: str, stage: int
) -> None:
    broken = edited(directory, tmp_path / "broken", change)
    for new_allowed in (True, False):
        said = world(2).run(load, broken, stage, 0, new_allowed)
        assert len(set(said)) == 1
        assert message in said[0]


def load_tied(directory: Path, stage: int) -> Any:
    """Load a model whose embeddings have three names, and return them."""
    import deepspeed

    model, new = build(directory, stage)
    shared = model.model.shared.weight
    assert model.model.encoder.embed_tokens.weight is shared
    assert model.model.decoder.embed_tokens.weight is shared
    with deepspeed.zero.GatheredParameters([shared]):
        return shared.detach().clone(), new


@pytest.mark.parametrize("stage", [0, 3])
def test_tied_weights_stay_tied_and_are_read_once(world: Worlds, tmp_path: Path, stage: int) -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    plain = BartForSequenceClassification(BartConfig(vocab_size=30, num_labels=2, **sizes, **layers))
    plain.save_pretrained(tmp_path)
    found, new = world(2).run(load_tied, tmp_path, stage)[0]
    assert new == []
    assert torch.equal(found, plain.model.shared.weight)


def device_of_buffers(directory: Path) -> set[str]:
    """Load at ZeRO-3 where the rank's device is another than the CPU; return where the buffers are then."""
    real = dist.detect()
    with patch.object(dist.World, "device", torch.device("meta")):
        assert dist.detect() == real
        model, _ = build(directory, 3)
    return {buffer.device.type for buffer in model.buffers()}


def test_buffers_of_a_sharded_model_are_on_the_device(world: Worlds, directory: Path) -> None:
    assert world(1).run(device_of_buffers, directory) == [{"meta"}]


def test_new_weights_are_refused_in_a_teacher(world: Worlds, directory: Path, tmp_path: Path) -> None:
    plain_model(directory).bert.save_pretrained(tmp_path)
    assert "lacks weights of a BertForSequenceClassification: classifier" in world(2).run(load, tmp_path, 3)[1]


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


@by_world
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
        assert sum(counts[name][0] for name in target_weights(model)) == masked
        assert model(torch.tensor([[2, 5, 3]])).logits.isfinite().all()


def export_in_parts(directory: Path, target: Path) -> None:
    from distprune import export as module

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


def growth_while_loading(directory: Path) -> int:
    """Return the bytes by which this process had grown at its peak, while it loaded a model at ZeRO-3."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    found = load(directory, 3, gather=False)
    assert not isinstance(found, str), found
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


@pytest.mark.slow
def test_no_rank_holds_a_whole_model_while_it_loads_shards(world: Worlds, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 2048, "num_attention_heads": 8}
    plain_model(write_model(tmp_path / "once", **sizes)).save_pretrained(tmp_path / "parts", max_shard_size="20MB")
    files = [file.stat().st_size for file in (tmp_path / "parts").glob("*.safetensors")]
    assert len(files) > 5
    for rank, growth in enumerate(world(4).run(growth_while_loading, tmp_path / "parts")):
        part = growth / sum(files)
        assert 0.2 < part < 0.6, f"rank {rank} grew by {part:.0%} of the model; a quarter is its own"


def grow(directory: Path, student_stage: int, teacher_stage: int) -> list[tuple[int, int]]:
    """Train a student beside a teacher; return live tensors and resident bytes after 20, 40 and 60 steps."""
    section = {"zero_optimization": {"stage": teacher_stage, "stage3_param_persistence_threshold": 0}}
    teacher = build_frozen(section, directory, AutoModelForSequenceClassification, {"num_labels": 2}, 4)
    student = Student(directory, Layout(student_stage))
    seen = []
    for step in range(60):
        batch = rows(random_batch(step), student.rank, student.world)
        with torch.no_grad():
            target = forward(teacher, batch)
        student.engine.backward(distillation_loss(forward(student.engine, batch), target, 5.5))
        if step % 10 == 0:
            student.pruner.prune(Fraction(step, 100))
        student.pruner.mask_gradients()
        student.engine.step()
        if step % 20 == 19:
            gc.collect()
            tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
            seen.append((tensors, psutil.Process().memory_info().rss))
    student.close()
    teacher.destroy()
    return seen


@pytest.mark.parametrize(("student", "teacher"), [(2, 3), (3, 3), (0, 0)])
def test_memory_stays_flat_with_two_engines(world: Worlds, tmp_path: Path, student: int, teacher: int) -> None:
    model = write_model(tmp_path / "model", hidden_size=64, intermediate_size=256)
    size = (model / "model.safetensors").stat().st_size
    for (first, _), (second, resident), (third, last) in world(2).run(grow, model, student, teacher):
        assert first == second == third, "a tensor is kept at every step"
        assert last - resident < 10 * size, "20 steps kept the memory of more than half a model each"


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
    (message,) = world(1).run(refused_version, directory)
    assert "is not known to distprune; allowed: >=0.1,<0.2" in message
    (message,) = world(1).run(refused_wrapper, directory)
    assert "DeepSpeed wrapped the optimizer in object" in message
