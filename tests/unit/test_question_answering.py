"""Windows, their answers, loss and metrics of extractive question answering."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from distprune.errors import UserError
from distprune.tasks.question_answering import PADDING
from tests.unit.task_files import CLS, SEP, make_tokenizer, write

CONTEXT = (
    "In “Zürich” the 2nd café of Ms. O'Neill sold 1,250 crêpes (at 3.50 francs) on 4 July 1998. Half of the naïve "
    "visitors, about 600 people from Łódź and 東京, asked whether the well-known 🥐 was a crêpe; it was not, she said."
)
ANSWERS = ["Zürich", "Ms. O'Neill", "1,250", "4 July 1998", "Łódź and 東京", "東京", "🥐", "In", "said", CONTEXT[:-1]]


def question(context: str, *texts: str, question: str = "a", places: list[int] | None = None) -> dict:
    starts = [context.index(text) for text in texts] if places is None else places
    return {"question": question, "context": context, "answers": {"text": list(texts), "answer_start": starts}}


LETTERS = "c d e f g h i j"
TRAIN = [question(LETTERS, "d e"), question("a b", "b", "a b"), question(LETTERS, "j", question="a b")]


@pytest.fixture
def build_qa(build):
    """Return `build` for questions."""

    def run(rows=TRAIN, held=None, **options):
        fixed = {"name": "question_answering", "text": ["question", "context"], "label": "answers"}
        return build(rows, held or rows, **fixed | {"max_length": 8, "stride": 2} | options)

    return run


def bert_like() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator([CONTEXT], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "model_input_names": names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **options)


def roberta_like(trim: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CONTEXT], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=trim)
    options = {"pad_token": "<pad>", "cls_token": "<s>", "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **options)


# ------------------------------------------------------------------------------------------ windows


def test_a_long_context_becomes_windows_that_share_tokens(build_qa):
    task = build_qa([question(LETTERS, "d e"), question("a b", "b", "a b")])
    c = 6  # its token
    assert task.train["input_ids"][:] == [
        [CLS, 4, SEP, c, c + 1, c + 2, c + 3, SEP],
        [CLS, 4, SEP, c + 2, c + 3, c + 4, c + 5, SEP],
        [CLS, 4, SEP, c + 4, c + 5, c + 6, c + 7, SEP],
        [CLS, 4, SEP, 4, 5, SEP],
    ]
    assert task.train["label"][:] == [[4, 5], [0, 0], [0, 0], [4, 4]], "the second window holds but half of it"
    assert task.train["_row"][:] == [0, 0, 0, 1]
    assert task.train["length"][:] == [8, 8, 8, 6]
    assert set(task.train.column_names) == {"input_ids", "token_type_ids", "label", "length", "_row"}
    assert task.validation["label"][:] == task.train["label"][:]
    assert task.validation["question"][:] == [0, 0, 0, 1]


@pytest.mark.parametrize(("make", "max_length"), [(bert_like, 24), (bert_like, 64), (roberta_like, 40)])
def test_answers_are_read_off_every_window_that_holds_them(build_qa, make, max_length):
    rows = [question(CONTEXT, text, question="What was sold?") for text in ANSWERS]
    tokenizer = make()
    task = build_qa(rows, tokenizer=tokenizer, max_length=max_length, stride=8)
    assert ("token_type_ids" in task.train.column_names) == (make is bert_like)
    seen, held = set(), 0
    for window in task.validation:
        text = ANSWERS[window["_row"]]
        begin, end = CONTEXT.index(text), CONTEXT.index(text) + len(text)
        inside = window["starts"][0] <= begin and end <= window["ends"][-1]
        first, last = window["label"]
        assert (first > 0) == inside
        if inside:
            shift = window["context"][0]
            assert CONTEXT[window["starts"][first - shift] : window["ends"][last - shift]] == text
            held += 1
            seen.add(text)
    assert seen >= set(ANSWERS[:-1]), "only the whole context is longer than a window"
    assert held > len(seen), "some are in two windows"


def test_space_around_answers_and_tokens_is_none_of_the_answer(build_qa):
    rows = [question(CONTEXT, " francs) "), question(CONTEXT, "francs)"), question(CONTEXT, " ")]
    for tokenizer in (roberta_like(), roberta_like(trim=False)):
        task = build_qa(rows, tokenizer=tokenizer, max_length=500)
        first, second, none = task.train["label"][:]
        assert first == second != [0, 0] == none


def test_the_null_token_is_where_the_tokenizer_puts_it(build_qa):
    backend = make_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A [CLS]", pair="$A [SEP] $B [CLS]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    options = {"tokenizer_object": backend, "pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 512}
    rows = [question("a b c")]
    at_the_end = PreTrainedTokenizerFast(cls_token="[CLS]", **options)
    assert build_qa([*rows, *TRAIN], tokenizer=at_the_end).train["label"][0] == [5, 5]
    assert build_qa([*rows, *TRAIN], tokenizer=PreTrainedTokenizerFast(**options)).train["label"][0] == [0, 0]


def test_limit_and_holdout_count_questions(build_qa):
    rows = [question(LETTERS, letter) for letter in LETTERS.split()]
    task = build_qa(rows, limit=3, holdout=0.25)
    assert (len(task.train), len(set(task.train["_row"][:]))) == (9, 3)
    assert (len(task.validation), len(set(task.validation["_row"][:]))) == (6, 2)
    assert not set(task.train["_row"][:]) & set(task.validation["_row"][:])


# ------------------------------------------------------------------------------------------ bad rows

BAD = [
    question(LETTERS, "d e", places=[0]),
    TRAIN[0],
    question(LETTERS, "d", places=[2, 4]),
    question(LETTERS, "j", places=[-1]),
    question(LETTERS, "j", question="a a a"),
    question(LETTERS, "j", question="a " * 50),
]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (BAD[:2], r"1 of 2 rows of train.jsonl have an answer that is not in its context where it says: row 1; allow"),
        (BAD[1:3], "1 of 2 rows of train.jsonl have answers that are not equally many texts and places: row 2"),
        (BAD[3:4], "have an answer that is not in its context"),
        (BAD[4:], "2 of 2 rows .* question of 3 tokens or more, .*max_length 8 .*stride 2 leaves no room.* rows 1, 2"),
        ([{**TRAIN[0], "answers": "d e"}], r"column 'answers' of train.jsonl holds .*string.*'answer_start': \[...\]"),
        ([{**TRAIN[0], "answers": [{"text": "d", "answer_start": 2}]}], "'answers' of train.jsonl holds"),
        ([{**TRAIN[0], "answers": {"text": ["d"], "answer_start": ["2"]}}], "'answers' of train.jsonl holds"),
        ([{**TRAIN[0], "context": 5}], "column 'context' of train.jsonl holds"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(build_qa, rows, message):
    with pytest.raises(UserError, match=message):
        build_qa(rows, TRAIN)


def test_rows_that_cannot_be_used_are_left_out(build_qa):
    task = build_qa(BAD, TRAIN, bad_rows="skip")
    assert set(task.train["_row"][:]) == {1}
    assert [note.split(":")[0][:30] for note in task.notes] == [
        "1 of 6 rows of train.jsonl hav",
        "2 of 6 rows of train.jsonl hav",
        "2 of 6 rows of train.jsonl hav",
    ]
    with pytest.raises(UserError, match=r"no row of train.jsonl can be used"):
        build_qa(BAD[2:], TRAIN, bad_rows="skip")


def test_what_cannot_be_cut_to_windows_is_refused(build_qa):
    slow = make_tokenizer()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    for options, message in [
        ({"tokenizer": slow}, "does not say which characters a token holds; allowed .* a fast tokenizer"),
        ({"text": ["context"]}, r"task.text is \['context'\]; question answering allows two columns"),
        ({"max_length": 600}, "task.max_length is 600; .* 2 text columns allow 5 to 512"),
        ({"metrics": ["accuracy"]}, "metric of question_answering 'accuracy' is unknown; allowed: f1, exact_match"),
    ]:
        with pytest.raises(UserError, match=message):
            build_qa(**options)


# ------------------------------------------------------------------------------------------ batches and loss


def tiny(task, vocabulary: int = 16) -> BertForQuestionAnswering:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=vocabulary, initializer_range=1.0, **sizes, **task.model_options())
    return task.auto_class.from_config(config).eval()


@torch.no_grad()
def test_the_loss_is_that_of_transformers(build_qa):
    task = build_qa()
    batch = task.collate([task.train[i] for i in range(3)])
    model = tiny(task)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    start, end = batch["labels"].T
    expected = model(**inputs, start_positions=start, end_positions=end).loss
    logits = task.forward(model, batch)
    assert torch.allclose(task.loss(logits, batch), expected)
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_neither_the_loss_nor_what_is_kept(build_qa, side):
    task = build_qa(tokenizer=make_tokenizer(cls_last=side == "left"))
    rows = [task.train[i] for i in range(len(task.train))]
    model, alone = tiny(task), [task.collate([row]) for row in rows]
    model.bert.embeddings.position_embeddings.weight.zero_()  # transformers numbers the places of left padding too
    batch = task.collate(rows)
    logits = task.forward(model, batch)
    assert logits.shape == (len(rows), 2, 8)
    single = [task.forward(model, each) for each in alone]
    expected = torch.stack([task.loss(*pair) for pair in zip(single, alone, strict=True)]).mean()
    assert torch.allclose(task.loss(logits, batch), expected)

    parts = task.split(logits, batch)
    assert [part.shape for part in parts] == [(2, row["length"]) for row in rows]
    for part, whole in zip(parts, single, strict=True):
        assert torch.allclose(part, whole[0], atol=1e-6)
    assert torch.equal(task.join(parts, batch), logits)

    kept = task.predictions(logits.bfloat16(), batch)
    assert (kept.dtype, kept.shape) == (torch.float32, (len(rows), 2, 8))
    for row, part in zip(kept, task.split(logits.bfloat16(), batch), strict=True):
        assert torch.equal(row[:, : part.shape[1]], part.float())
        assert (row[:, part.shape[1] :] == PADDING).all()


# ------------------------------------------------------------------------------------------ metrics


def logits_of(task, *spans: tuple[int, int, float]) -> torch.Tensor:
    """Return logits of all windows, zero but for one span of each: first and last token, and its score."""
    logits = torch.zeros(len(task.validation), 2, 8)
    for window, (first, last, score) in zip(logits, spans, strict=True):
        window[0, first] = window[1, last] = score / 2
    return logits


def test_the_best_window_of_a_question_answers_it(build_qa):
    rows = [question(LETTERS, "h i"), question("c d", "c", "d")]
    task = build_qa(rows)
    found = task.metrics(logits_of(task, (3, 3, 5.0), (4, 5, 6.0), (4, 5, 8.0), (3, 4, 1.0)), task.validation)
    assert list(found) == ["f1", "exact_match"]
    assert found == pytest.approx({"f1": (1 + 2 / 3) / 2, "exact_match": 0.5})
    one = build_qa(rows, metrics=["exact_match"])
    assert one.metrics(torch.zeros(4, 2, 8), one.validation).keys() == {"exact_match"}


def test_no_answer_is_predicted_only_where_there_may_be_none(build_qa, tmp_path):
    answered, none = question("c d", "d"), question("e f")
    null, span = (0, 0, 5.0), (4, 4, 4.0)
    write(tmp_path / "more.jsonl", [none, answered])
    task = build_qa([answered, none], more_validation=["more.jsonl"])
    for spans, expected in [((span, null), 1), ((null, null), 0.5), ((span, span), 0.5), ((null, span), 0)]:
        assert task.metrics(logits_of(task, *spans), task.validation)["f1"] == expected
    assert task.metrics(logits_of(task, null, span), task.more_validation["more"])["f1"] == 1
    always = build_qa([answered])
    predictions = logits_of(always, null)
    predictions[0, :, 4] = 1.0
    assert always.metrics(predictions, always.validation)["f1"] == 1


def test_no_answer_needs_every_window_to_say_so(build_qa):
    task = build_qa([question(LETTERS)])
    predictions = logits_of(task, (0, 0, 5.0), (0, 0, 4.0), (0, 0, 9.0))
    assert task.metrics(predictions, task.validation)["f1"] == 1
    predictions[0, :, 4] = 2.25  # a span's score of 4.5, more than the least of the three
    assert task.metrics(predictions, task.validation)["f1"] == 0


def test_answers_are_no_longer_than_asked_and_within_the_context(build_qa):
    rows = [question("c d e f", "d e")]
    predictions = torch.zeros(1, 2, 8)
    predictions[0, :, :3] = 9.0  # the question's
    predictions[0, 0, 3], predictions[0, 0, 4], predictions[0, 1, 5] = 5.0, 4.0, 6.0
    for longest, expected in [(2, 1), (3, 0)]:
        task = build_qa(rows, longest_answer=longest)
        assert task.metrics(predictions, task.validation)["exact_match"] == expected, "d e, and with three tokens c d e"


def test_an_empty_context_has_no_answer(build_qa):
    task = build_qa([question(""), TRAIN[1]])
    assert task.train["label"][0] == [0, 0]
    assert task.metrics(torch.zeros(2, 2, 8), task.validation).keys() == {"f1", "exact_match"}


# ------------------------------------------------------------------------------------------ models


def test_a_model_of_other_labels_is_refused(build_qa):
    task = build_qa()
    task.check_teacher(BertConfig(), task.tokenizer)
    with pytest.raises(UserError, match="the teacher has 3 labels; question answering allows 2, a start and an end"):
        task.check_teacher(BertConfig(num_labels=3), task.tokenizer)
    assert task.count_train(None) is None
