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
        (labelled(0, 1, 2), labelled(1), {"metrics": ["f1"]}, "'f1' needs 2 classes"),
        (labelled(0, 1), labelled(1), {"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
    ]:
        with pytest.raises(UserError, match=message):
            build(rows, held, **options)


def test_a_number_that_is_not_finite_is_refused(build):
    rows = [{"sentence": "a", "label": 1e300}, {"sentence": "a", "label": 1.0}]
    with pytest.raises(UserError, match="not finite"):
        build(rows, regression=True, metrics=["pearson"])
