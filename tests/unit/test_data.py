"""Files and hub data in, tokens out."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from distprune.config import TaskConfig
from distprune.errors import UserError
from distprune.tasks.data import load_splits
from tests.unit.task_files import CLS, SEP, TRAIN, UNK, WORDS, ids, labelled, make_tokenizer, write

# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_tokens(build, suffix):
    task = build(suffix=suffix)
    assert set(task.train.column_names) == {"input_ids", "token_type_ids", "label", "length", "_row"}
    assert task.train["input_ids"][:] == [ids(row["sentence"]) for row in TRAIN]
    assert task.train["label"][:] == [row["label"] for row in TRAIN]
    assert task.train["length"][:] == [len(row["sentence"].split()) + 2 for row in TRAIN]
    assert task.validation["input_ids"][1] == [CLS, WORDS.index("c"), UNK, SEP]


def test_a_text_file_is_a_row_a_line(tmp_path):
    text = 'NA\n\n"a" b\n'
    (tmp_path / "lines.txt").write_text(text)
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    task = TaskConfig(train=str(tmp_path / "lines.txt"), validation=str(tmp_path / "packed.txt.gz"))
    splits = load_splits(task, ["text"], [])
    assert [splits.train.rows["text"][:], splits.validation.rows["text"][:]] == [["NA", "", '"a" b']] * 2


def test_fields_in_quotes_are_told_of_where_quotes_are_text(build):
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(['"a"', 'b "c', "d"])]
    notes = build(rows, suffix=".tsv").notes
    assert notes == ["fields in quotes in train.tsv: 1; quotes are text in .tsv, and not in .csv"]


def test_words_that_look_like_missing_values_are_text(build):
    rows = [{"sentence": text, "label": i % 2} for i, text in enumerate(["null", "NA", ""])]
    assert build(rows, suffix=".csv").train["input_ids"][:] == [ids("null"), ids("NA"), ids("")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_texts_that_look_like_numbers_are_text(build, suffix):
    task = build(labelled(0, 1, sentence="2012"), labelled(0, 1, sentence="007"), suffix=suffix)
    assert [task.train["input_ids"][0], task.validation["input_ids"][0]] == [ids("2012"), ids("007")]


def test_rows_without_tokens_are_refused_or_left_out(build):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")  # as of decoders
    rows = [*labelled(0, 1), *labelled(1, sentence="")]
    with pytest.raises(
        UserError, match=r"1 of 3 rows of train.jsonl have no tokens: row 3; allowed: none, or task.bad"
    ):
        build(rows, tokenizer=tokenizer)
    task = build(rows, tokenizer=tokenizer, bad_rows="skip")
    assert len(task.train) == 2
    assert "1 of 3 rows of train.jsonl have no tokens: row 3; left out" in task.notes


def test_quotes_in_tab_separated_files_are_text(build):
    rows = labelled(0, 1, sentence='"a b') + labelled(1, sentence='c" d')
    assert build(rows, suffix=".tsv").train["label"][:] == [0, 1, 1]


def test_a_path_with_glob_characters_is_a_path(build, tmp_path):
    (tmp_path / "data[1]").mkdir()
    write(tmp_path / "data[1]" / "some*.jsonl", TRAIN)
    assert len(build(labelled(0, 1), train="data[1]/some*.jsonl").train) == len(TRAIN)


def test_a_changed_file_is_read_again_whatever_its_time(build, tmp_path):
    file = tmp_path / "more.jsonl"
    for labels in [0, 1], [1, 0], [0, 1]:
        write(file, labelled(*labels))
        os.utime(file, (1e9, 1e9))
        assert build(train="more.jsonl").train["label"][:] == labels


def test_pairs_share_the_length_and_differ_in_token_type(build):
    rows = [{"q": "a b c d e f", "p": "g", "label": i} for i in range(2)]
    task = build(rows, rows, text=["q", "p"], max_length=7)
    tokens = [CLS, *(WORDS.index(word) for word in "abc"), SEP, WORDS.index("g"), SEP]
    assert task.train[0] == {
        "input_ids": tokens,
        "token_type_ids": [0] * 5 + [1] * 2,
        "label": 0,
        "length": 7,
        "_row": 0,
    }


def test_columns_that_cannot_be_used(build):
    for options, message in [
        ({"text": ["sentense"]}, r"train.jsonl 'sentense' is unknown \(did you mean 'sentence'\?\)"),
        ({"held": [{"sentence": "a", "y": 1}]}, "validation.jsonl 'label' is unknown; allowed: sentence, y"),
        (
            {"rows": [{"sentence": None, "label": 0}, *TRAIN]},
            "1 of 21 rows of train.jsonl have no value in column 'sentence': row 1;",
        ),
        ({"rows": [row | {"_row": 1} for row in TRAIN]}, "train.jsonl has a column '_row'; allowed: another name"),
        ({"held": labelled(0, None)}, "1 of 2 rows of validation.jsonl have no value in column 'label': row 2"),
        (
            {"rows": labelled(0, 1, None), "suffix": ".csv"},
            "1 of 3 rows of train.csv have no value in column 'label': row 3",
        ),
        (
            {"rows": labelled("x", "y", ""), "suffix": ".csv"},
            "1 of 3 rows of train.csv have no value in column 'label': row 3",
        ),
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


def test_a_split_of_hub_data_may_be_measured_beside_its_training(build, hub):
    task = build(hub=hub, subset="main", train="train", validation="dev", more_validation=["train"])
    labels = {name: rows["label"][:] for name, rows in task.evaluations().items()}
    assert labels == {"": [2, 1], "train/": [0, 1, 2]}


def test_a_file_beside_a_hub_data_set_is_refused_before_the_network_is_asked(build):
    with pytest.raises(UserError, match=r"task\.hub is nobody/nothing, and mine\.jsonl is a file; .* null$"):
        build(hub="nobody/nothing", train="mine.jsonl", validation="dev")


def test_a_split_may_have_a_dot_in_its_name(build, hub):
    with pytest.raises(UserError, match=r"split of the data set .*train\.clean"):
        build(hub=hub, subset="main", train="train.clean", validation="dev")


def test_named_classes_of_hub_data_can_be_put_into_the_order_of_a_teacher(build, hub):
    task = build(hub=hub, subset="main", train="train", validation="dev", labels=["no", "maybe", "yes"])
    assert task.train["label"][:] == [2, 1, 0]


def test_hub_data_that_cannot_be_used(build, hub, tmp_path):
    for options, message in [
        ({"validation": "validation"}, r"'validation' is unknown; allowed: train, dev, test"),
        ({"validation": "tset"}, r"main\) 'tset' is unknown \(did you mean 'test'\?\)"),
        (
            {"validation": "test"},
            r"split 'test' of .* have label -1 in column 'label', which is none of the classes 'yes', ",
        ),
        ({"labels": ["y", "n", "m"]}, "none of the classes 'y', 'n', 'm'"),
        ({"subset": "mian"}, "cannot be loaded: .*mian.*main"),
        ({"hub": str(tmp_path / "nowhere")}, "nowhere.* cannot be loaded"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**({"hub": hub, "subset": "main", "train": "train", "validation": "dev"} | options))


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


def test_a_holdout_that_leaves_a_part_empty_is_refused(build):
    for options, message in [
        ({"holdout": 0.01}, "holds 0 of 20"),
        ({"holdout": 0.99}, "holds 20 of 20"),
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
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from distprune.config import Config
from distprune.tasks import build_task

tokenizer = AutoTokenizer.from_pretrained("moved")
tokenizer(["a b", "c"], padding=True, truncation=True, max_length=3)  # leaves traces in the tokenizer
calls = []
encode = PreTrainedTokenizerFast._encode_plus
PreTrainedTokenizerFast._encode_plus = lambda *args, **options: calls.append(1) or encode(*args, **options)
config = Config()
config.train.seed = 0
config.task.train, config.task.validation = "train.jsonl", "validation.jsonl"
for config.task.limit in (10, None):
    build_task(config, tokenizer)
    print(len(calls))
"""


