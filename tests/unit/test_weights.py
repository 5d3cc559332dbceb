"""Names, files and refusals; loading itself needs ranks and is tested in tests/distributed."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    EsmConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

from distprune.errors import UserError
from distprune.models import files
from distprune.models.files import ModelFiles, load_tokenizer, match_names, resolve
from distprune.models.weights import check_dropout, most_tokens, set_dropout, skeleton, stored_names

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}


def test_a_tied_weight_has_several_names_in_files_and_its_own_first(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own, other = "transformer.wte.weight", "lm_head.weight"
    for stored in ([own], [other], [own, other]):
        rest = {name: tensor for name, tensor in tensors.items() if name != own}
        save_file(rest | {name: tensors[own].clone() for name in stored}, tmp_path / "model.safetensors")
        found = stored_names(*skeleton(tmp_path, AutoModelForCausalLM, {}))
        assert (found[own], found[other]) == (stored, stored[::-1])


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shard(directory: Path) -> dict[str, torch.Tensor]:
    """Split the weights over two files with an index; return them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name, place in weight_map.items() if place == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ match_names

BASE = ["embeddings.weight", "encoder.layer.0.weight", "norm.bias"]
HEADED = [f"bert.{name}" for name in BASE] + ["classifier.weight"]


def test_names_are_paired_with_and_without_the_base_models_prefix() -> None:
    same = {name: name for name in HEADED}
    assert match_names(HEADED, HEADED, "bert") == same
    assert match_names(HEADED, BASE, "bert") == {f"bert.{name}": name for name in BASE}
    assert match_names(BASE, HEADED, "bert") == {name: f"bert.{name}" for name in BASE}
    assert match_names(BASE, BASE, "bert") == {name: name for name in BASE}


def test_old_names_of_norms_are_understood() -> None:
    wanted = ["bert.LayerNorm.weight", "bert.LayerNorm.bias", "bert.gamma_net.weight"]
    stored = ["bert.LayerNorm.gamma", "bert.LayerNorm.beta", "bert.gamma_net.weight"]
    assert match_names(wanted, stored, "bert") == dict(zip(wanted, stored, strict=True))


def test_only_a_whole_leading_prefix_is_dropped() -> None:
    assert match_names(["bert.x"], ["bertha.x", "a.bert.x"], "bert") == {}
    assert match_names(["x", "y"], ["y", "z"], "bert") == {"y": "y"}


@given(st.lists(st.sampled_from(BASE + HEADED), unique=True), st.lists(st.sampled_from(BASE), unique=True))
def test_pairs_are_of_what_is_wanted_and_there(wanted: list[str], available: list[str]) -> None:
    pairs = match_names(wanted, available, "bert")
    assert set(pairs) == {name for name in wanted if name.removeprefix("bert.") in available}
    assert all(stored == name.removeprefix("bert.") for name, stored in pairs.items())


# ------------------------------------------------------------------------------------------------- ModelFiles


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)], ids=str)
def test_a_part_of_a_tensor_is_read_by_its_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = torch.arange(12.0)
    save_file({"w": whole.view(shape)}, tmp_path / "model.safetensors")
    model = ModelFiles(tmp_path)
    for start in range(13):
        for end in range(start, 13):
            assert torch.equal(model.part("w", start, end), whole[start:end])


