import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    XLNetConfig,
    XLNetModel,
)
from transformers.pytorch_utils import Conv1D

from distprune.config import PruningConfig
from distprune.errors import UserError
from distprune.pruning.targets import freeze, matrices_of, targets_of

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
BERT_MATRICES = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
BERT_ENCODER = [f"bert.encoder.layer.{layer}.{name}.weight" for layer in (0, 1) for name in BERT_MATRICES]


@pytest.fixture
def bert() -> nn.Module:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(**SIZES))


def test_default_is_every_matrix_of_the_encoder_in_model_order(bert: nn.Module) -> None:
    assert targets_of(PruningConfig(), bert) == BERT_ENCODER


def test_default_leaves_embeddings_head_norms_and_biases_of_a_decoder() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    names = targets_of(PruningConfig(), model)
    modules = {type(model.get_submodule(name.removesuffix(".weight"))) for name in names}
    assert modules == {nn.Linear}
    assert len(names) == 2 * 7
    assert all(name.startswith("model.layers.") for name in names)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(names)


def test_a_part_of_the_encoder_whose_matrices_are_not_known_is_not_left_out_in_silence() -> None:
    """XLNet's attention has no linear layers, but tensors of three dimensions."""
    with torch.device("meta"):
        model = XLNetModel(XLNetConfig(d_model=8, n_layer=2, n_head=2, d_inner=12, vocab_size=9))
    with pytest.raises(UserError, match=r"has 'attention', .* in a XLNetModel; allowed: \['feed_forward'\], or"):
        targets_of(PruningConfig(), model)
    assert len(targets_of(PruningConfig(components=["feed_forward"]), model)) == 4
    assert len(targets_of(PruningConfig(include=[r"rel_attn\.[qkvo]$"]), model)) == 8
    assert targets_of(PruningConfig(components=["attention", "type_embedding"], include=["ff.*weight"]), model)


def test_experts_that_share_a_tensor_are_not_left_out_in_silence() -> None:
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 8}
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**SIZES, **sizes}, shared_expert_intermediate_size=8))
    with pytest.raises(UserError, match=r"has 'feed_forward', and .*\.experts\..* holds experts in one tensor"):
        targets_of(PruningConfig(), model)
    assert len(targets_of(PruningConfig(components=["attention"]), model)) == 4


DISTILBERT = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "vocab_size": 9}
OPT = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    ("kind", "sizes", "auto_class", "matrices"),
    [
        ("bert", SIZES, AutoModelForMaskedLM, 6),
        ("roberta", SIZES, AutoModelForMaskedLM, 6),
        ("deberta-v2", SIZES, AutoModelForMaskedLM, 6),
        ("electra", {**SIZES, "embedding_size": 6}, AutoModelForMaskedLM, 6),
        ("distilbert", DISTILBERT, AutoModelForMaskedLM, 6),
        ("gpt_neox", SIZES, AutoModelForCausalLM, 4),
        ("llama", {**SIZES, "num_key_value_heads": 1}, AutoModelForCausalLM, 7),
        ("qwen2", {**SIZES, "num_key_value_heads": 1}, AutoModelForCausalLM, 7),
        ("opt", OPT, AutoModelForCausalLM, 6),
        ("gpt2", GPT2, AutoModelForCausalLM, 4),
    ],
)
def test_the_layers_of_many_kinds_are_found(kind: str, sizes: dict[str, int], auto_class: Any, matrices: int) -> None:
    with torch.device("meta"):
        model = auto_class.from_config(AutoConfig.for_model(kind, **sizes))
    names = targets_of(PruningConfig(), model)
    numbers = [re.search(r"\.(\d+)\.", name) for name in names]
    assert [number and number[1] for number in numbers] == ["0"] * matrices + ["1"] * matrices
    modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    assert {type(module) for module in modules} == {Conv1D if kind == "gpt2" else nn.Linear}
    assert not {id(model.get_input_embeddings()), id(model.get_output_embeddings())} & {*map(id, modules)}
    left = {name for name, parameter in model.named_parameters() if parameter.ndim == 2 and name not in names}
    assert not [name for name in left if re.search(r"\.\d+\.", name)], "every matrix of a layer"


