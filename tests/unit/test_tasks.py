import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)

from distprune.config import Config
from distprune.errors import UserError
from distprune.tasks import Task, build_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "null", "NA"]
PAD, UNK, CLS, SEP = range(4)

DEFAULTS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "model_max_length": 512,
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}


def make_tokenizer(words: list[str] = WORDS, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    options = DEFAULTS | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def ids(text: str) -> list[int]:
    return [CLS, *(WORDS.index(word) if word in WORDS else UNK for word in text.split()), SEP]


def write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows)
    match "".join(path.suffixes):
        case ".parquet":
            table.to_parquet(path)
        case ".csv" | ".csv.gz":
            table.to_csv(path, index=False)
        case ".tsv":
            lines = [
                "\t".join(table.columns),
                *("\t".join(map(str, row)) for row in table.itertuples(index=False)),
            ]
            path.write_text("\n".join(lines) + "\n")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRAIN = [{"sentence": " ".join("abcdefghij"[: 1 + i % 5]), "label": i % 2} for i in range(20)]
VALIDATION = [{"sentence": "a b", "label": 0}, {"sentence": "c zzz", "label": 1}]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return a function that writes the two files and builds the task from them."""
    monkeypatch.chdir(tmp_path)

    written = {}

    def run(rows=TRAIN, held=VALIDATION, suffix=".jsonl", seed=0, tokenizer=None, **options) -> Task:
        for name, content in {f"train{suffix}": rows, f"validation{suffix}": held}.items():
            if written.get(name) != content:
                write(tmp_path / name, content)
                written[name] = content
        config = Config()
        config.train.seed = seed
        for key, value in ({"train": f"train{suffix}", "validation": f"validation{suffix}"} | options).items():
            assert hasattr(config.task, key)
            setattr(config.task, key, value)
        return build_task(config, tokenizer or make_tokenizer(), tmp_path / "cache")

    return run


def labelled(*labels, sentence="a b") -> list[dict]:
    return [{"sentence": sentence, "label": label} for label in labels]


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_tokens(build, suffix):
    task = build(suffix=suffix)
    assert set(task.train.column_names) == {"input_ids", "token_type_ids", "label", "length"}
    assert task.train["input_ids"][:] == [ids(row["sentence"]) for row in TRAIN]
    assert task.train["label"][:] == [row["label"] for row in TRAIN]
    assert task.train["length"][:] == [len(row["sentence"].split()) + 2 for row in TRAIN]
    assert task.validation["input_ids"][1] == [CLS, WORDS.index("c"), UNK, SEP]


def test_words_that_look_like_missing_values_are_text(build):
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(["null", "NA", ""])]
    assert build(rows, suffix=".csv").train["input_ids"][:] == [ids("null"), ids("NA"), ids("")]


def test_quotes_in_tab_separated_files_are_text(build):
    rows = labelled(0, 1, sentence='"a b') + labelled(1, sentence='c" d')
    assert build(rows, suffix=".tsv").train["label"][:] == [0, 1, 1]


def test_a_path_with_glob_characters_is_a_path(build, tmp_path):
    (tmp_path / "data[1]").mkdir()
    write(tmp_path / "data[1]" / "some*.jsonl", TRAIN)
    assert len(build(labelled(0, 1), train="data[1]/some*.jsonl").train) == len(TRAIN)


def test_a_changed_file_is_read_again(build):
    build(labelled(0, 1))
    assert build(labelled(0, 1, 1)).train["label"][:] == [0, 1, 1]


def test_pairs_share_the_length_and_differ_in_token_type(build):
    rows = [{"q": "a b c d e f", "p": "g", "label": i} for i in range(2)]
    task = build(rows, rows, text=["q", "p"], max_length=7)
    tokens = [CLS, *(WORDS.index(word) for word in "abc"), SEP, WORDS.index("g"), SEP]
    assert task.train[0] == {
        "input_ids": tokens,
        "token_type_ids": [0] * 5 + [1] * 2,
        "label": 0,
        "length": 7,
    }


def test_files_that_cannot_be_used(build, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"sentence": "a"\n')
    (tmp_path / "header.csv").write_text("sentence,label\n")
    (tmp_path / "plain.jsonl.gz").write_text("not compressed")
    pd.DataFrame({"sentence": ["a"], "label": [0]})[:0].to_parquet(tmp_path / "none.parquet")
    for options, message in [
        ({"train": "trian.jsonl"}, "file trian.jsonl does not exist"),
        ({"train": "train.txt"}, r"train.txt has an unknown suffix; allowed: \.jsonl, .*task\.hub"),
        ({"train": "train"}, "unknown suffix"),
        ({"train": "empty.jsonl"}, "empty.jsonl cannot be read, or is empty"),
        ({"train": "header.csv"}, "header.csv cannot be read, or is empty"),
        ({"train": "broken.jsonl"}, "broken.jsonl cannot be read"),
        ({"train": "plain.jsonl.gz"}, "plain.jsonl.gz cannot be read"),
        ({"train": "none.parquet"}, "none.parquet cannot be read, or is empty"),
        ({"train": "validation.jsonl"}, r"both 'validation.jsonl'; set task\.holdout"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**options)


def test_columns_that_cannot_be_used(build):
    for options, message in [
        ({"text": ["sentense"]}, r"train.jsonl 'sentense' is unknown \(did you mean 'sentence'\?\)"),
        ({"held": [{"sentence": "a", "y": 1}]}, "validation.jsonl 'label' is unknown; allowed: sentence, y"),
        ({"text": []}, "it must name one column, or two"),
        ({"text": ["a", "b", "c"]}, "it must name one column, or two"),
        ({"text": ["label"]}, "both task.text and task.label"),
        (
            {"rows": [{"sentence": None, "label": 0}, *TRAIN]},
            "'sentence' of train.jsonl has no value in 1 of 21",
        ),
        ({"held": labelled(0, None)}, "'label' of validation.jsonl has no value in 1 of 2"),
        ({"rows": labelled(0, 1, None), "suffix": ".csv"}, "'label' of train.csv has no value in 1 of 3"),
        ({"rows": labelled("x", "y", ""), "suffix": ".csv"}, "'label' of train.csv has no value in 1 of 3"),
        ({"rows": labelled(0, 1, sentence=5)}, "'sentence' of train.jsonl holds .*int64.*text"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**options)


# ------------------------------------------------------------------------------------------- hub data


@pytest.fixture
def hub(tmp_path, monkeypatch) -> str:
    """Return a directory that is laid out as a data set on the hub, with named classes."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # no request to a server
    folder = tmp_path / "hub"
    folder.mkdir()
    write(folder / "train.jsonl", labelled(0, 1, 2))
    write(folder / "dev.jsonl", labelled(2, 1))
    write(folder / "unlabelled.jsonl", labelled(-1))
    (folder / "README.md").write_text(
        """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: dev, path: dev.jsonl}
  - {split: test, path: unlabelled.jsonl}
dataset_info:
- config_name: main
  features:
  - {name: sentence, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': yes, '1': maybe, '2': no}}}
---
""".replace("yes", "'yes'").replace(" no}", " 'no'}")
    )
    return str(folder)


