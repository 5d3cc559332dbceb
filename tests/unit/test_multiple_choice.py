"""Several texts of which one is right: what is read of the data, in which form, and what becomes of it."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoConfig, BertConfig

from distprune.config import Config, TaskConfig
from distprune.errors import UserError
from distprune.tasks.choices import find_choices
from distprune.tasks.data import Split
from tests.unit.task_files import CLS, PAD, SEP, WORDS, ids, make_tokenizer


def one(question="a b", choices=("c", "d e"), answer=0, **more) -> dict:
    return {"question": question, "options": list(choices), "answer": answer, **more}


ROWS = [one(), one("a", ("f", "g"), 1), one("c d e f", ("a b c", "d"), 0)]
OPTIONS = {"name": "multiple_choice", "text": ["question"], "choices": ["options"], "label": "answer"}


@pytest.fixture
def choices(build):
    """Return a function that builds the task from rows of questions."""

    def run(rows=ROWS, held=None, **options):
        return build(rows, rows if held is None else held, **(OPTIONS | options))

    return run


def pair(first: str, second: str) -> list[int]:
    return [*ids(first), *ids(second)[1:]]


# ---------------------------------------------------------------------------------- what is read


def test_each_choice_is_read_with_the_question(choices):
    task = choices()
    assert set(task.train.column_names) == {"input_ids", "token_type_ids", "label", "length", "_row"}
    assert task.train[0] == {
        "input_ids": [pair("a b", "c"), pair("a b", "d e")],
        "token_type_ids": [[0] * 4 + [1] * 2, [0] * 4 + [1] * 3],
        "label": 0,
        "length": 7,
        "_row": 0,
    }
    assert (task.train["label"][:], task.train["length"][:]) == ([0, 1, 0], [7, 5, 10])


def test_choices_are_a_column_or_a_part_of_one_or_a_column_each(choices):
    expected = choices().train["input_ids"][:]
    inside = [{**row, "options": {"label": ["A", "B"], "text": row["options"]}} for row in ROWS]
    assert choices(inside, choices=["options.text"]).train["input_ids"][:] == expected
    columns = [{**row, "first": row["options"][0], "other": row["options"][1]} for row in ROWS]
    assert choices(columns, choices=["first", "other"]).train["input_ids"][:] == expected


def test_choices_that_look_like_numbers_are_texts(choices, tmp_path):
    (tmp_path / "sums.csv").write_text("question,first,other,answer\na,0.50,3,0\nb,1,04,1\n")
    sums = {"train": str(tmp_path / "sums.csv"), "validation": str(tmp_path / "sums.csv")}
    task = choices(choices=["first", "other"], form=["{question} {choice}"], **sums)
    assert len(task.train) == 2


def test_the_form_is_one_text_or_a_pair(choices):
    rows = [one(choices=("c", "d e"), more="i j")]
    single = choices(rows, form=["{more} {question} {choice}"], text=["question", "more"])
    assert single.train["input_ids"][0] == [ids("i j a b c"), ids("i j a b d e")]
    two = choices(rows, form=["{more}", "a {question} {choice} b"], text=["question", "more"])
    assert two.train["input_ids"][0] == [pair("i j", "a a b c b"), pair("i j", "a a b d e b")]
    joined = choices(rows, text=["question", "more"])
    assert joined.train["input_ids"][0] == [pair("a b i j", "c"), pair("a b i j", "d e")]


def test_braces_in_texts_are_text(choices):
    tokenizer = make_tokenizer([*WORDS, "{", "}", "choice"])
    rows = [one("{choice} a", ("{", "}")), one("{0} {", ("{choice}", "b"))]
    task = choices(rows, tokenizer=tokenizer, form=["{{ {question} {choice}"])
    decoded = [[tokenizer.decode(each[1:-1]) for each in row] for row in task.train["input_ids"][:]]
    assert decoded == [
        ["{ { choice } a {", "{ { choice } a }"],
        ["{ { [UNK] } { { choice }", "{ { [UNK] } { b"],
    ]


def test_forms_that_cannot_be_used(choices):
    for form, message in [
        (["{questoin}", "{choice}"], r"\{questoin\} of .* is no column of task.text: 'questoin' is unknown \(did you"),
        (["{question.__class__}", "{choice}"], r"is unknown .*allowed: question, choice"),
        (["{question!r}", "{choice}"], "'question!r' is unknown"),
        (["{question:>9}", "{choice}"], "'question:>9' is unknown"),
        (["{}", "{choice}"], "'' is unknown"),
        (["{question", "{choice}"], r"'\{question' cannot be read: .*; allowed: columns in braces"),
        (["{question}"], r"allowed: one text with \{choice\}, or two"),
        (["{choice}", "{question}"], r"allowed: one text with \{choice\}, or two with it in the second"),
        (["{question}", "{question}", "{choice}"], "allowed: one text"),
    ]:
        with pytest.raises(UserError, match=message):
            choices(form=form)
    with pytest.raises(UserError, match=r"allowed: other columns than 'choice'"):
        choices(text=["choice"], form=["{choice}"])


# ---------------------------------------------------------------------------------- answers and bad rows


@pytest.mark.parametrize(
    ("answers", "labels"),
    [([0, 1], []), (["0", "1"], []), (["A", "B"], []), (["1", "2"], ["1", "2"]), ([1, 2], ["1", "2"])],
)
def test_answers_are_numbers_or_letters_or_named(choices, answers, labels):
    rows = [one(answer=answer) for answer in answers]
    assert choices(rows, labels=labels).train["label"][:] == [0, 1]


def test_rows_that_cannot_be_used_are_refused_or_left_out(choices):
    good = [one(), one("b")]
    for bad, message in [
        (one(choices=("a", "b", "c")), "1 of 3 rows of train.jsonl have not 2 choices with text in options: row 3"),
        (one(choices=("a",)), "have not 2 choices"),
        (one(choices=("a", None)), "have not 2 choices"),
        (one(choices=("a", " ")), "have not 2 choices"),
        (one(answer=2), "have an answer in column 'answer' that is none of 0 to 1 or A to B: row 3"),
        (one(answer=-1), "have an answer in column 'answer'"),
        (one(answer=None), "have no value in column 'answer'"),
        (one(question=None), "have no value in column 'question'"),
    ]:
        with pytest.raises(UserError, match=message + r".*; allowed: none, or task\.bad_rows=skip"):
            choices([*good, bad], good)
        task = choices([bad, *good] if bad["question"] is None else [*good, bad], good, bad_rows="skip")
        assert (len(task.train), len(task.notes)) == (2, 1)
        assert task.notes[0].endswith("; left out")


def test_data_that_cannot_be_used(choices):
    named = [one(answer=answer) for answer in ("0", "1", "2")]
    for rows, options, message in [
        (ROWS, {"choices": []}, "task.choices is empty"),
        (ROWS, {"choices": ["optoins"]}, r"'optoins' is unknown \(did you mean 'options'"),
        (ROWS, {"choices": ["options.text"]}, "part of column 'options' of train.jsonl 'text' is unknown"),
        (ROWS, {"choices": ["question"]}, "'question' of train.jsonl holds .*one column of lists of texts, or"),
        (ROWS, {"choices": ["options", "question"]}, "'options' of train.jsonl holds .*or a column of texts"),
        ([one(choices=["a"])], {}, "rows of train.jsonl have 1 choices"),
        (ROWS, {"label": "options"}, "'options' of train.jsonl holds .*answers are whole numbers or texts"),
        (ROWS, {"labels": ["a", "b", "c"]}, "task.labels names 3 answers; allowed: one for each of 2 choices"),
        (named, {}, "1 of 3 rows of train.jsonl have an answer in column 'answer' that is none of 0 to 1"),
        ([one(answer="B"), one(answer="1")], {}, "'answer' of train.jsonl are letters and numbers; allowed: one of"),
        (
            [one(answer=1), one(answer=2)],
            {"bad_rows": "skip"},
            r"'answer' of train.jsonl count from 1; allowed: from 0, or task.labels=\[1,2\]",
        ),
        (ROWS, {"metrics": ["f1"]}, "metric of multiple_choice 'f1' is unknown; allowed: accuracy"),
        (ROWS, {"max_length": 4}, "task.max_length is 4; this tokenizer and 2 text columns allow 5"),
    ]:
        with pytest.raises(UserError, match=message):
            choices(rows, **options)


def test_only_the_first_text_is_cut(choices):
    task = choices([one("a b c d e", ("f g", "h"))], max_length=7)
    assert task.train["input_ids"][0] == [pair("a b", "f g"), pair("a b c", "h")]
    assert task.train["length"][:] == [7]
    assert task.notes[0] == "1 of 1 rows of train.jsonl have more than task.max_length 7 tokens: row 1; cut short"
    short = choices([one("a", ("f g h i j", "h"))], max_length=7)
    assert [len(each) for each in short.train["input_ids"][0]] == [7, 5], "a choice that is too long is cut as well"
    assert len(short.notes) == 2
    with pytest.raises(UserError, match=r"more than task\.max_length 7 tokens"):
        choices([one("a b c d e", ("f g", "h"))], max_length=7, too_long="refuse")
    exact = choices([one("a", ("f g h", "h"))], max_length=7, too_long="refuse")
    assert exact.train["length"][:] == [7]


def test_the_training_rows_are_counted_where_they_can_be(choices):
    task, config = choices(), Config()
    for key, value in (OPTIONS | {"train": "train.jsonl", "validation": "validation.jsonl", "limit": 2}).items():
        setattr(config.task, key, value)
    assert type(task).count_train(config) == 2
    config.task.bad_rows = "skip"
    assert type(task).count_train(config) is None


# ---------------------------------------------------------------------------------- batches and loss


def test_the_loss_is_the_models_own(choices, tmp_path):
    BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    ).save_pretrained(tmp_path / "model")
    task = choices()
    batch = task.collate([task.train[i] for i in range(3)])
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == batch["attention_mask"].shape == (3, 2, 10)
    assert batch["input_ids"][0, 0].tolist() == pair("a b", "c") + [PAD] * 4
    model = task.auto_class.from_config(AutoConfig.from_pretrained(tmp_path / "model", **task.model_options())).eval()
    logits = task.forward(model, batch)
    assert logits.shape == (3, 2)
    assert torch.allclose(task.loss(logits, batch), model(**batch).loss)
    assert task.loss(logits.bfloat16(), batch).dtype == torch.float32
    assert torch.equal(task.join(task.split(logits, batch), batch), logits)
    alone = torch.cat([task.forward(model, task.collate([task.train[i]])) for i in range(3)])
    assert torch.allclose(alone, logits, atol=1e-6)


def test_accuracy_is_of_the_highest_score(choices):
    task = choices()
    assert task.metrics(torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]]), task.train) == {"accuracy": 2 / 3}


def test_a_teacher_of_pairs_must_be_given_token_types(choices):
    without = make_tokenizer(model_input_names=["input_ids", "attention_mask"])
    task = choices(tokenizer=without)
    assert "token_type_ids" not in task.train.column_names
    with pytest.raises(UserError, match="by token_type_ids"):
        task.check_teacher(BertConfig(), make_tokenizer())
    choices(tokenizer=without, form=["{question} {choice}"]).check_teacher(BertConfig(), make_tokenizer())
    choices().check_teacher(BertConfig(), make_tokenizer())
    with pytest.raises(UserError, match="vocabulary"):
        choices().check_teacher(BertConfig(), make_tokenizer([*WORDS, "k"]))


def test_separators_are_where_the_tokenizer_puts_them():
    assert pair("a", "b") == [CLS, WORDS.index("a"), SEP, WORDS.index("b"), SEP]


def test_named_answers_of_hub_data_are_their_names_where_labels_are_given():
    features = Features(
        {"text": Value("string"), "choices": List(Value("string")), "answer": ClassLabel(names=["1", "2"])}
    )
    rows = {"text": ["a"] * 4, "choices": [["b", "c"]] * 4, "answer": [0, 1, 1, 0]}
    split = Split(Dataset.from_dict(rows, features).add_column("_row", range(4)), "here")
    for labels, places in (([], [0, 1, 1, 0]), (["1", "2"], [0, 1, 1, 0]), (["2", "1"], [1, 0, 0, 1])):
        task = TaskConfig(text=["text"], choices=["choices"], label="answer", labels=labels)
        assert find_choices(split, task).of(split, task, [])["label"][:] == places
