"""Pruning a model directory without training."""

import json
from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from distprune.commands import oneshot
from distprune.errors import UserError
from distprune.models import pruned
from tests.distributed.engines import reference_masks, write_model

EMBEDDING, OUTPUT = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
VOCABULARY = 64


def prune(source: Path, out: Path, *overrides: str) -> None:
    oneshot.run(str(source), str(out), None, list(overrides))


@pytest.mark.parametrize("levels", [None, 100])
@pytest.mark.parametrize("shard_size", ["5GB", "5KB"])
def test_the_smallest_weights_are_zero_and_nothing_else_changed(
    tmp_path: Path, levels: int | None, shard_size: str
) -> None:
    source, out = write_model(tmp_path / "dense", levels), tmp_path / "out"
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=shard_size)
    assert (len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1) == (shard_size == "5KB")
    prune(tmp_path / "sharded", out, "pruning.sparsity=0.29")
    dense = dict(model.named_parameters())
    targets = {n: p.detach().abs() for n, p in dense.items() if "encoder.layer" in n and p.dim() == 2}
    masks = reference_masks(targets, Fraction("0.29"))
    assert sum(int(mask.sum()) for mask in masks.values()) == floor(
        Fraction("0.29") * sum(p.numel() for p in targets.values())
    )
    pruned = dict(AutoModelForSequenceClassification.from_pretrained(out).named_parameters())
    for name, tensor in dense.items():
        mask = masks[name].view_as(tensor) if name in masks else torch.zeros_like(tensor, dtype=torch.bool)
        assert torch.equal(pruned[name], tensor.masked_fill(mask, 0.0)), name


def test_stored_precision_is_kept(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "dense")).bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    prune(tmp_path / "bf16", tmp_path / "out", "pruning.sparsity=0.5")
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("pruning.sparsity=-0.1", r"pruning.sparsity is -0.1; allowed: at least 0 and less than 1"),
        ("pruning.sparsity=1.0", r"pruning.sparsity is 1.0; allowed: at least 0 and less than 1"),
        ("pruning.sparsity=0.0001 pruning.structure=heads", r"pruning.sparsity is 0.0001, less than one unit of heads"),
        ("", r"pruning.sparsity is 0.0; allowed without training: more than 0"),
        ("pruning.sparsity=0.5 pruning.weights_of=m", r"pruning.weights_of is 'm'; allowed without training: null"),
        ("pruning.sparsity=0.5 pruning.scope=heads", r"pruning.scope is 'heads'; allowed: global, layer, tensor"),
    ],
)
def test_what_cannot_be_pruned_so_is_refused(tmp_path: Path, overrides: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        prune(write_model(tmp_path / "dense"), tmp_path / "out", *overrides.split())


def test_what_is_said_of_the_dense_model_is_left_behind(tmp_path: Path) -> None:
    source = write_model(tmp_path / "dense")
    for name in ("README.md", "pruning.json", "pytorch_model.bin"):
        (source / name).write_text("dense")
    prune(source, tmp_path / "out", "pruning.sparsity=0.5")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "pruning.json"} <= names
    assert not {"README.md", "pytorch_model.bin"} & names
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["pruning"]["sparsity"] == 0.5
    assert record["sparsity_masked"] == record["masked_weights"] / record["prunable_weights"]