def test_a_matrix_that_is_stored_the_other_way_round_is_pruned_weight_by_weight_only() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**GPT2))
    with pytest.raises(UserError, match=r"c_attn.weight is stored as inputs by outputs, which pruning.structure=2:4"):
        targets_of(PruningConfig(structure="2:4"), model)
    assert targets_of(PruningConfig(include=["wte"], structure="2:4"), model) == ["transformer.wte.weight"]


def test_include_replaces_the_default_and_keeps_the_models_order(bert: nn.Module) -> None:
    names = targets_of(PruningConfig(include=[r"pooler\.dense\.weight$", r"layer\.0\..*query\.weight$"]), bert)
    assert names == ["bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.weight"]


def test_exclude_takes_away_from_either(bert: nn.Module) -> None:
    assert targets_of(PruningConfig(exclude=[r"layer\.1\."]), bert) == BERT_ENCODER[:6]
    assert targets_of(PruningConfig(include=[r"query"], exclude=[r"bias", r"layer\.0"]), bert) == [BERT_ENCODER[6]]


def test_a_tied_weight_is_pruned_once() -> None:
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**SIZES))
    model.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    names = targets_of(PruningConfig(include=[r"word_embeddings|decoder\.weight$"]), model)
    assert names == ["bert.embeddings.word_embeddings.weight"]
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    assert targets_of(PruningConfig(), model) == BERT_ENCODER[:-1]


def test_a_linear_outside_of_a_numbered_stack_is_no_layer() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "layers_head": nn.Linear(2, 2)})
    assert matrices_of(model) == {"layers.0.weight"}


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"), [("(", "is not a regular expression"), ("qery", "matches no parameter")]
)
def test_a_regex_that_cannot_be_meant_is_refused(bert: nn.Module, key: str, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        targets_of(PruningConfig(**{key: [pattern]}), bert)
    assert f"pruning.{key}: {pattern!r}" in str(caught.value)


@pytest.mark.parametrize("structure", ["heads", "neurons"])
def test_heads_that_are_not_known_in_an_architecture_are_refused(structure: str) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(UserError, match=f"pruning.structure is {structure}, and none are known in a GPT2LMHeadModel"):
        targets_of(PruningConfig(structure=structure), model)


def test_heads_of_other_components_are_none_that_are_not_known(bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r"no weight is left .* pruning.components=\['feed_forward'\]"):
        targets_of(PruningConfig(structure="heads", components=["feed_forward"]), bert)


def test_nothing_left_is_refused(bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r"no weight is left to prune with pruning.include=\['query'\]"):
        targets_of(PruningConfig(include=["query"], exclude=["bert"]), bert)
    with pytest.raises(UserError, match="no weight is left"):
        targets_of(PruningConfig(), nn.Linear(2, 2))


def test_frozen_parameters_are_fixed_and_cannot_be_pruned(bert: nn.Module) -> None:
    freeze(bert, [r"embeddings", r"layer\.0\."])
    fixed = {name for name, parameter in bert.named_parameters() if not parameter.requires_grad}
    assert fixed == {name for name, _ in bert.named_parameters() if "embeddings" in name or "layer.0." in name}
    with pytest.raises(UserError, match=r"layer\.0\..*query\.weight is to be pruned, but model\.freeze"):
        targets_of(PruningConfig(), bert)
    assert targets_of(PruningConfig(exclude=[r"layer\.0\."]), bert) == BERT_ENCODER[6:]


def test_freeze_refuses_what_matches_nothing(bert: nn.Module) -> None:
    with pytest.raises(UserError, match=r"model\.freeze: 'embedings' matches no parameter; there are e\.g\. bert"):
        freeze(bert, ["embedings"])


@given(st.sets(st.sampled_from(BERT_MATRICES), min_size=1), st.permutations(BERT_MATRICES))
def test_the_order_of_regexes_does_not_matter(chosen: set[str], order: list[str]) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**SIZES))
    include = [rf"layer\.\d\.{name}\.weight" for name in order if name in chosen]
    wanted = [name for name in BERT_ENCODER if name.split(".", 4)[4].removesuffix(".weight") in chosen]
    assert targets_of(PruningConfig(include=include), model) == wanted