def test_classes_of_hub_data_have_names(build, hub):
    task = build(hub=hub, subset="main", train="train", validation="dev")
    assert task.model_options()["id2label"] == {0: "yes", 1: "maybe", 2: "no"}
    assert (task.train["label"][:], task.validation["label"][:]) == ([0, 1, 2], [2, 1])
    assert len(task.train) == 3


def test_named_classes_of_hub_data_can_be_put_into_the_order_of_a_teacher(build, hub):
    task = build(hub=hub, subset="main", train="train", validation="dev", labels=["no", "maybe", "yes"])
    assert task.train["label"][:] == [2, 1, 0]


def test_hub_data_that_cannot_be_used(build, hub, tmp_path):
    for options, message in [
        ({"validation": "validation"}, r"'validation' is unknown; allowed: train, dev, test"),
        ({"validation": "tset"}, r"main\) 'tset' is unknown \(did you mean 'test'\?\)"),
        (
            {"validation": "test"},
            r"label -1 in column 'label' of split 'test' of .* none of the classes 'yes', ",
        ),
        ({"labels": ["y", "n", "m"]}, "none of the classes 'y', 'n', 'm'"),
        ({"subset": "mian"}, "cannot be loaded: .*mian.*main"),
        ({"hub": str(tmp_path / "nowhere")}, "nowhere.* cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**({"hub": hub, "subset": "main", "train": "train", "validation": "dev"} | options))


# --------------------------------------------------------------------------------------------- labels


def test_class_names_are_sorted_or_as_given(build):
    rows = labelled("pos", "neg", "pos", "mid")
    task = build(rows, labelled("mid"))
    assert task.model_options()["label2id"] == {"mid": 0, "neg": 1, "pos": 2}
    assert (task.train["label"][:], task.validation["label"][:]) == ([2, 1, 2, 0], [0])
    assert build(rows, labelled("mid"), labels=["neg", "mid", "pos"]).train["label"][:] == [2, 0, 2, 1]


def test_numbered_classes_can_be_named(build):
    assert build().model_options()["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}
    assert build(labels=["bad", "good", "?"]).model_options()["id2label"] == {0: "bad", 1: "good", 2: "?"}
    assert build(labelled(False, True)).train["label"][:] == [0, 1]


def test_classes_do_not_depend_on_the_examples_drawn(build):
    rows = labelled(*[0] * 30, 1, 2)
    for seed in range(3):
        assert build(rows, labelled(0), seed=seed, limit=2).model_options()["num_labels"] == 3


def test_labels_that_cannot_be_used(build):
    for rows, held, options, message in [
        (
            labelled(0, 1),
            labelled(2),
            {},
            "label 2 in column 'label' of validation.jsonl is none of the classes 0, 1",
        ),
        (labelled(0, 2), labelled(0), {}, "are 0, 2; they must be 0, 1, ... without gaps"),
        (labelled(1, 2), labelled(1), {}, "without gaps, or task.labels"),
        (
            labelled(0, 2),
            labelled(0),
            {"labels": ["x", "y"]},
            "label 2 .* train.jsonl is none of the classes 0, 1",
        ),
        (
            labelled("x", "z"),
            labelled("x"),
            {"labels": ["x", "y"]},
            "label 'z' .* none of the classes 'x', 'y'",
        ),
        (
            labelled("x", "y"),
            labelled("w"),
            {},
            "label 'w' .* validation.jsonl is none of the classes 'x', 'y'",
        ),
        (labelled("0", "1"), labelled(0, 1), {}, "label 0, 1 .* none of the classes '0', '1'"),
        (labelled(0.5, 1), labelled(1), {}, "holds .*float64.*task.regression"),
        (labelled(1, "x"), labelled(1), {}, "train.jsonl holds "),
        (labelled("x", "x"), labelled("x"), {}, "one class"),
        (labelled("x", "y"), labelled("x"), {"labels": ["x", "x"]}, "names a class twice"),
        (
            labelled("x", "y"),
            labelled("x"),
            {"regression": True, "metrics": ["pearson"]},
            "task.regression needs numbers",
        ),
        (labelled(1, 2), labelled(1), {"regression": True, "labels": ["x"]}, "only one can be set"),
        (labelled(0, 1, 2), labelled(1), {"metrics": ["f1"]}, "'f1' needs 2 classes"),
        (labelled(0, 1), labelled(1), {"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
    ]:
        with pytest.raises(UserError, match=message):
            build(rows, held, **options)


def test_a_number_that_is_not_finite_is_refused(build):
    rows = [{"sentence": "a", "label": 1e300}, {"sentence": "a", "label": 1.0}]
    with pytest.raises(UserError, match="not finite"):
        build(rows, regression=True, metrics=["pearson"])


# ------------------------------------------------------------------------------------ holdout and limit

MANY = [
    {"sentence": "a", "label": i % 2, "text": f"{'abcdefghij'[i % 10]} {'abcdefghij'[i // 10]}"} for i in range(100)
]


def members(rows) -> set[tuple[int, ...]]:
    return {tuple(tokens) for tokens in rows["input_ids"]}


def test_holdout_is_the_same_for_all_seeds_and_apart_from_training(build):
    first = build(MANY, text=["text"], holdout=0.2, validation="train.jsonl", seed=1)
    other = build(MANY, text=["text"], holdout=0.2, validation="not/there.jsonl", seed=2, limit=50)
    assert (len(first.train), len(first.validation), len(other.train)) == (80, 20, 50)
    assert members(first.validation) == members(other.validation)
    assert members(first.train) | members(first.validation) == members(build(MANY, MANY, text=["text"]).train)
    assert members(other.train) < members(first.train)
    # the very rows: no change of code or numpy may move what was held out
    held = sorted(row["text"] for row in MANY if tuple(ids(row["text"])) in members(first.validation))
    assert held[:4] == ["a d", "c a", "c c", "c j"]


def test_limit_draws_by_the_seed(build):
    drawn = [members(build(MANY, MANY, text=["text"], limit=30, seed=seed).train) for seed in (0, 0, 1)]
    assert [len(rows) for rows in drawn] == [30] * 3
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(build(limit=1000).train) == len(TRAIN)


def test_holdout_and_limit_that_cannot_be_used(build):
    for options, message in [
        ({"holdout": 1.0}, "at least 0 and below 1"),
        ({"holdout": -0.1}, "at least 0 and below 1"),
        ({"holdout": 0.01}, "holds 0 of 20"),
        ({"holdout": 0.99}, "holds 20 of 20"),
        ({"limit": 0}, "task.limit is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**options)


# ----------------------------------------------------------------------------------------- tokenisation


def test_truncation_keeps_max_length_tokens(build):
    task = build(max_length=4)
    assert max(task.train["length"]) == 4
    assert task.train[4]["input_ids"] == [CLS, WORDS.index("a"), WORDS.index("b"), SEP]


def test_max_length_out_of_range(build):
    with pytest.raises(UserError, match="max_length is 513; this tokenizer and 1 text columns allow 3 to 512"):
        build(max_length=513)
    rows = [{"q": "a", "p": "b", "label": i} for i in range(2)]
    with pytest.raises(UserError, match=r"max_length is 4; .* allow 5 to 512"):
        build(rows, rows, text=["q", "p"], max_length=4)


def test_a_tokenizer_without_padding_is_refused(build):
    with pytest.raises(UserError, match="no padding token"):
        build(tokenizer=make_tokenizer(pad_token=None))


@pytest.mark.parametrize("disabled", [False, True])
def test_no_progress_bar_and_the_setting_is_restored(build, capfd, disabled):
    (disable_progress_bars if disabled else enable_progress_bars)()
    build()
    assert are_progress_bars_disabled() == disabled
    assert capfd.readouterr() == ("", "")


COUNT_CALLS = """
from pathlib import Path
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from distprune.config import Config
from distprune.tasks import build_task

tokenizer = AutoTokenizer.from_pretrained("tokenizer")
tokenizer(["a b", "c"], padding=True, truncation=True, max_length=3)  # leaves traces in the tokenizer
calls = []
encode = PreTrainedTokenizerFast._encode_plus
PreTrainedTokenizerFast._encode_plus = lambda *args, **options: calls.append(1) or encode(*args, **options)
config = Config()
config.train.seed = 0
config.task.train, config.task.validation = "train.jsonl", "validation.jsonl"
for config.task.limit in (10, None):
    build_task(config, tokenizer, Path("cache"))
    print(len(calls))
"""


def test_another_process_finds_the_tokens_in_the_cache(build, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    build(tokenizer=AutoTokenizer.from_pretrained("tokenizer"), limit=10)
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", COUNT_CALLS]
    output = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert output.split() == ["0", "1"]  # what was tokenised before, then all of the training examples


def test_the_cache_does_not_mix_tokenizers_and_lengths(build):
    build()
    swapped = make_tokenizer([*WORDS[:4], *reversed(WORDS[4:])])
    assert build(tokenizer=swapped).train[0]["input_ids"] != build().train[0]["input_ids"]
    assert max(build(max_length=3).train["length"]) == 3


# ---------------------------------------------------------------------------------- batches, loss, metrics


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_pads_to_the_longest_of_the_batch(build, side):
    tokenizer = make_tokenizer(padding_side=side)
    tokenizer._pad_token_type_id = 5
    task = build(tokenizer=tokenizer)
    batch = task.collate([task.train[0], task.train[2]])
    short, long = ids("a"), ids("a b c")
    gap = [PAD] * 2
    expected = [short + gap, long] if side == "right" else [gap + short, long]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].tolist() == [[int(token != PAD) for token in row] for row in expected]
    assert batch["token_type_ids"].tolist() == [[0 if token != PAD else 5 for token in row] for row in expected]
    assert batch["labels"].tolist() == [0, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


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
    loss = build().loss(logits, torch.zeros(3, dtype=torch.long))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.log1p(logits[:, 1].float().exp()).mean())

    squared = build(regression=True, metrics=["pearson"]).loss(logits[:, 1:], torch.tensor([1.0, 0.0, 0.0]))
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
    values = task.metrics(-2 * batch["labels"][:, None], batch["labels"])
    assert list(values) == ["spearman", "pearson"]
    assert values["pearson"] == pytest.approx(-1)
    assert task.model_options() == {"num_labels": 1, "problem_type": "regression"}


def test_whole_numbers_can_be_regressed(build):
    task = build(labelled(1, 5), labelled(2), regression=True, metrics=["pearson"])
    assert task.train["label"][:] == [1.0, 5.0]


def test_metrics_come_in_the_order_of_the_configuration(build):
    task = build(metrics=["matthews", "accuracy", "f1"])
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert task.metrics(logits, torch.tensor([0, 1])) == {"matthews": 1.0, "accuracy": 1.0, "f1": 1.0}
    assert list(task.metrics(logits, torch.tensor([0, 1]))) == ["matthews", "accuracy", "f1"]


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
    assert torch.allclose(task.loss(output.logits, batch["labels"]), output.loss)


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


def test_an_unknown_task_names_the_nearest():
    config = Config()
    config.task.name = "text_clasification"
    with pytest.raises(UserError, match=r"task.name 'text_clasification' is unknown \(did you mean 'text_class"):
        build_task(config, make_tokenizer())