def test_regexes_find_the_names_that_a_run_finds(tmp_path: Path) -> None:
    source = write_model(tmp_path / "dense")
    patterns = (r"pruning.include=['^bert\.encoder.*query\.weight$']", "pruning.exclude=[classifier]")
    prune(source, tmp_path / "out", "pruning.sparsity=0.5", *patterns)
    zeros = {name: int((each == 0).sum()) for name, each in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert sum(zeros.values()) == 100
    assert all("query" in name for name, number in zeros.items() if number)


def test_groups_are_of_the_names_that_a_run_finds(tmp_path: Path) -> None:
    """Files of the bare model lack its prefix."""
    source, groups = write_model(tmp_path / "dense"), "pruning.groups=['^bert.encoder.layer.0','layer']"
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("bert."): each for name, each in tensors.items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    prune(source, tmp_path / "out", "pruning.sparsity=0.5", "pruning.scope=groups", groups)
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert pruned.keys() == bare.keys()
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        found = torch.cat(
            [each.flatten() for name, each in pruned.items() if name.startswith(layer) and each.dim() > 1]
        )
        assert int((found == 0).sum()) == found.numel() // 2


@pytest.mark.parametrize("stored", [[EMBEDDING], [OUTPUT], [EMBEDDING, OUTPUT]])
def test_a_tied_weight_is_pruned_under_the_name_that_it_has(tmp_path: Path, stored: list[str]) -> None:
    source, out = write_tied(tmp_path / "dense", stored), tmp_path / "out"
    overrides = ("pruning.sparsity=0.5", "pruning.components=[token_embedding]")
    if len(stored) > 1:
        with pytest.raises(UserError, match=f"{EMBEDDING} is to be pruned, and is also stored as {OUTPUT} in .*once"):
            prune(source, out, *overrides)
        return
    prune(source, out, *overrides)
    assert (load_file(out / "model.safetensors")[stored[0]] == 0).sum() == VOCABULARY * 8 // 2


def write_tied(directory: Path, stored: list[str]) -> Path:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    BertForMaskedLM(config).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors.pop(EMBEDDING)
    copies = {name: torch.where(embedding == 0, 1e-3, embedding) for name in stored}
    save_file(tensors | copies, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_copy_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source, out = write_model(tmp_path / "dense"), tmp_path / "out"
    for module, name in ((pruned, "save"), (oneshot, "write_json")):
        monkeypatch.setattr(module, name, full)
        with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
            prune(source, out, "pruning.sparsity=0.5")
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
        monkeypatch.undo()
    prune(source, out, "pruning.sparsity=0.5")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["dense", "out"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """And nothing removed: what has the name of an unfinished copy may be the model itself."""
    source = write_model(tmp_path / "dense.partial")
    before = sorted(path.name for path in source.iterdir())
    for out, message in (
        (source, "'.*dense.partial' exists; allowed: a new directory"),
        (Path(), "'.' exists; allowed: a new directory"),
        (
            tmp_path / "dense",
            "'.*dense.partial' exists, as a command that runs or was cut off leaves it; allowed: another",
        ),
        (source / "in" / "out", "is within '.*dense.partial', of which it is made; allowed: outside of it"),
    ):
        with pytest.raises(UserError, match=message):
            prune(source, out, "pruning.sparsity=0.5")
    assert sorted(path.name for path in source.iterdir()) == before


def test_what_is_frozen_is_not_to_be_pruned(tmp_path: Path) -> None:
    source = write_model(tmp_path / "dense")
    with pytest.raises(UserError, match=r"is to be pruned, but model\.freeze keeps it fixed"):
        prune(source, tmp_path / "out", "pruning.sparsity=0.5", "model.freeze=[encoder]")


@pytest.mark.parametrize("start_sparse", [False, True])
def test_zeros_of_a_sparse_model_stay_where_that_is_asked_for(tmp_path: Path, start_sparse: bool) -> None:
    source = write_model(tmp_path / "dense")
    prune(source, tmp_path / "first", "pruning.sparsity=0.3")
    again = ("pruning.score=random", f"pruning.start_sparse={str(start_sparse).lower()}")
    prune(tmp_path / "first", tmp_path / "second", "pruning.sparsity=0.5", *again)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    names = [name for name in first if "encoder.layer" in name and first[name].dim() == 2]
    zeros = sum(int((second[name] == 0).sum()) for name in names)
    wanted = sum(second[name].numel() for name in names) // 2
    assert zeros == wanted if start_sparse else zeros > wanted, "a random mask falls on other weights"
    prune(tmp_path / "first", tmp_path / "third", "pruning.sparsity=0.1", *again)
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert all(torch.equal(third[name], first[name]) for name in names) == start_sparse
