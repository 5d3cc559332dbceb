"""Packed models: every bit comes back, and the bytes are what they are said to be."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from distprune.commands import export, oneshot
from distprune.errors import UserError
from distprune.models.export import count_zeros
from distprune.models.files import ModelFiles
from distprune.models.packed import pack, unpack
from tests.distributed.engines import write_model

VALUES = [0.0, -0.0, 1.0, -2.5, float("inf"), float("nan"), 1e-40]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(st.lists(st.sampled_from(VALUES), max_size=50), st.sampled_from(DTYPES))
def test_every_bit_comes_back(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=dtype).view(-1, 1)
    mask, kept = pack(tensor)
    assert mask.numel() == -(-len(values) // 8)
    assert kept.numel() == sum(not (value == 0 and str(value) == "0.0") for value in tensor.flatten().tolist())
    again = unpack(mask, kept, list(tensor.shape))
    assert again.dtype == dtype
    assert (
        again.numpy(force=True).tobytes() == tensor.numpy().tobytes()
        if dtype != torch.bfloat16
        else torch.equal(again.view(torch.int16), tensor.view(torch.int16))
    )


def test_a_sparse_model_is_smaller_packed_and_the_same_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "dense", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    oneshot.run(str(model), str(tmp_path / "sparse"), None, ["pruning.sparsity=0.9"])
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse").save_pretrained(
        tmp_path / "sharded", max_shard_size="60KB"
    )
    card = "---\ntags: [pruned]\n---\n\n# A model\n\ntransformers alone loads it.\n"
    (tmp_path / "sparse" / "README.md").write_text(card)
    capsys.readouterr()
    for kind in ("sparse", "sharded"):
        source, packed, again = tmp_path / kind, tmp_path / f"{kind}-packed", tmp_path / f"{kind}-again"
        export.run(str(source), str(packed), False)
        before, after = (sum(file.stat().st_size for file in d.glob("*.safetensors")) for d in (source, packed))
        assert after < before
        tensors = {file: load_file(file) for file in packed.glob("*.safetensors")}
        held = sum(tensor.nbytes for each in tensors.values() for tensor in each.values())
        assert held == sum(each.packed_bytes for each in count_zeros(source).values())
        assert f"packed {before:,} bytes into {after:,}" in capsys.readouterr().out
        if kind == "sparse":
            assert "\n---\n\n**Packed**: what follows holds once" in (packed / "README.md").read_text()
        export.run(str(packed), str(again), False)
        assert not (again / "README.md").exists() or (again / "README.md").read_text() == card
        assert "unpacked" in capsys.readouterr().out
        files = sorted(path.name for path in source.iterdir())
        assert files == sorted(path.name for path in again.iterdir())
        assert len(list(again.glob("*.safetensors"))) == (
            1 if kind == "sparse" else len(list(source.glob("*.safetensors")))
        )
        for file in source.glob("*.safetensors"):
            first, second = load_file(file), load_file(again / file.name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
        AutoModelForSequenceClassification.from_pretrained(again)


def test_a_matrix_takes_a_bit_a_weight_and_its_values(tmp_path: Path) -> None:
    source, weight = tmp_path / "model", torch.zeros(1000, 80)
    weight[:10] = 1.0
    source.mkdir()
    save_file({"weight": weight, "dense": torch.ones(10)}, source / "model.safetensors")
    export.run(str(source), str(tmp_path / "packed"), False)
    tensors = load_file(tmp_path / "packed" / "packed-model.safetensors")
    assert {name: each.nbytes for name, each in tensors.items()} == {
        "weight.mask": 1000 * 80 // 8,
        "weight.values": 4 * 800,
        "dense": 40,
    }


def test_a_packed_directory_is_no_models(tmp_path: Path) -> None:
    (tmp_path / "packed-model.safetensors").touch()
    with pytest.raises(UserError, match="holds a packed model; allowed: the directory that distprune export makes"):
        ModelFiles(tmp_path)


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match=r"holds no model\*\.safetensors"):
        export.run(str(tmp_path), str(tmp_path / "out"), False)
    model = write_model(tmp_path / "dense")
    with pytest.raises(UserError, match="exists"):
        export.run(str(model), str(model), False)
    save_file({"weight": torch.ones(3)}, tmp_path / "packed-model.safetensors")
    with pytest.raises(UserError, match="is not of the format distprune-packed"):
        export.run(str(tmp_path), "out", False)
    (tmp_path / "packed-model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"packed-model\.safetensors cannot be read as safetensors"):
        export.run(str(tmp_path), "out", False)
    assert not list(Path().glob("out*")), "nor is anything left over"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is no checkpoint, and 2 ranks were started; allowed: one of them"):
        export.run(str(model), "out", False)
