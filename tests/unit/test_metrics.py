import math
import warnings

import pytest
import torch

from distprune.errors import UserError
from distprune.tasks.metrics import check_metrics, constant_remark, measure

CLASSIFICATION = ["accuracy", "f1", "macro_f1", "matthews"]
REGRESSION = ["pearson", "spearman"]


@pytest.fixture(autouse=True)
def warnings_fail():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def logits_of(classes: list[int], count: int = 2) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float() * 3 - 1


def test_classification_by_hand():
    # class 1: 2 hits, 1 false alarm, 1 miss; class 0: 1 hit
    values = measure(CLASSIFICATION, logits_of([1, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 1, 0]), regression=False)
    assert values["accuracy"] == pytest.approx(3 / 5)
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert values["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_three_classes():
    names = ["macro_f1", "accuracy", "matthews"]
    values = measure(names, logits_of([0, 1, 2, 2], 3), torch.tensor([0, 1, 2, 1]), regression=False)
    assert list(values) == names
    assert values["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_regression_by_hand():
    predicted, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 4.0, 16.0])
    values = measure(REGRESSION, predicted, labels, regression=True)
    assert values["pearson"] == pytest.approx(24 / math.sqrt(14 / 3 * 126))
    assert values["spearman"] == pytest.approx(1.0)


def test_constant_predictions_give_numbers_without_warnings():
    labels = torch.tensor([0, 1, 1, 0])
    for constant in ([0] * 4, [1] * 4):
        values = measure(CLASSIFICATION, logits_of(constant), labels, regression=False)
        assert values["accuracy"] == 0.5
        assert values["matthews"] == 0.0
        assert all(math.isfinite(value) for value in values.values())
    assert measure(["f1"], logits_of([0] * 4), torch.zeros(4, dtype=torch.long), regression=False) == {"f1": 0.0}
    for predicted, wanted in [([2.0] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [5.0] * 3), ([1.0], [2.0])]:
        values = measure(REGRESSION, torch.tensor(predicted)[:, None], torch.tensor(wanted), regression=True)
        assert values == {"pearson": 0.0, "spearman": 0.0}


def test_diverged_regression_gives_zero():
    predicted = torch.tensor([[1.0], [float("nan")], [3.0]])
    values = measure(REGRESSION, predicted, torch.tensor([1.0, 2.0, 3.0]), regression=True)
    assert values == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("names", "num_labels", "regression", "message"),
    [
        (["acuracy"], 2, False, r"'acuracy' is unknown \(did you mean 'accuracy'\?\)"),
        (["accuracy", "bleu"], 2, False, "'bleu' is unknown; allowed: accuracy, f1, macro_f1, matthews"),
        ([], 2, False, "task.metrics is empty"),
        (["accuracy"], 1, True, "does not suit regression; allowed: pearson, spearman"),
        (["pearson"], 2, False, "does not suit classification"),
        (["f1"], 3, False, "needs 2 classes and there are 3; 'macro_f1'"),
    ],
)
def test_unsuitable_metrics_are_refused(names, num_labels, regression, message):
    with pytest.raises(UserError, match=message):
        check_metrics(names, num_labels, regression)


@pytest.mark.parametrize(("accuracy", "said"), [(0.8, False), (0.75, True), (0.5, True)])
def test_a_model_that_gives_one_answer_is_told_of(accuracy, said):
    remark = constant_remark({"f1": 0.9, "accuracy": accuracy}, [0, 1, 1, 1])
    expected = f"accuracy {accuracy:.4f}: no better than the most frequent label alone, 0.7500"
    assert remark == (expected if said else None)
    assert constant_remark({"f1": 0.0}, [0, 1]) is None


def test_suitable_metrics_pass():
    check_metrics(CLASSIFICATION, 2, False)
    check_metrics(["macro_f1", "matthews"], 5, False)
    check_metrics(REGRESSION, 1, True)
