"""Pruning a model directory without training."""

from fractions import Fraction
from math import floor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from distprune.commands import oneshot
from distprune.errors import UserError
from tests.distributed.engines import reference_masks, write_model


@pytest.mark.parametrize("levels", [None, 100])
@pytest.mark.parametrize("shard_size", ["5GB", "5KB"])
def test_the_smallest_weights_are_zero_and_nothing_else_changed(
    tmp_path: Path, levels: int | None, shard_size: str
) -> None:
    source, out = write_model(tmp_path / "dense", levels), tmp_path / "out"
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size=shard_size)
    assert (len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1) == (shard_size == "5KB")
    oneshot.run(str(tmp_path / "sharded"), str(out), 0.29, [], [])
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
    oneshot.run(str(tmp_path / "bf16"), str(tmp_path / "out"), 0.5, [], [])
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "out" / "model.safetensors").values())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_an_impossible_sparsity_is_refused(tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(UserError, match="allowed"):
        oneshot.run(str(tmp_path), str(tmp_path / "out"), sparsity, [], [])


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = write_model(tmp_path / "dense")
    with pytest.raises(UserError, match="exists"):
        oneshot.run(str(source), str(source), 0.5, [], [])
