"""Components are told by structure: the same for models that name their modules differently."""

from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMultipleChoice,
    T5Config,
    T5ForConditionalGeneration,
)

from distprune.config import COMPONENTS, PruningConfig
from distprune.pruning.components import component_matrices, layer_of, without_component
from distprune.pruning.pruner import Pruner
from distprune.pruning.targets import targets_of
from distprune.training.diagnose import name_unknown

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}
BERT = {"token_embedding": 1, "position_embedding": 1, "type_embedding": 1, "attention": 8, "feed_forward": 4}


def roberta() -> nn.Module:
    return RobertaForMultipleChoice(RobertaConfig(**SMALL))


def distilbert() -> nn.Module:
    config = DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=30)
    return DistilBertForSequenceClassification(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=30))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16))


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (lambda: BertForSequenceClassification(BertConfig(**SMALL)), BERT | {"pooler": 1, "head": 1}),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), BERT | {"head": 1}),
        (roberta, BERT | {"pooler": 1, "head": 1}),
        (lambda: ElectraForSequenceClassification(ElectraConfig(**SMALL, embedding_size=8)), BERT | {"head": 2}),
        (distilbert, {"token_embedding": 1, "position_embedding": 1, "attention": 8, "feed_forward": 4, "head": 2}),
        (llama, {"token_embedding": 1, "attention": 8, "feed_forward": 6, "head": 1}),
        (t5, {"token_embedding": 1, "position_embedding": 2, "attention": 24, "feed_forward": 8}),
        (gpt2, {"token_embedding": 1, "position_embedding": 1, "attention": 4, "feed_forward": 4}),
    ],
    ids=["bert", "bert-mlm-tied", "roberta", "electra", "distilbert", "llama", "t5-tied", "gpt2-tied"],
)
def test_matrices_have_their_component(model, counts):
    with torch.device("meta"):
        built = model()
    found = component_matrices(built)
    assert Counter(found.values()) == counts
    assert set(found.values()) <= set(COMPONENTS)
    parameters = dict(built.named_parameters())
    assert all(parameters[name].dim() == 2 for name in found)


def test_all_matrices_of_bert_are_in_a_component():
    model = BertForSequenceClassification(BertConfig(**SMALL))
    assert set(component_matrices(model)) == {name for name, p in model.named_parameters() if p.dim() == 2}


def test_what_is_pruned_follows_the_components():
    model = BertForSequenceClassification(BertConfig(**SMALL))
    assert len(targets_of(PruningConfig(), model)) == 12
    assert targets_of(PruningConfig(components=["head"]), model) == ["classifier.weight"]
    chosen = targets_of(PruningConfig(include=["pooler.dense.weight"], components=["head"]), model)
    assert chosen == ["bert.pooler.dense.weight"]
    every = targets_of(PruningConfig(components=COMPONENTS), model)
    assert every == [name for name, p in model.named_parameters() if p.dim() == 2]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.11.output.dense.weight", "bert.encoder.layer.11"),
        ("model.layers.3.mlp.experts.7.up.weight", "model.layers.3"),
        ("bert.pooler.dense.weight", None),
        ("layer12.weight", None),
    ],
)
def test_a_parameters_layer_is_the_first_number_in_its_name(name: str, layer: str | None) -> None:
    assert layer_of(name) == layer


def test_what_the_layers_have_beside_known_matrices_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Funnel's attention has a tensor of its own for relative positions."""
    bert = BertForSequenceClassification(BertConfig(**SMALL))
    funnel = FunnelForSequenceClassification(
        FunnelConfig(vocab_size=30, block_sizes=[1], d_model=16, n_head=2, d_head=8, d_inner=24, num_decoder_layers=1)
    )
    assert without_component(bert) == []
    left = without_component(funnel)
    assert any(name.endswith("attention.r_kernel") for name in left)
    number = sum(funnel.get_parameter(name).numel() for name in left)
    for model, said in (
        (bert, ""),
        (funnel, f"{number} weights of the layers stay dense beside the 1,000 to prune, as "),
    ):
        name_unknown(model, cast("Pruner", SimpleNamespace(total=1000)))
        assert capsys.readouterr().out.startswith(said)
    name_unknown(funnel, cast("Pruner", SimpleNamespace(total=100_000)))
    assert capsys.readouterr().out == "", "so few"
