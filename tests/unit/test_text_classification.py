"""Batches, loss, metrics, and the teachers that fit."""

from random import Random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks import build_task
from tests.unit.task_files import PAD, TRAIN, WORDS, ids, labelled, make_tokenizer, write

# ---------------------------------------------------------------------------------- batches, loss, metrics


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_to_the_longest_of_the_batch(build, side):
    tokenizer = make_tokenizer(cls_last=side == "left")
    tokenizer._pad_token_type_id = 5
    task = build(tokenizer=tokenizer)
    batch = task.collate([task.train[0], task.train[2]])
    short, long = ids("a"), ids("a b c")
    if side == "left":
        short, long = ([*row[1:], row[0]] for row in (short, long))
    gap = [PAD] * 2
    expected = [short + gap, long] if side == "right" else [gap + short, long]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(token != PAD) for token in row] for row in expected]
    assert batch["token_type_ids"].tolist() == [[0 if token != PAD else 5 for token in row] for row in expected]
    assert batch["labels"].tolist() == [0, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_that_of_torch(build, side):
    task = build(tokenizer=make_tokenizer(cls_last=side == "left"))
    random = Random(0)
    for _ in range(50):
        rows = [[random.randrange(9) for _ in range(random.randrange(7))] for _ in range(random.randrange(1, 6))]
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        assert torch.equal(
            task.stack(rows, 11), pad_sequence(tensors, batch_first=True, padding_value=11, padding_side=side)
        )


def test_a_decoders_predictions_do_not_depend_on_the_batch(build):
    """Its tokenizer names the side for generation, on which GPT-2 would count the padding's places."""
    task = build(tokenizer=make_tokenizer(padding_side="left"))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, pad_token_id=PAD)
    model = GPT2ForSequenceClassification(config).eval()
    rows = [task.train[i] for i in range(5)]
    with torch.no_grad():
        together = task.forward(model, task.collate(rows))
        alone = torch.cat([task.forward(model, task.collate([row])) for row in rows])
    torch.testing.assert_close(together, alone)


def test_collate_agrees_with_the_tokenizer(build):
    task = build()
    expected = make_tokenizer()([row["sentence"] for row in TRAIN], padding=True, return_tensors="pt")
    batch = task.collate([task.train[i] for i in range(len(TRAIN))])
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor)


def test_token_types_are_left_out_where_the_tokenizer_gives_none(build):
    task = build(tokenizer=make_tokenizer(model_input_names=["input_ids", "attention_mask"]))
    assert set(task.collate([task.train[0]])) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_a_float32_mean(build, dtype):
    logits = torch.tensor([[0.0, 1.5], [0.0, -3.0], [0.0, 0.25]], dtype=dtype)
    loss = build().loss(logits, {"labels": torch.zeros(3, dtype=torch.long)})
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.log1p(logits[:, 1].float().exp()).mean())

    squared = build(regression=True, metrics=["pearson"]).loss(logits[:, 1:], {"labels": torch.tensor([1.0, 0.0, 0.0])})
    assert squared.dtype == torch.float32
    assert squared.item() == pytest.approx((0.25 + 9 + 0.0625) / 3)


