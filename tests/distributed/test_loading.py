"""Models from a directory into memory: every tensor once, cut up as it is read."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from distprune import dist
from distprune.errors import UserError
from distprune.models.weights import load_model
from tests.distributed.engines import (
    Layout,
    Student,
    plain_model,
    write_model,
)
from tests.world import Worlds, by_world


def build(directory: Path, stage: int, seed: int = 0, frozen: bool = True) -> Any:
    """Load a classifier of two classes; return it, and the names of its new weights."""
    return load_model(
        directory,
        AutoModelForSequenceClassification,
        {"num_labels": 2},
        dtype=torch.float32,
        zero3=Layout(3).section | {"train_micro_batch_size_per_gpu": 1} if stage == 3 else None,
        seed=seed,
        frozen=frozen,
    )


def load(directory: Path, stage: int, seed: int = 0, frozen: bool = True, gather: bool = True) -> Any:
    """Load, and return every parameter (where asked for), the buffers, and the new ones; or what was refused."""
    import deepspeed

    try:
        model, new = build(directory, stage, seed, frozen)
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
            found, _, new = world(size).run(load, tmp_path, stage, seed, False)[0]
            assert new == ["classifier.weight", "classifier.bias"]
            assert not found["classifier.bias"].any()
            heads.append(found["classifier.weight"])
    first, second, first_sharded, second_sharded = heads
    assert torch.equal(first, first_sharded)
    assert torch.equal(second, second_sharded)
    assert not torch.equal(first, second)
    assert float(first.std()) == pytest.approx(0.3, rel=0.5), "the model's own initialisation"
    again, _, _ = world(3 - size).run(load, tmp_path, 3, 1, False)[0]
    assert torch.equal(again["classifier.weight"], first), "the same at another world size"


def edited(directory: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Copy a model directory with its weights changed."""
    plain_model(directory).save_pretrained(target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


DECODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def load_decoder(directory: Path) -> Any:
    """Load a decoder, where a new head may be made; return its head, or what was refused."""
    try:
        model, _ = load_model(
            directory,
            AutoModelForCausalLM,
            {},
            dtype=torch.float32,
            zero3=None,
            seed=0,
            frozen=False,
        )
    except UserError as error:
        return str(error)
    return model.get_output_embeddings().weight.detach()


def test_a_decoders_head_is_none_that_may_be_new(world: Worlds, tmp_path: Path) -> None:
    """GPT-NeoX stores it under another name than transformers calls it by."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, **DECODER))
    model.save_pretrained(tmp_path)
    (head,) = world(1).run(load_decoder, tmp_path)
    assert torch.equal(head, model.get_output_embeddings().weight)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "embed_out" not in name}, tmp_path / "model.safetensors")
    (said,) = world(1).run(load_decoder, tmp_path)
    assert "lacks weights of the pretrained model: lm_head.weight" in said


LAYER = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({LAYER: torch.zeros(2, 3)}), f"{LAYER} has shape [2, 3]"),
        (lambda t: t[LAYER].view(-1)[5].fill_(torch.nan), f"{LAYER} in "),
        (lambda t: t.pop(LAYER), "lacks weights of"),
        (lambda t: [t.pop(name) for name in list(t)], "no weight in"),
        (
            lambda t: t.update({LAYER: (t[LAYER] * 100).to(torch.int8)}),
            "is in int8; allowed: weights in fp32, bf16, fp16 or fp64",
        ),
    ],
    ids=["shape", "nan", "missing", "empty", "integers"],
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


def test_a_quantized_model_is_refused(world: Worlds, directory: Path, tmp_path: Path) -> None:
    quantized = edited(directory, tmp_path / "quantized", lambda _: None)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (said,) = world(1).run(load, quantized, 0)
    assert "is a quantized model; allowed: weights in fp32, bf16, fp16 or fp64" in said


def keeps_keys_and_values(directory: Path) -> bool:
    model, _ = load_model(
        directory,
        AutoModelForSequenceClassification,
        {"num_labels": 2},
        dtype=torch.float32,
        zero3=None,
        seed=0,
        frozen=False,
    )
    return "past_key_values" in model(torch.arange(6)[None])


def test_keys_and_values_that_only_generation_reads_are_not_kept(world: Worlds, tmp_path: Path) -> None:
    LlamaModel(LlamaConfig(vocab_size=20, pad_token_id=0, **DECODER)).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert "past_key_values" in plain(torch.arange(6)[None]), "it is what the model would do"
    assert world(1).run(keeps_keys_and_values, tmp_path) == [False]


def test_tied_weights_that_are_stored_with_other_values_are_refused(world: Worlds, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=False, **DECODER))
    model.save_pretrained(tmp_path)
    (head,) = world(1).run(load_decoder, tmp_path)
    assert torch.equal(head, model.lm_head.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    said = world(2).run(load_decoder, tmp_path)
    assert len(set(said)) == 1
    assert "model.embed_tokens.weight and lm_head.weight" in said[0]
    assert "are one weight by its config.json" in said[0]


def student_of_its_node(root: Path) -> str:
    """Build a student of which each rank has a copy of its own."""
    with pytest.raises(UserError) as caught:
        Student(root / str(dist.detect().rank), Layout(2, "bf16"))
    return str(caught.value)


def test_nodes_with_other_copies_of_a_model_are_refused(world: Worlds, directory: Path, tmp_path: Path) -> None:
    for rank in range(2):
        edited(directory, tmp_path / str(rank), lambda t: t[LAYER].view(-1)[-1].add_(rank))  # noqa: B023
    said = world(2).run(student_of_its_node, tmp_path)
    assert len(set(said)) == 1
    assert f"{LAYER} in {tmp_path / '1'} is not what rank 0 has read there" in said[0]


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


class WithBuffer:
    """An auto class whose models carry a buffer that belongs to them."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> Any:
        model = AutoModelForSequenceClassification.from_config(config)
        model.bert.encoder.register_buffer("steps", torch.zeros(3))
        return model


def stored_buffer(directory: Path, stage: int) -> Tensor:
    zero3 = Layout(3).section | {"train_micro_batch_size_per_gpu": 1} if stage == 3 else None
    options = {"dtype": torch.float32, "zero3": zero3, "seed": 0, "frozen": True}
    model, _ = load_model(directory, WithBuffer, {"num_labels": 2}, **options)
    found: Tensor = model.bert.encoder.steps
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_every_rank_has_the_buffers_that_are_stored(world: Worlds, directory: Path, tmp_path: Path, stage: int) -> None:
    steps = torch.tensor([3.0, 1.0, 4.0])
    stored = edited(directory, tmp_path / "stored", lambda t: t.update({"bert.encoder.steps": steps}))
    assert all(torch.equal(found, steps) for found in world(2).run(stored_buffer, stored, stage))


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
