"""Labels in the data, and the classes that they stand for."""

import pytest

from distprune.errors import UserError
from tests.unit.task_files import labelled

# --------------------------------------------------------------------------------------------- labels


def test_class_names_are_sorted_or_as_given(build):
    rows = labelled("pos", "neg", "pos", "mid")
    task = build(rows, labelled("mid"))
    assert task.model_options()["label2id"] == {"mid": 0, "neg": 1, "pos": 2}
    assert (task.train["label"][:], task.validation["label"][:]) == ([2, 1, 2, 0], [0])
    assert build(rows, labelled("mid"), labels=["neg", "mid", "pos"]).train["label"][:] == [2, 0, 2, 1]


def test_numbered_classes_can_be_named(build):
    assert "id2label" not in build().model_options(), "the model's own names stay"
    assert build(labels=["bad", "good", "?"]).model_options()["id2label"] == {0: "bad", 1: "good", 2: "?"}
    booleans = build(labelled(False, True))
    assert booleans.train["label"][:] == [0, 1]
    assert booleans.model_options()["num_labels"] == 2


def test_truth_values_have_their_own_names_in_any_order(build):
    turned = build(labelled(False, True), labels=["True", "False"])
    assert turned.train["label"][:] == [1, 0]
    assert turned.model_options()["id2label"] == {0: "True", 1: "False"}
    assert build(labelled(False, True), labels=["bad", "good"]).train["label"][:] == [0, 1]
    assert build(labelled(1, 0), labels=["true", "false"]).train["label"][:] == [1, 0], "numbers are named as they say"


def test_classes_do_not_depend_on_the_examples_drawn(build):
    rows = labelled(*[0] * 30, 1, 2)
    for seed in range(3):
        assert build(rows, labelled(0), seed=seed, limit=2).model_options()["num_labels"] == 3


def test_whole_numbers_that_are_listed_are_classes_in_that_order(build):
    task = build(labelled(1, 2, 3), labelled(3, 1), labels=["3", "1", "2"])
    assert task.train["label"][:] == [1, 2, 0]
    assert task.validation["label"][:] == [0, 1]
    assert task.model_options()["id2label"] == {0: "3", 1: "1", 2: "2"}
    assert build(labelled(-1, 0, 1), labelled(-1), labels=["-1", "0", "1"]).train["label"][:] == [0, 1, 2]
    stray = build(labelled(1, 2, 3, 99), labelled(3), labels=["1", "2", "3"], bad_rows="skip")
    assert stray.train["label"][:] == [0, 1, 2], "one that is not listed moves none of the others"
    stars = build(labelled(0, 1, 2, 99), labelled(2), labels=["1", "2", "3"], bad_rows="skip")
    assert stars.train["label"][:] == [0, 1, 2], "names of the numbers, as most of these are places in the list"


def test_labels_that_cannot_be_used(build):
    for rows, held, options, message in [
        (
            labelled(0, 1),
            labelled(2),
            {},
            "1 of 1 rows of validation.jsonl have label 2 in column 'label', which is none of the classes 0, 1: row 1",
        ),
        (labelled(0, 2), labelled(0), {}, "are 0, 2; they must be 0, 1, ... without gaps"),
        (labelled(1, 2), labelled(1), {}, "without gaps, or task.labels"),
        (
            labelled(0, 2),
            labelled(0),
            {"labels": ["x", "y"]},
            "train.jsonl have label 2 .*none of the classes 0, 1: row 2; allowed: none, or task.bad_rows=skip",
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
            "validation.jsonl have label 'w' .* none of the classes 'x', 'y'",
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
            "2 of 2 rows of train.jsonl have no finite number in column 'label': rows 1, 2",
        ),
        (labelled(0, 1, 2), labelled(1), {"metrics": ["f1"]}, "'f1' needs 2 classes"),
        (labelled(0, 1), labelled(1), {"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
    ]:
        with pytest.raises(UserError, match=message):
            build(rows, held, **options)


def test_a_number_that_is_not_finite_is_refused(build):
    rows = [{"sentence": "a", "label": 1e300}, {"sentence": "a", "label": 1.0}]
    with pytest.raises(UserError, match="have no finite number"):
        build(rows, regression=True, metrics=["pearson"])


def test_rows_that_cannot_be_used_are_left_out_where_that_is_asked_for(build):
    rows = [{"sentence": "a", "label": label} for label in ("1.5", "n/a", "2", "x")]
    task = build(rows, [{"sentence": "a", "label": "3"}], regression=True, bad_rows="skip")
    assert task.train["label"][:] == [1.5, 2.0]
    assert task.notes == ["2 of 4 rows of train.jsonl have no finite number in column 'label': rows 2, 4; left out"]
    holes = [{"sentence": text, "label": label} for text, label in (("a", 0), (None, 1), ("b", 1))]
    task = build(holes, labelled(0, 5), bad_rows="skip")
    assert (task.train["label"][:], task.validation["label"][:]) == ([0, 1], [0])
    assert [note.split(": ")[1] for note in task.notes] == ["row 2; left out", "row 2; left out"]
    task = build(labelled(1, None, 0, 1), labelled(0, 1), suffix=".csv", bad_rows="skip")
    assert task.train["label"][:] == [1, 0, 1], "a table with a hole holds whole numbers as others"
    with pytest.raises(UserError, match=r"no row of train.jsonl can be used: 2 of 2 rows .* have no finite number in"):
        build(labelled("x", "y"), labelled("1"), regression=True, bad_rows="skip")


def test_texts_that_are_too_long_are_counted(build):
    rows = [{"sentence": text, "label": n % 2} for n, text in enumerate(("a", "a b c d", "a b", "a b c d e"))]
    cut = "2 of 4 rows of train.jsonl have more than task.max_length 4 tokens: rows 2, 4"
    task = build(rows, max_length=4)
    assert (task.train["length"][:], task.notes) == ([3, 4, 4, 4], [f"{cut}; cut short"])
    task = build(rows, max_length=4, too_long="skip")
    assert (task.train["length"][:], task.notes) == ([3, 4], [f"{cut}; left out"])
    with pytest.raises(UserError, match=cut):
        build(rows, max_length=4, too_long="refuse")
    assert build(rows, max_length=7, too_long="refuse").notes == []