@pytest.mark.slow
def test_another_process_finds_the_tokens_in_the_cache(build, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    build(tokenizer=AutoTokenizer.from_pretrained("tokenizer"), limit=10)
    (tmp_path / "tokenizer").rename(tmp_path / "moved")  # as a checkpoint's is
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    env["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COUNT_CALLS]
    output = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert output.split() == ["0", "1"]  # what was tokenised before, then all of the training examples


def test_a_tokenizer_is_left_as_it_was_for_the_files_that_it_will_be_written_to(build, tmp_path):
    tokenizer = make_tokenizer()
    build(tokenizer=tokenizer, max_length=3)
    tokenizer.save_pretrained(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "tokenizer.json").read_text())["truncation"] is None


def test_the_cache_does_not_mix_tokenizers_and_lengths(build):
    build()
    swapped = make_tokenizer([*WORDS[:4], *reversed(WORDS[4:])])
    assert build(tokenizer=swapped).train[0]["input_ids"] != build().train[0]["input_ids"]
    assert max(build(max_length=3).train["length"]) == 3


def test_a_csv_columns_type_is_that_of_all_its_rows(build):
    rows = [{"sentence": "a", "label": 1}] * 10_000 + [{"sentence": "b", "label": 0.5}]
    task = build(rows, rows[:2], suffix=".csv", regression=True, metrics=["pearson"])
    assert task.train["label"][-1] == 0.5
