"""What is measured on the evaluation data, by scikit-learn and SciPy."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from distprune.errors import UserError, unknown

Measure = Callable[[Any, Any], float]

LOWER_IS_BETTER = frozenset({"nll", "perplexity"})


def merit_of(value: float, lower_is_better: bool) -> float:
    """Return what a metric is compared by, the higher the better: itself, or its negative; NaN is worst."""
    if math.isnan(value):
        return -math.inf
    return -value if lower_is_better else value


def constant_remark(metrics: dict[str, float], labels: Sequence[int]) -> str | None:
    """Return a sentence where an accuracy is no better than that of always giving the most frequent label."""
    share = max(Counter(labels).values()) / len(labels)
    if metrics.get("accuracy", 1.0) > share:
        return None
    return f"accuracy {metrics['accuracy']:.4f}: no better than the most frequent label alone, {share:.4f}"


def _correlation(statistic: Callable[[Any, Any], Any]) -> Measure:
    """Return the correlation that is 0 where it is not defined: one side constant or not finite."""

    def measure(labels: Any, predicted: Any) -> float:
        sides = np.stack([labels, predicted])
        if not np.isfinite(sides).all() or (np.ptp(sides, axis=1) == 0).any():
            return 0.0
        return float(statistic(labels, predicted).statistic)

    return measure


_CLASSIFICATION: dict[str, Measure] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),
    "macro_f1": partial(f1_score, average="macro", zero_division=0.0),
    "matthews": matthews_corrcoef,
}
_REGRESSION: dict[str, Measure] = {"pearson": _correlation(pearsonr), "spearman": _correlation(spearmanr)}


def check_metrics(names: list[str], num_labels: int, regression: bool) -> None:
    """Check that every metric exists and suits the task.

    Args:
        names: as in ``task.metrics``.
        num_labels: number of classes (1 for regression).
        regression: whether a number is predicted.

    Raises:
        UserError: no metric, an unknown one, one of the other kind, or ``f1`` of more than two classes.
    """
    if not names:
        raise UserError("task.metrics is empty; it needs at least one metric, the main one first")
    suited = _REGRESSION if regression else _CLASSIFICATION
    for name in names:
        if name not in _CLASSIFICATION | _REGRESSION:
            raise unknown("metric", name, suited)
        if name not in suited:
            kind = "regression" if regression else "classification"
            raise UserError(f"metric {name!r} does not suit {kind}; allowed: {', '.join(suited)}")
    if "f1" in names and num_labels != 2:
        raise UserError(f"metric 'f1' needs 2 classes and there are {num_labels}; 'macro_f1' takes any number")


def check_suited(names: list[str], allowed: list[str], kind: str) -> None:
    """Check that metrics are among those of a kind of task.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in allowed:
            raise unknown(f"metric of {kind}", name, allowed)


def measure(names: list[str], logits: torch.Tensor, labels: torch.Tensor, regression: bool) -> dict[str, float]:
    """Measure predictions; a constant one gives a number too (0 for correlations).

    Args:
        names: metrics that :func:`check_metrics` allows.
        logits: shape [N, C], float32 on the CPU; C = 1 for regression.
        labels: shape [N]; classes as integers, or float32 for regression.
        regression: whether a number is predicted.

    Returns:
        Each metric as a fraction (not in percent), in the order of ``names``. ``f1`` is that of class 1.
    """
    predicted = (logits.squeeze(-1) if regression else logits.argmax(-1)).numpy()
    suited = _REGRESSION if regression else _CLASSIFICATION
    return {name: float(suited[name](labels.numpy(), predicted)) for name in names}
