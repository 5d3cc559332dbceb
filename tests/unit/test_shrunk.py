"""Models without their zero heads and neurons give the same outputs, and are as small as they should be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForSequenceClassification,
)

from distprune.commands import export, oneshot
from distprune.errors import UserError
from distprune.models.files import ModelFiles
from distprune.models.shrunk import load_shrunk, shrink
from tests.distributed.engines import write_model

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
IDS = torch.arange(4, 40).view(2, 18)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def test_heads_and_neurons_that_were_pruned_are_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = write_model(tmp_path / "dense", **SHAPE)
    oneshot.run(str(dense), str(tmp_path / "heads"), None, ["pruning.sparsity=0.5", "pruning.structure=heads"])
    oneshot.run(
        str(tmp_path / "heads"), str(tmp_path / "both"), None, ["pruning.sparsity=0.75", "pruning.structure=neurons"]
    )
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "both")
    export.run(str(tmp_path / "both"), str(tmp_path / "small"), True)
    said = capsys.readouterr().out
    assert "took out 4 of 8 heads, 36 of 48 neurons" in said
    with pytest.raises(UserError, match="holds a shrunk model, which distprune eval alone takes; allowed: the"):
        ModelFiles(tmp_path / "small")
    small = load_shrunk(str(tmp_path / "small"))
    folder, file = (tmp_path / "small" / name for name in (".", "model.safetensors"))
    assert file.stat().st_mode & 0o444 == folder.stat().st_mode & 0o444, "who reads the folder reads the weights"
    torch.testing.assert_close(outputs(small), outputs(whole), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(whole), outputs(AutoModelForSequenceClassification.from_pretrained(dense)))
    rows = [small.get_parameter(f"bert.encoder.layer.{n}.attention.self.query.weight").shape[0] for n in (0, 1)]
    assert sum(rows) == 4 * 4
    columns = [small.get_parameter(f"bert.encoder.layer.{n}.output.dense.weight").shape[1] for n in (0, 1)]
    assert sum(columns) == 12
    before, after = (sum(each.nbytes for each in model.parameters()) for model in (whole, small))
    assert f"{before:,} bytes of weights before, {after:,} after" in said
    # What went: 4 rows of 16 with a bias in each of three matrices and 4 columns of 16, a head; 16 + 1 + 16, a neuron.
    assert before - after == 4 * (4 * (3 * 4 * 17 + 4 * 16) + 36 * 33)


def test_a_dense_model_stays_whole_and_an_empty_layer_keeps_one(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "dense", **SHAPE))
    before = outputs(model)
    assert shrink(model, 4).heads == 0
    assert torch.equal(outputs(model), before)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.dense.weight.zero_()
        layer.output.dense.weight.zero_()
    before = outputs(model)
    removed = shrink(model, 4)
    assert (removed.heads, removed.neurons) == (3, 23)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["distilbert", "mpnet"])
def test_other_architectures(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "distilbert":
        config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=4)
        model: PreTrainedModel = DistilBertForSequenceClassification(config)
        head, neuron = "attention.out_lin", "ffn.lin2"
        layer = model.distilbert.transformer.layer[0]
    else:
        model = MPNetForSequenceClassification(MPNetConfig(vocab_size=50, num_hidden_layers=2, **SHAPE))
        head, neuron = "attention.attn.o", "output.dense"
        layer = model.mpnet.encoder.layer[0]
    with torch.no_grad():
        layer.get_submodule(head).weight[:, 4:8] = 0.0
        layer.get_submodule(neuron).weight[:, 3] = 0.0
    before = outputs(model)
    removed = shrink(model, 4)
    assert (removed.heads, removed.neurons) == (1 if kind == "distilbert" else 0, 1)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForMultipleChoice])
def test_other_tasks(tmp_path: Path, kind: Any) -> None:
    """Tied weights are in the file once, and choices have an axis of their own."""
    classifier = write_model(tmp_path / "classifier", **SHAPE)
    model = kind.from_pretrained(classifier, ignore_mismatched_sizes=True)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :5] = 0.0
    model.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path / "whole")
    export.run(str(tmp_path / "whole"), str(tmp_path / "small"), True)
    small = load_shrunk(tmp_path / "small", kind)
    ids = IDS if kind is AutoModelForMaskedLM else IDS[:, None]
    with torch.no_grad():
        expected, found = (each.eval()(input_ids=ids).logits for each in (model, small))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert small.get_parameter("bert.encoder.layer.0.output.dense.weight").shape == (16, 19)
    assert not (tmp_path / "small.partial").exists()


def test_a_shrunk_model_without_a_weight_is_refused(tmp_path: Path) -> None:
    export.run(str(write_model(tmp_path / "dense", **SHAPE)), str(tmp_path / "small"), True)
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lacks weights, or has others .*encoder\.layer\.0\.output\.dense\.weight"):
        load_shrunk(tmp_path / "small", AutoModelForSequenceClassification)


def test_sizes_of_another_model_are_refused(tmp_path: Path) -> None:
    export.run(str(write_model(tmp_path / "dense", **SHAPE)), str(tmp_path / "small"), True)
    with pytest.raises(UserError, match=r"shrunk\.json has the sizes of another model than a BertForQuestionAnswering"):
        load_shrunk(tmp_path / "small", AutoModelForQuestionAnswering)


def test_a_model_in_bf16_stays_one(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "dense", **SHAPE))
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, :4] = 0.0
    model.bfloat16().save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "whole")
    export.run(str(tmp_path / "whole"), str(tmp_path / "small"), True)
    small = load_shrunk(tmp_path / "small", AutoModelForSequenceClassification)
    assert {each.dtype for each in small.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(small.float()), outputs(model.float()), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_shrunk_leaves_nothing(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", **SHAPE)
    export.run(str(dense), str(tmp_path / "packed"))
    export.run(str(dense), str(tmp_path / "small"), True)
    decoder = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    GPT2LMHeadModel(decoder).save_pretrained(tmp_path / "decoder")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "decoder")
    for name, said in (
        ("packed", "holds a packed model"),
        ("small", "holds a shrunk model"),
        ("decoder", "has no heads and neurons that --shrink knows"),
    ):
        with pytest.raises(UserError, match=said):
            export.run(str(tmp_path / name), str(tmp_path / "out"), True)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors, _: tensors.pop("bert.encoder.layer.0.attention.self.query.weight"), "lacks weights of a Bert"),
        (lambda _, config: config.update(num_hidden_layers=3), "lacks weights of a Bert"),
        (lambda _, config: config.update(architectures=None), "has more than the weights of a BertModel: classifier"),
        (lambda _, config: config.update(intermediate_size=20), "cannot be loaded by AutoModelForSequenceClassif"),
        (lambda tensors, _: tensors["classifier.weight"].fill_(float("nan")), "are not finite; allowed: finite"),
    ],
)
def test_a_model_is_shrunk_with_all_of_its_own_weights_or_not_at_all(tmp_path: Path, damage: Any, said: str) -> None:
    dense = write_model(tmp_path / "dense", **SHAPE)
    tensors, config = load_file(dense / "model.safetensors"), json.loads((dense / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        export.run(str(dense), str(tmp_path / "small"), True)
    assert not list(tmp_path.glob("small*"))


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", **SHAPE)
    with pytest.raises(UserError, match="exists"):
        export.run(str(dense), str(dense), True)
    with pytest.raises(UserError, match=r"holds no shrunk\.json"):
        load_shrunk(dense, AutoModelForSequenceClassification)


def save(model: PreTrainedModel, directory: Path) -> str:
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(write_model(directory.with_name("tokenizer"))).save_pretrained(directory)
    return str(directory)


def test_neurons_go_where_heads_are_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DebertaV2Config(vocab_size=50, num_hidden_layers=1, **SHAPE)
    model = DebertaV2ForSequenceClassification(config)
    with torch.no_grad():
        model.deberta.encoder.layer[0].output.dense.weight[:, :5] = 0.0
    export.run(save(model, tmp_path / "whole"), str(tmp_path / "small"), True)
    assert "took out 0 of 0 heads, 5 of 24 neurons" in capsys.readouterr().out


def test_heads_that_transformers_needs_are_said_to_stay(tmp_path: Path) -> None:
    model = RoFormerForSequenceClassification(RoFormerConfig(vocab_size=50, num_hidden_layers=1, **SHAPE))
    with torch.no_grad():
        model.roformer.encoder.layer[0].attention.output.dense.weight[:, :4] = 0.0
    with pytest.raises(UserError, match="transformers cannot run a RoFormerForSequenceClassification with fewer heads"):
        export.run(save(model, tmp_path / "whole"), str(tmp_path / "small"), True)
    assert not list(tmp_path.glob("small*"))