def test_regression_from_data_to_metrics(build):
    rows = [{"sentence": "a", "label": value} for value in (0.5, 3, 4.25)]
    task = build(
        rows,
        rows,
        suffix=".csv",
        validation="validation.csv",
        regression=True,
        metrics=["spearman", "pearson"],
    )
    batch = task.collate([task.validation[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 3.0, 4.25]
    values = task.metrics(-2 * batch["labels"][:, None], task.validation)
    assert list(values) == ["spearman", "pearson"]
    assert values["pearson"] == pytest.approx(-1)
    assert task.model_options() == {"num_labels": 1, "problem_type": "regression", "pad_token_id": PAD}


def test_whole_numbers_can_be_regressed(build):
    task = build(labelled(1, 5), labelled(2), regression=True, metrics=["pearson"])
    assert task.train["label"][:] == [1.0, 5.0]


def test_metrics_come_in_the_order_of_the_configuration(build):
    task = build(metrics=["matthews", "accuracy", "f1"])
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    values = task.metrics(logits, task.validation)
    assert values == {"matthews": 1.0, "accuracy": 1.0, "f1": 1.0}
    assert list(values) == ["matthews", "accuracy", "f1"]


def test_metrics_are_those_of_the_kind_where_none_are_given(build):
    predictions = torch.tensor([[2.0], [1.0]])
    assert list(build(regression=True).metrics(predictions, build().validation)) == ["pearson", "spearman"]
    assert list(build().metrics(predictions, build().validation)) == ["accuracy"]


def test_more_evaluation_data_have_the_name_of_their_file(build, tmp_path):
    write(tmp_path / "other.jsonl", labelled(1, 1, 0))
    task = build(more_validation=["other.jsonl"])
    assert {name: rows["label"][:] for name, rows in task.evaluations().items()} == {"": [0, 1], "other/": [1, 1, 0]}


# --------------------------------------------------------------------------------------- model and teacher


def test_model_options_reach_the_model_and_its_loss_agrees(build, tmp_path):
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertConfig(vocab_size=len(WORDS), **tiny).save_pretrained(tmp_path / "model")
    task = build(labelled("x", "y", "z"), labelled("x"))
    config = AutoConfig.from_pretrained(tmp_path / "model", **task.model_options())
    assert (config.num_labels, config.id2label) == (3, {0: "x", 1: "y", 2: "z"})
    assert task.auto_class is AutoModelForSequenceClassification
    batch = task.collate([task.train[i] for i in range(3)])
    model = task.auto_class.from_config(config).eval()
    output = model(**batch)
    assert torch.allclose(task.loss(output.logits, batch), output.loss)


def teacher(*names: str) -> BertConfig:
    return BertConfig(num_labels=len(names), id2label=dict(enumerate(names)))


def test_a_fitting_teacher_passes(build):
    named = build(labelled("neg", "pos"), labelled("pos"))
    for config in [
        teacher("neg", "pos"),
        teacher("NEG", "POS"),
        teacher("LABEL_0", "LABEL_1"),
        teacher("0", "1"),
    ]:
        named.check_teacher(config, make_tokenizer())
    build().check_teacher(teacher("pos", "neg"), make_tokenizer())
    build(regression=True, metrics=["pearson"]).check_teacher(teacher("score"), make_tokenizer())


def test_a_teacher_that_does_not_fit_is_refused(build):
    task = build(labelled("neg", "pos"), labelled("pos"))
    swapped = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    for config, words, message in [
        (teacher("a", "b", "c"), WORDS, "the teacher has 3 labels and the task 2"),
        (teacher("POS", "neg"), WORDS, r"order POS, neg and the task's in the order neg, pos.*task\.labels"),
        (
            teacher("neg", "pos"),
            [*WORDS, "more"],
            r"vocabulary \(17 tokens\) is not the student's \(16 tokens\)",
        ),
        (teacher("neg", "pos"), swapped, "4 entries differ"),
    ]:
        with pytest.raises(UserError, match=message):
            task.check_teacher(config, make_tokenizer(words))


def test_a_model_whose_labels_are_not_the_tasks_is_refused(build):
    task = build(labelled("neg", "pos"), labelled("pos"))
    task.check_labels(teacher("neg", "pos"), "the model")
    task.check_labels(teacher("LABEL_0", "LABEL_1"), "the model")
    assert task.notes == []
    task.check_labels(teacher("O", "NAME"), "the model")
    assert task.notes == [
        "the model has other names for the classes, which are taken by their order: O for neg, NAME for pos"
    ]
    with pytest.raises(UserError, match="the model has 3 labels and the task 2"):
        task.check_labels(teacher("a", "b", "c"), "the model")
    with pytest.raises(UserError, match="the model's labels are in the order pos, neg and the task's"):
        task.check_labels(teacher("pos", "neg"), "the model")


def test_a_teacher_of_pairs_that_needs_token_types_is_refused_where_there_are_none(build):
    pairs = [{"first": "a", "second": "b c", "label": label} for label in ("neg", "pos")]
    without = make_tokenizer(model_input_names=["input_ids", "attention_mask"])
    options = {"text": ["first", "second"], "tokenizer": without}
    bert = teacher("neg", "pos")
    with pytest.raises(UserError, match="by token_type_ids, and the student's tokenizer gives none"):
        build(pairs, pairs, **options).check_teacher(bert, make_tokenizer())
    build(pairs, pairs, **options).check_teacher(bert, without)  # it was trained without them
    bert.type_vocab_size = 1  # as RoBERTa's
    build(pairs, pairs, **options).check_teacher(bert, make_tokenizer())
    build(pairs, pairs, text=["first", "second"]).check_teacher(teacher("neg", "pos"), make_tokenizer())
    single = build(labelled("neg", "pos"), labelled("pos"), tokenizer=without)
    single.check_teacher(teacher("neg", "pos"), make_tokenizer())


def test_an_unknown_task_names_the_nearest():
    config = Config()
    config.task.name = "text_clasification"
    with pytest.raises(UserError, match=r"task.name 'text_clasification' is unknown \(did you mean 'text_class"):
        build_task(config, make_tokenizer())
