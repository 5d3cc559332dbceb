"""Files of tensors and what is counted in them; the export itself needs engines and is tested in tests/distributed."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distprune.disk import save
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
    counts = {"matrix": (3, 6, 24), "half": (4, 4, 8), "dense": (0, 5, 20), "scalar": (1, 1, 4), "none": (0, 0, 0)}
    assert count_zeros(tmp_path) == counts


def test_all_files_of_the_model_are_counted_and_no_other(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": torch.zeros(number)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    save_file({"adapter": torch.zeros(9)}, tmp_path / "adapter_model.safetensors")
    assert count_zeros(tmp_path) == {"w1": (1, 1, 4), "w2": (2, 2, 8)}


def test_a_directory_without_weights_has_none(tmp_path: Path) -> None:
    assert count_zeros(tmp_path) == {}


@pytest.mark.parametrize("allowed", [0o755, 0o770, 0o700])
def test_tensors_are_readable_by_whom_their_folder_lets_in(tmp_path: Path, allowed: int) -> None:
    tmp_path.chmod(allowed)
    save({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == allowed & 0o666
    with safe_open(tmp_path / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert reader.get_tensor("w").tolist() == [1, 1]