def test_a_checkpoint_of_one_file_gives_its_tensors(model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    checkpoint = ModelFiles(model_dir)
    assert set(checkpoint.file_of) == set(tensors)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_checkpoint_of_many_files_gives_its_tensors_in_any_order(model_dir: Path) -> None:
    tensors = shard(model_dir)
    checkpoint = ModelFiles(model_dir)
    assert {file.name for file in checkpoint.file_of.values()} == {"part-0.safetensors", "part-1.safetensors"}
    assert checkpoint.file_of.keys() == tensors.keys()
    for name in [*sorted(tensors), *sorted(tensors, reverse=True)]:
        assert torch.equal(checkpoint.read(name), tensors[name])


def test_files_that_no_index_names_are_left_alone(model_dir: Path) -> None:
    tensors = shard(model_dir)
    save_file({"stray": torch.zeros(1)}, model_dir / "adapter.safetensors")
    assert ModelFiles(model_dir).file_of.keys() == tensors.keys()


def test_broken_files_are_refused_before_any_is_read(model_dir: Path) -> None:
    shard(model_dir)
    part = model_dir / "part-1.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    assert "part-1.safetensors cannot be read as safetensors" in refusal(ModelFiles, model_dir)
    part.unlink()
    assert "part-1.safetensors cannot be read as safetensors" in refusal(ModelFiles, model_dir)


@pytest.mark.parametrize("text", ["{", "{}", ""])
def test_a_broken_index_is_refused(model_dir: Path, text: str) -> None:
    (model_dir / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is not an index" in refusal(ModelFiles, model_dir)


def test_a_directory_without_safetensors_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    message = refusal(ModelFiles, model_dir)
    assert str(model_dir) in message
    assert "save_pretrained" in message


# ---------------------------------------------------------------------------------------------------- resolve


def test_a_directory_is_itself(model_dir: Path) -> None:
    assert resolve(str(model_dir), None) == model_dir


def test_a_home_directory_is_found(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_dir.parent))
    assert resolve("~/model", None) == model_dir


def test_a_hub_id_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(repo: str, **how: object) -> str:
        asked.update(repo=repo, **how)
        return "snapshot"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "snapshot_download", snapshot)
    for name in ("google-bert/bert-base-uncased", "gpt2"):
        assert resolve(name, "v2") == Path("snapshot")
        assert (asked["repo"], asked["revision"], asked["local_files_only"]) == (name, "v2", False)
    read = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "fp16/model.safetensors", "onnx/config.json"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(read + others, **patterns)) == read


@pytest.mark.parametrize("path", ["./model", "/no/such", "~/model", "runs/dense/final", "file.txt"])
def test_what_is_neither_directory_nor_hub_id_is_refused_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "file.txt").touch()
    assert f"model path {path!r} is not a directory" in refusal(resolve, path, None)


def test_a_hub_that_does_not_answer_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise OSError("no connection\nTraceback ...")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "snapshot_download", snapshot)
    message = refusal(resolve, "some/model", None)
    assert "'some/model' is not a local directory" in message
    assert message.endswith("no connection")


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(resolve, str(tmp_path), None)
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path), None) == tmp_path
    assert "a directory, of which there is no revision 'v2'" in refusal(resolve, str(tmp_path), "v2")


# --------------------------------------------------------------------------------------------------- skeleton


def test_a_skeleton_holds_no_weights_but_knows_the_files(model_dir: Path) -> None:
    model, checkpoint = skeleton(model_dir, AutoModelForSequenceClassification, {"num_labels": 3})
    assert type(model) is BertForSequenceClassification
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert model.classifier.out_features == 3
    assert set(checkpoint.file_of) == set(load_file(model_dir / "model.safetensors"))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("{", "valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "nope"}', "nope"),
        ('{"model_type": "bert", "hidden_size": 13}', "hidden size"),
        ('{"model_type": "bert", "hidden_size": "x"}', "hidden_size"),
        ('{"model_type": "bert", "hidden_size": -12}', "negative dimension"),
        ('{"model_type": "vit"}', "AutoModelForSequenceClassification"),
    ],
)
def test_a_configuration_that_describes_no_such_model_is_refused(model_dir: Path, config: str, part: str) -> None:
    (model_dir / "config.json").write_text(config)
    message = refusal(skeleton, model_dir, AutoModelForSequenceClassification, {})
    known = ("/config.json is not a model's configuration: ", " does not describe a model for AutoModelForSequence")
    assert message.startswith(tuple(f"{model_dir}{each}" for each in known))
    assert part in message


