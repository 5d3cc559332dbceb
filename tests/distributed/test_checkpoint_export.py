"""The model in a checkpoint, written on any number of ranks, is the one that the run itself wrote."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distprune.commands import eval as evaluate
from distprune.commands import export, oneshot
from distprune.errors import UserError
from distprune.models.from_checkpoint import export_checkpoint
from distprune.models.packed import unpack_directory
from tests.distributed.runs import run, run_command, stage
from tests.world import Worlds

BF16 = ("deepspeed.student.bf16.enabled=true", "model.freeze=[embeddings]")


def exported(checkpoint: Path, target: Path, packed: bool) -> dict[str, int] | str:
    """Export in files of a few kilobytes; return the sizes, or what was refused. Collective."""
    try:
        with patch("distprune.models.export._FILE_SIZE", "9KB"):
            return export_checkpoint(checkpoint, target, packed)
    except UserError as error:
        return str(error)


def tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("model*.safetensors"):
        found |= load_file(file)
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.fixture(scope="module")
def trained(world: Worlds, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives a finished run of a stage, in bf16 with frozen embeddings."""
    root = tmp_path_factory.mktemp("trained")

    def of(student: int) -> Path:
        output = root / f"stage{student}"
        if not output.exists():
            world(2).run(run, task, output, *stage(student), *BF16)
        return output

    return of


CASES = [(2, 2), pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow), (3, 1)]


@pytest.mark.parametrize(("student", "size"), CASES)
def test_an_exported_checkpoint_is_the_final_model(
    world: Worlds, tmp_path: Path, trained: Any, student: int, size: int
) -> None:
    output = trained(student)
    latest, target = output / "checkpoints" / "latest", tmp_path / "model"
    sizes = world(size).run(exported, latest, target, False)
    assert len(set(map(str, sizes))) == 1
    expected = tensors(output / "final")
    assert same(tensors(target), expected)
    assert len(list(target.glob("model*.safetensors"))) == 3
    assert sizes[0]["tensors"] == sum(tensor.nbytes for tensor in expected.values())
    record, final = (json.loads((path / "pruning.json").read_text()) for path in (target, output / "final"))
    assert {key: record[key] for key in ("layers", "pruning", "distillation")}.items() <= final.items()
    assert record["masked_weights"] == final["masked_weights"]
    model = AutoModelForSequenceClassification.from_pretrained(target)
    assert model.config.num_labels == 2
    assert len(AutoTokenizer.from_pretrained(target)) == model.config.vocab_size


def test_a_packed_checkpoint_is_the_same_model(world: Worlds, tmp_path: Path, trained: Any) -> None:
    output = trained(2)
    sizes = world(2).run(exported, output / "checkpoints" / "latest", tmp_path / "packed", True)
    assert sizes[0]["files"] == sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    unpack_directory(tmp_path / "packed", tmp_path / "model")
    assert same(tensors(tmp_path / "model"), tensors(output / "final"))
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")  # by the index of its three files


def test_a_damaged_checkpoint_is_not_exported(world: Worlds, tmp_path: Path, trained: Any) -> None:
    checkpoint = trained(2) / "checkpoints" / "step-00000016"
    file = next(checkpoint.glob("rank-00001*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = world(2).run(exported, checkpoint, tmp_path / "model", False)
    assert set(said) == {f"checkpoint {checkpoint} is damaged: {file} has another checksum than it had"}
    assert not any(tmp_path.iterdir())


def refused_evaluation(checkpoint: Path, task: Path) -> str:
    """Return what `distprune eval` says of a checkpoint. Collective."""
    with pytest.raises(UserError) as error:
        evaluate.run(str(checkpoint), str(task / "run.yaml"), [])
    return str(error.value)


def test_the_model_that_is_named_is_measured_whatever_yaml_makes_of_its_name(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    names = ["model", "model #1", "a: b", "[c]", "d${model.path}"]
    directories = [shutil.copytree(task / "model", tmp_path / name) for name in names]
    file = directories[1] / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("layer.0.intermediate.dense.weight")]
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, {"format": "pt"})
    said = [world(1).run(run_command, "eval", each, task / "run.yaml")[0][1] for each in directories]
    lines = [json.loads(line) for each in said for line in each.splitlines() if line.startswith("{")]
    assert [line["model"] for line in lines] == [str(each) for each in directories]
    assert [line["encoder_zeros"] for line in lines] == [0, tensors[name].numel(), 0, 0, 0]


def test_a_checkpoint_is_no_model_directory_to_measure(world: Worlds, task: Path, trained: Any) -> None:
    (said,) = world(1).run(refused_evaluation, trained(2) / "checkpoints" / "latest", task)
    assert "is a checkpoint; allowed: a model directory, as distprune export makes" in said


def test_a_run_does_not_begin_with_a_checkpoint(world: Worlds, task: Path, tmp_path: Path, trained: Any) -> None:
    latest = trained(2) / "checkpoints" / "latest"
    for key in ("model", "teacher"):
        (said,) = world(1).run(run, task, tmp_path / "run", f"{key}.path={latest}", "distillation.hardness=0.5")
        assert said == f"{str(latest)!r} is a checkpoint; allowed: a model directory, as distprune export makes"


def test_a_link_that_a_run_moves_is_followed_once(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest, read = trained(3) / "checkpoints" / "latest", []

    def note(checkpoint: Path, *_: Any) -> dict[str, int]:
        read.append(checkpoint)
        return {"files": 1, "tensors": 1}

    monkeypatch.setattr(export, "export_checkpoint", note)
    export.run(str(latest), str(tmp_path / "model"))
    assert latest.is_symlink()
    assert read == [latest.resolve()]


def test_the_command_knows_a_checkpoint(tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    latest = str(trained(3) / "checkpoints" / "latest")
    export.run(latest, str(tmp_path / "model"))
    assert "in fp32) -> " in capsys.readouterr().out
    assert same(tensors(tmp_path / "model"), tensors(trained(3) / "final"))
    for call, said in (
        (lambda: export.run(latest, str(tmp_path / "model")), "exists; allowed: a new directory"),
        (lambda: export.run(latest, str(tmp_path / "small"), shrinking=True), "is a checkpoint; export it first"),
        (lambda: export.run(str(tmp_path / "model"), str(tmp_path / "x"), packing=True), "--packed is for checkpoints"),
        (
            lambda: oneshot.run(latest, str(tmp_path / "x"), None, ["pruning.sparsity=0.5"]),
            "is a checkpoint; allowed: a model directory",
        ),
    ):
        with pytest.raises(UserError, match=said):
            call()
