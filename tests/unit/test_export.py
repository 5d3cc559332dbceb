"""Counting what was written; the export itself needs engines and is tested in tests/distributed."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from distprune.models.export import count_zeros


def test_zeros_of_every_tensor_are_counted_negative_ones_too(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.tensor([[0.0, -0.0, 1.0], [2.0**-149, 0.0, -3.0]]),
        "half": torch.zeros(4, dtype=torch.bfloat16),
        "dense": torch.ones(5),
        "scalar": torch.tensor(0.0),
        "none": torch.empty(0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    counts = {"matrix": (3, 6), "half": (4, 4), "dense": (0, 5), "scalar": (1, 1), "none": (0, 0)}
    assert count_zeros(tmp_path) == counts


def test_all_files_of_the_model_are_counted_and_no_other(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(number)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    save_file({"adapter": torch.zeros(9)}, tmp_path / "adapter_model.safetensors")
    assert count_zeros(tmp_path) == {"w1": (1, 1), "w2": (2, 2)}


def test_a_directory_without_weights_has_none(tmp_path: Path) -> None:
    assert count_zeros(tmp_path) == {}
