"""What components cost, against numbers made by hand."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from distprune.analysis.components import Part, Place, matrix_flops, measure_parts, outermost, pays, reason, setting

HIDDEN, INNER, WORDS, POSITIONS, ROWS, LENGTH = 16, 24, 30, 20, 3, 5
TOKENS = ROWS * LENGTH
IDS = torch.arange(TOKENS).view(ROWS, LENGTH)
CPU = torch.device("cpu")


def bert(kind: type = BertForSequenceClassification) -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": WORDS}
    config = BertConfig(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=POSITIONS, **sizes)
    return kind(config).eval()


def parts_of(model: nn.Module, layers: bool = False) -> dict[str, Part]:
    with torch.no_grad():
        parts = measure_parts(model, lambda: model(input_ids=IDS), TOKENS, CPU, repeat=3, layers=layers)
    return {str(part.place): part for part in parts}


def test_a_tiny_bert_by_hand():
    model = bert()
    parts = parts_of(model, layers=True)
    attention, feed_forward = 4 * HIDDEN**2, 2 * HIDDEN * INNER
    layers = {
        f"bert.encoder.layer.{layer} {component}": (size, 2 * size)
        for layer in (0, 1)
        for component, size in (("attention", attention), ("feed_forward", feed_forward))
    }
    expected = {
        "token_embedding": (WORDS * HIDDEN, 0),
        "position_embedding": (POSITIONS * HIDDEN, 0),
        "type_embedding": (2 * HIDDEN, 0),
        "attention": (2 * attention, 4 * attention),
        "feed_forward": (2 * feed_forward, 4 * feed_forward),
        # One row of a text reaches the pooler and the head.
        "pooler": (HIDDEN**2, 2 * HIDDEN**2 / LENGTH),
        "head": (2 * HIDDEN, 2 * 2 * HIDDEN / LENGTH),
    } | layers
    assert {name: (part.weights, part.flops) for name, part in parts.items()} == expected
    assert list(parts) == list(expected)
    assert all(part.bytes == 4 * part.weights for part in parts.values())
    parameters, flops = (
        sum(p.numel() for p in model.parameters()),
        sum(expected[name][1] for name in list(expected)[:7]),
    )
    for part in parts.values():
        assert part.weights_share == pytest.approx(part.weights / parameters)
        assert part.flops_share == pytest.approx(part.flops / flops)
        assert 0 < part.latency_share < 1
    assert sum(parts[name].latency_share for name in list(expected)[:7]) < 1
    of_layers = (
        parts["bert.encoder.layer.0 attention"].latency_share + parts["bert.encoder.layer.1 attention"].latency_share
    )
    assert parts["attention"].latency_share == pytest.approx(of_layers)


def test_an_embedding_that_is_tied_to_the_output_costs_what_the_output_does():
    parts = parts_of(bert(BertForMaskedLM))
    assert parts["token_embedding"].flops == 2 * WORDS * HIDDEN
    assert parts["position_embedding"].flops == 0
    assert parts["head"].flops == 2 * HIDDEN**2, "the transformation ahead of the output"


def test_conv1d_counts_as_a_linear_layer():
    model = GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=POSITIONS))
    found = matrix_flops(model, lambda: model(input_ids=IDS))
    assert found["transformer.h.0.attn.c_attn.weight"] == 2 * TOKENS * HIDDEN * 3 * HIDDEN
    assert sum(found.values()) == 2 * TOKENS * ((4 + 8) * HIDDEN**2 + WORDS * HIDDEN)


def test_hooks_are_gone_afterwards():
    model = bert()
    parts_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_timed_of_an_attention_is_the_whole_of_it():
    model = bert()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    place = {
        f"{name}.weight": Place("attention" if "attention" in name else "feed_forward", name[:20])
        for name in linear
        if ".layer." in name
    }
    timed = outermost(model, place)
    assert [name for name, module in model.named_modules() if module in timed] == [
        f"bert.encoder.layer.{layer}.{part}" for layer in (0, 1) for part in ("attention", "intermediate", "output")
    ]


def part(component: str, share: float) -> Part:
    sizes = {"weights": 10, "bytes": 40, "flops": 100 * share, "weights_share": 0.25, "latency_share": 0.125}
    return Part(Place(component), [], flops_share=share, metrics={0.5: 0.75, 0.8: 0.5}, **sizes)


def test_pruning_pays_from_a_twentieth_of_the_arithmetic_on():
    parts = [part("token_embedding", 0.0), part("attention", 0.05), part("feed_forward", 0.9), part("head", 0.0499)]
    assert [pays(each) for each in parts] == [False, True, True, False]
    assert not pays(part("head", 0.4)), "a language model's"
    assert not pays(part("token_embedding", 0.4)), "tied to a language model's head"
    assert setting(parts) == "pruning.components=[attention,feed_forward]"


@pytest.mark.parametrize(
    ("component", "share", "is_new", "verdict", "why"),
    [
        ("attention", 0.4, False, "pays", ""),
        (
            "token_embedding",
            0.0,
            False,
            "does not pay",
            "; a lookup costs no arithmetic, so that only storage is saved",
        ),
        ("pooler", 0.01, False, "does not pay", "; less than 5% of the FLOPs"),
        ("head", 0.4, False, "does not pay", "; heads stay dense by the guideline"),
        ("token_embedding", 0.4, False, "does not pay", "; tied to the head, which stays dense by the guideline"),
        (
            "head",
            0.01,
            True,
            "does not pay",
            "; less than 5% of the FLOPs; its weights are new, and their magnitudes mean nothing",
        ),
    ],
)
def test_the_reason_is_one_line(component: str, share: float, is_new: bool, verdict: str, why: str):
    saves = f"{share:.1%} of the FLOPs, 25.0% of the parameters, 12.5% of the latency"
    wanted = f"{component}: {verdict}: {saves}{why}; f1 0.8000 -> 0.7500 at 50%, 0.5000 at 80%"
    assert reason(part(component, share), 0.8, "f1", is_new) == wanted