def test_a_skeleton_without_files_is_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(skeleton, model_dir, AutoModel, {})


# ------------------------------------------------------------------------------------------------ set_dropout


def test_computed_buffers_are_of_no_type_that_the_configuration_names(tmp_path: Path) -> None:
    """A checkpoint's names float32: a run that went on would have others than it began with."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "head_dim": 8}
    Gemma2ForCausalLM(Gemma2Config(vocab_size=20, num_key_value_heads=1, **sizes)).bfloat16().save_pretrained(tmp_path)
    model, _ = skeleton(tmp_path, AutoModelForCausalLM, {})
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_dropout_sets_every_rate_of_the_model_and_nothing_else(tmp_path: Path) -> None:
    options = {"num_labels": 3}
    DistilBertConfig().save_pretrained(tmp_path)
    rates = ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout")
    assert set_dropout(options, tmp_path, 0.25) == options | dict.fromkeys(rates, 0.25)
    assert options == {"num_labels": 3}, "the caller's options are not changed"
    GPT2Config().save_pretrained(tmp_path)
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout")
    assert set_dropout({}, tmp_path, 0.0) == dict.fromkeys(rates, 0.0)


def test_dropout_null_is_the_models_own(tmp_path: Path) -> None:
    assert set_dropout({"num_labels": 3}, tmp_path, None) == {"num_labels": 3}


def test_no_layer_is_dropped_without_dropout(tmp_path: Path) -> None:
    BartConfig().save_pretrained(tmp_path)
    assert {"encoder_layerdrop", "decoder_layerdrop"} <= set_dropout({}, tmp_path, 0.0).keys()
    assert "encoder_layerdrop" not in set_dropout({}, tmp_path, 0.1)


def test_a_dropout_that_is_not_reached_is_refused(tmp_path: Path) -> None:
    BertConfig(**SIZES, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).save_pretrained(tmp_path)
    model = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    check_dropout(model, 0.3)
    check_dropout(model, None)
    with pytest.raises(UserError, match=r"model.dropout is 0.1, and embeddings.dropout of a BertModel keeps 0.3"):
        check_dropout(model, 0.1)


@pytest.mark.parametrize("switch", [True, False])
def test_dropout_leaves_switches_and_unset_rates_alone(tmp_path: Path, switch: bool) -> None:
    """ESM's token_dropout is a switch that rescales embeddings; BERT's classifier_dropout falls back on another."""
    EsmConfig(token_dropout=switch).save_pretrained(tmp_path)
    options = set_dropout({}, tmp_path, 0.0)
    assert options == {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertConfig().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, **set_dropout({}, tmp_path, 0.0))
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (0, 0, None)


# ------------------------------------------------------------------------------------------------ most_tokens


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, GPT2Config], ids=lambda each: each.model_type)
def test_the_most_tokens_are_just_what_a_model_takes(config) -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9} if config is GPT2Config else SIZES
    model = AutoModel.from_config(config(max_position_embeddings=10, **sizes)).eval()
    most = most_tokens(model)
    assert most is not None
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_relative_positions_have_no_most_tokens() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    assert most_tokens(AutoModel.from_config(T5Config(**sizes))) is None


@pytest.mark.parametrize("words_are_added", [False, True])
def test_a_tokenizer_of_a_few_words_is_one(tmp_path: Path, words_are_added: bool) -> None:
    """Four bases, of the vocabulary or added to it; special tokens alone are no words."""
    words = list("ACGT")
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *([] if words_are_added else words)])}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), unk_token="[UNK]", pad_token="[PAD]"
    )
    if words_are_added:
        made.save_pretrained(tmp_path / "none")
        with pytest.raises(UserError, match="none' gives no tokenizer: it has special tokens alone"):
            load_tokenizer(str(tmp_path / "none"))
        made.add_tokens(words)
    made.save_pretrained(tmp_path / "made")
    assert len(load_tokenizer(str(tmp_path / "made"))) == 6
