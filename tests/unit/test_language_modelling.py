"""Plain text: blocks, masks, losses, perplexity."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    LlamaConfig,
    XLMConfig,
)

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks import language_modelling
from distprune.tasks.data import fingerprint
from distprune.teachers.live import LiveTeacher
from distprune.training.fit import check_teacher
from tests.unit.task_files import CLS, SEP, WORDS, ids, make_masked_tokenizer, make_tokenizer

MASK = len(WORDS)
TEXTS = [{"text": " ".join("abcdefghij"[i % 5 : i % 5 + 1 + i % 6])} for i in range(40)]
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def lm(build):
    """Return a function that builds either task from texts."""

    def run(name="masked_lm", rows=TEXTS, held=TEXTS, tokenizer=None, **options):
        made = tokenizer or (make_masked_tokenizer() if name == "masked_lm" else decoder())
        return build(rows, held, tokenizer=made, **({"name": name, "text": ["text"], "max_length": 16} | options))

    return run


def decoder(**options):
    """Return a tokenizer without a padding token that adds nothing to a text."""
    tokenizer = make_tokenizer(pad_token=None, eos_token="[SEP]", **options)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return tokenizer


def model_of(task):
    torch.manual_seed(0)
    kind = BertConfig if type(task).__name__ == "MaskedLM" else LlamaConfig
    return task.auto_class.from_config(kind(vocab_size=MASK + 1, **SIZES)).eval()


def all_rows(data):
    return data.__getitems__(list(range(len(data))))


# ---------------------------------------------------------------------------------- blocks


def test_texts_are_joined_and_cut_into_blocks(lm):
    joined = [token for row in TEXTS for token in ids(row["text"])]
    task = lm()
    assert set(task.train.column_names) == {"input_ids", "length", "_row"}
    assert task.train["input_ids"][:] == [joined[i : i + 16] for i in range(0, len(joined) - 15, 16)]
    assert set(task.train["length"][:]) == {16}
    assert task.train["_row"][:] == list(range(len(joined) // 16))


def test_a_tokenizer_that_adds_nothing_ends_a_text_with_its_end(lm):
    joined = [token for row in TEXTS for token in [*ids(row["text"])[1:-1], SEP]]
    task = lm("causal_lm")
    assert task.train["input_ids"][:] == [joined[i : i + 16] for i in range(0, len(joined) - 15, 16)]
    assert task.tokenizer.pad_token_id is None


def test_blocks_that_come_in_parts_are_those_of_one_piece(lm, monkeypatch):
    whole = lm().train
    monkeypatch.setattr(language_modelling, "_TOKENS_AT_ONCE", 40)  # two blocks
    parts = lm().train
    assert len(whole) % 2 == 1
    assert parts.features == whole.features
    assert parts[:] == whole[:]
    assert fingerprint(parts) == fingerprint(whole)


def test_texts_without_tokens_and_blocks_without_text_are_dropped(lm):
    rows = [{"text": text} for text in ["", "a", " ", "b c", ""]]
    task = lm(rows=rows, held=rows, max_length=3)
    assert task.train["input_ids"][:] == [ids("a"), ids("b c")[:3]]
    odd = [{"text": "a b c [CLS] [SEP] [SEP] d"}]
    special = make_masked_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["[SEP]", "[CLS]"]})
    blocks = lm(rows=odd, held=odd, tokenizer=special, max_length=3).train
    assert blocks["_row"][:] == list(range(len(blocks)))
    assert all(set(block) - {CLS, SEP} for block in blocks["input_ids"][:])


def test_limit_and_holdout_count_texts(lm):
    task = lm(holdout=0.25, validation="train.jsonl")
    tokens = sum(len(ids(row["text"])) for row in TEXTS)
    assert len(task.train) + len(task.validation) in (tokens // 16, tokens // 16 - 1)
    assert len(lm(limit=10).train) < len(lm().train) / 2


def test_settings_that_cannot_be_used(lm):
    few = [{"text": "a b"}]
    for options, message in [
        ({"rows": few}, "'text' of train.jsonl gives no block: it has 4 tokens; allowed: at least task.max_length, 16"),
        ({"held": few}, "'text' of validation.jsonl gives no block"),
        ({"text": ["text", "more"]}, "allowed for masked_lm: one column"),
        ({"text": ["txt"]}, r"'txt' is unknown \(did you mean 'text'"),
        ({"rows": [{"text": 5}]}, "holds .*int64.*task.text needs text"),
        ({"rows": [*few, {"text": None}]}, "have no value in column 'text': row 2"),
        ({"tokenizer": make_tokenizer()}, "has no mask token"),
        ({"max_length": 2}, "task.max_length is 2; this tokenizer and 1 text columns allow 3"),
        ({"name": "causal_lm", "max_length": 1}, "task.max_length is 1; allowed for causal_lm: at least 2"),
        (
            {"name": "causal_lm", "metrics": ["accuracy"]},
            "metric of causal_lm 'accuracy' is unknown; allowed: perplexity, nll",
        ),
        ({"metrics": ["f1"]}, "metric of masked_lm 'f1' is unknown; allowed: perplexity, nll, accuracy"),
    ]:
        with pytest.raises(UserError, match=message):
            lm(**options)


# ---------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("mask", "length", "number"), [(0.15, 16, 2), (0.5, 16, 8), (0.01, 16, 1)])
def test_each_block_has_as_many_masks_and_none_on_separators(lm, mask, length, number):
    task = lm(mask=mask, max_length=length)
    batch = task.collate(all_rows(task.train))
    original = torch.tensor(task.train["input_ids"][:])
    chosen = batch["labels"] != -100
    assert chosen.sum(1).tolist() == [number] * len(task.train)
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert not torch.isin(batch["labels"], torch.tensor([CLS, SEP])).any()


def test_masks_depend_on_the_block_and_the_draw_only(lm):
    task = lm()
    rows = all_rows(task.train)
    whole = task.collate(rows, draw=7)
    for first, last in ((0, 3), (3, len(rows))):
        part = task.collate(rows[first:last], draw=7)
        assert all(torch.equal(part[name], whole[name][first:last]) for name in whole)
    assert all(torch.equal(tensor, lm().collate(rows, draw=7)[name]) for name, tensor in whole.items())
    assert not torch.equal(task.collate(rows, draw=8)["labels"], whole["labels"])
    assert all(torch.equal(task.collate(rows)[name], task.collate(rows, draw=0)[name]) for name in whole)


def test_masked_tokens_are_hidden_replaced_or_left(lm):
    task = lm(mask=0.5)
    rows, counts, others = all_rows(task.train), Counter(), Counter()
    for draw in range(200):
        batch = task.collate(rows, draw)
        chosen = batch["labels"] != -100
        given, wanted = batch["input_ids"][chosen], batch["labels"][chosen]
        counts["hidden"] += int((given == MASK).sum())
        counts["same"] += int((given == wanted).sum())
        counts["all"] += len(given)
        others.update(given[(given != MASK) & (given != wanted)].tolist())
    words = MASK + 1
    assert set(others) == set(range(words)) - {MASK}, "any token may come in its place"
    assert max(others.values()) < 2 * min(others.values())
    assert counts["hidden"] / counts["all"] == pytest.approx(0.8 + 0.1 / words, abs=0.01)
    assert counts["same"] / counts["all"] == pytest.approx(0.1 + 0.1 / words, abs=0.01)


# ---------------------------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("name", ["masked_lm", "causal_lm"])
def test_the_loss_is_the_models_own(lm, name):
    task = lm(name)
    model, batch = model_of(task), task.collate(all_rows(task.train)[:4], draw=3)
    logits = task.forward(model, batch)
    assert logits.shape == (int((batch["labels"] != -100).sum()), MASK + 1)
    labels = batch["labels"] if name == "masked_lm" else batch["input_ids"]
    assert torch.allclose(task.loss(logits, batch), model(input_ids=batch["input_ids"], labels=labels).loss)
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32
    rows = task.split(logits, batch)
    assert [len(row) for row in rows] == (batch["labels"] != -100).sum(1).tolist()
    assert torch.equal(task.join(rows, batch), logits)
    assert torch.allclose(
        task.mean_over_rows(logits[:, 0], batch), torch.stack([row[:, 0].mean() for row in rows]).mean()
    )
    alone = [task.forward(model, task.collate([row], draw=3)) for row in all_rows(task.train)[:4]]
    assert torch.allclose(torch.cat(alone), logits, atol=1e-5)


@torch.no_grad()
def test_blocks_with_fewer_words_than_masks_count_as_much_as_others(lm):
    task = lm(rows=[{"text": "a"}] * 30 + [{"text": "a b c d e f g h"}] * 20, max_length=8, mask=0.5)
    model, rows = model_of(task), all_rows(task.train)
    batch = task.collate(rows)
    assert len(set((batch["labels"] != -100).sum(1).tolist())) > 1
    whole, half = (task.loss(task.forward(model, each), each) for each in (batch, task.collate(rows[::2] + rows[1::2])))
    parts = [task.collate([row]) for row in rows]
    alone = torch.stack([task.loss(task.forward(model, part), part) for part in parts])
    assert torch.allclose(whole, alone.mean(), atol=1e-5)
    assert torch.allclose(whole, half, atol=1e-5)


def test_perplexity_is_that_of_a_plain_loop(lm):
    task = lm("causal_lm")
    model, nats, tokens = model_of(task), 0.0, 0
    for block in task.validation["input_ids"][:]:
        found = F.log_softmax(model(torch.tensor([block])).logits[0], dim=-1)
        for place in range(1, len(block)):
            nats, tokens = nats - float(found[place - 1, block[place]]), tokens + 1
    batch = task.collate(all_rows(task.validation))
    measured = task.metrics(task.predictions(task.forward(model, batch), batch), task.validation)
    assert list(measured) == ["perplexity", "nll"]
    assert measured["nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)


def test_masked_tokens_have_an_accuracy(lm):
    task = lm(metrics=["accuracy", "nll"])
    batch = task.collate(all_rows(task.validation))
    targets = batch["labels"][batch["labels"] != -100]
    logits = 50 * F.one_hot(targets, MASK + 1).float()
    logits[0] = 50 * F.one_hot((targets[0] + 1) % MASK, MASK + 1)
    measured = task.metrics(task.predictions(logits, batch), task.validation)
    assert measured["accuracy"] == pytest.approx(1 - 1 / len(targets))
    assert measured["nll"] == pytest.approx(50 / len(targets), rel=1e-3)
    assert list(lm().metrics(torch.ones(2, 3), task.validation)) == ["perplexity", "nll"]


def test_a_teacher_has_the_students_vocabulary(lm):
    task, student = lm(), BertConfig(vocab_size=20)
    task.check_teacher(student, make_masked_tokenizer())
    task.check_outputs(student, BertConfig(vocab_size=20))
    with pytest.raises(UserError, match="the teacher's vocab_size is 24 and the student's 20; they must be equal"):
        task.check_outputs(student, BertConfig(vocab_size=24))
    with pytest.raises(UserError, match="vocabulary"):
        task.check_teacher(student, make_tokenizer())


def test_a_run_refuses_a_teacher_that_puts_out_more_logits(lm, tmp_path):
    for name, size in (("student", 20), ("teacher", 24)):
        BertForMaskedLM(BertConfig(vocab_size=size, **SIZES)).save_pretrained(tmp_path / name)
        make_masked_tokenizer().save_pretrained(tmp_path / name)
    task, student = lm(), tmp_path / "student"
    check_teacher(Config(), student, task, student)
    with pytest.raises(UserError, match="the teacher's vocab_size is 24"):
        check_teacher(Config(), tmp_path / "teacher", task, student)


def test_logits_are_not_kept_from_epoch_to_epoch(lm):
    assert not lm().cacheable
    assert not lm("causal_lm").cacheable


def test_a_live_teacher_keeps_outputs_only_where_they_are_asked_for(lm):
    task = lm("causal_lm")
    model, batch = model_of(task), task.collate(all_rows(task.validation))
    assert LiveTeacher(model, task).outputs(batch, []).outputs is None
    assert LiveTeacher(model, task).outputs(batch, [], output_hidden_states=True).outputs.hidden_states


@pytest.mark.parametrize("config", [BertConfig, XLMConfig, GPT2Config, LlamaConfig, BartConfig], ids=str)
def test_a_model_that_sees_what_it_is_to_predict_is_no_causal_one(lm, config) -> None:
    """Held against what a change of the last token does to the logits before it."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "n_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "decoder_layers": 1, "decoder_ffn_dim": 8}
    key = "causal" if config is XLMConfig else "is_decoder"
    for causes in (False, True):
        given = {key: True} if causes else {}
        task, model = lm(name="causal_lm"), AutoModelForCausalLM.from_config(config(**sizes, emb_dim=8, **given)).eval()
        tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        with torch.no_grad():
            first, second = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
        if torch.equal(first, second):
            task.check_architecture(model.config)
        else:
            assert not causes
            with pytest.raises(UserError, match=f"a {model.config.model_type} sees the tokens that it is to predict"):
                task.check_architecture(model.config)
    assert torch.equal(first, second)
