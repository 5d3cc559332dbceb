"""A sweep's rows as means over seeds: a table in three forms, and a plot of the metric over the sparsity."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import t as student_t

from distprune.best import merit_of
from distprune.monitor.plots import COLORS, GREY
from distprune.records import csv_text
from distprune.sweeps.results import Row
from distprune.sweeps.spec import seedless


@dataclass(frozen=True)
class Mean:
    """The runs of one method at one point, over all seeds; those at chance are counted, and left out of the means."""

    method: str
    point: dict[str, Any]
    metric_name: str
    seeds: int
    diverged: int
    metric: float | None
    """Mean over the seeds that converged; None where none did."""
    deviation: float | None
    """The sample's; None for fewer than two."""
    below: float | None
    """How much worse than the baseline, a mean over pairs of the same seed."""
    interval: float | None
    """Half of the 95 % interval of that mean (Student's t); None for fewer than two seeds."""
    pairs: int
    """Seeds of which both converged."""
    steps: int
    total_steps: int
    """With those of the models that it started from, but not of its teacher."""
    sparsity: float
    """Masked over prunable weights."""
    model_sparsity: float
    """Zeros over all weights of the model."""
    examples_per_s: float | None

    def record(self) -> dict[str, Any]:
        """Return it as one flat row."""
        return {**vars(self), "point": ",".join(f"{key}={value}" for key, value in self.point.items())}


def means_of(rows: dict[str, Row], baseline: str | None, chance: float | None) -> list[Mean]:
    """Return the means of a sweep, in the order of its rows.

    Args:
        rows: by the names of their runs.
        baseline: the method that others are compared with, seed by seed.
        chance: a run whose metric is not better than it has diverged, as has one whose metric is not finite.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        groups.setdefault((row["method"], json.dumps(seedless(row["point"]), sort_keys=True)), []).append(row)
    return [_mean(group, rows, baseline, chance) for group in groups.values()]


def _mean(group: Sequence[Row], rows: dict[str, Row], baseline: str | None, chance: float | None) -> Mean:
    first = group[0]
    good = [row for row in group if _converged(row, chance)]
    metrics = [row["final_metric"] for row in good]
    below = [] if first["method"] == baseline else _differences(good, rows, baseline, chance)
    speeds = [row["examples_per_s"] for row in group if row["examples_per_s"]]
    return Mean(
        first["method"],
        seedless(first["point"]),
        first["metric_name"],
        len(group),
        len(group) - len(good),
        mean(metrics) if metrics else None,
        stdev(metrics) if len(metrics) > 1 else None,
        mean(below) if below else None,
        _half_interval(below),
        len(below),
        round(mean(row["steps"] for row in group)),
        round(mean(row["steps"] + _steps_before(row, rows) for row in group)),
        mean(row["sparsity_masked"] for row in group),
        mean(row["model_sparsity"] for row in group),
        mean(speeds) if speeds else None,
    )


def _converged(row: Row, chance: float | None) -> bool:
    if row["final_metric"] is None:
        return False
    return chance is None or _merit(row) > merit_of({row["metric_name"]: chance})


def _merit(row: Row) -> float:
    """Return a row's metric, or its negative where lower is better."""
    return merit_of({row["metric_name"]: row["final_metric"]})


def _differences(group: Iterable[Row], rows: dict[str, Row], baseline: str | None, chance: float | None) -> list[float]:
    """Return how much worse each row is than the baseline's only one with the same seed, and all else that it has."""
    found = []
    for row in group:
        point = row["point"]
        fitting = [
            other
            for other in rows.values()
            if other["method"] == baseline
            and _converged(other, chance)
            and all(point.get(key, value) == value for key, value in other["point"].items())
        ]
        found += [_merit(fitting[0]) - _merit(row)] if len(fitting) == 1 else []
    return found


def _half_interval(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(student_t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5)


def _steps_before(row: Row, rows: dict[str, Row]) -> int:
    """Return the steps of the models that a run started from, or whose weights said what goes."""
    before = {name for key, name in row["models"].items() if key != "teacher.path"}
    return sum(rows[name]["steps"] + _steps_before(rows[name], rows) for name in before if name in rows)


def markdown(means: Sequence[Mean], baseline: str | None) -> str:
    """Return the table for a reader."""
    names = ", ".join(sorted({each.metric_name for each in means})) or "metric"
    titles = ["method", "at", names, f"worse than {baseline or 'a baseline'}", "pairs", "seeds", "diverged", "steps"]
    titles += ["with those before", "sparsity", "of the model", "examples/s"]
    lines = [titles, ["---"] * len(titles)]
    for each in means:
        point = ", ".join(f"{key} {value}" for key, value in each.point.items())
        counts = [str(number) for number in (each.pairs, each.seeds, each.diverged, each.steps, each.total_steps)]
        sparsities = [f"{each.sparsity:.2%}", f"{each.model_sparsity:.2%}"]
        speed = "" if each.examples_per_s is None else f"{each.examples_per_s:.1f}"
        line = [each.method, point, _with_spread(each.metric, each.deviation), _with_spread(each.below, each.interval)]
        lines.append([*line, *counts, *sparsities, speed])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _with_spread(value: float | None, spread: float | None) -> str:
    return "" if value is None else f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def as_csv(means: Sequence[Mean]) -> str:
    """Return the table for a spreadsheet."""
    return csv_text([each.record() for each in means])


def draw(means: Sequence[Mean], baseline: str | None, title: str) -> Figure:
    """Draw the metric over the sparsity, a line with a band (the deviation) for each method, the baseline dashed.

    Where no seed of a method has converged, a cross at the bottom says so.
    """
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    methods = [name for name in dict.fromkeys(each.method for each in means) if name != baseline]
    for method, colour in zip(methods, COLORS * len(methods), strict=False):
        points = sorted((each for each in means if each.method == method), key=lambda each: each.sparsity)
        line = [(each.sparsity, each.metric, each.deviation or 0.0) for each in points if each.metric is not None]
        if line:
            sparsities, metrics, spreads = zip(*line, strict=True)
            axes.plot(sparsities, metrics, color=colour, marker="o", label=method)
            low, high = ([m + sign * s for m, s in zip(metrics, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(sparsities, low, high, color=colour, alpha=0.15, linewidth=0)
        diverged = [each.sparsity for each in points if each.metric is None]
        if diverged:
            bottom = axes.get_xaxis_transform()
            name = f"{method}: no seed converged"
            axes.plot(diverged, [0.03] * len(diverged), "x", color=colour, transform=bottom, label=name)
    dense = [each.metric for each in means if each.method == baseline and each.metric is not None]
    for value in dense:
        axes.axhline(value, color=GREY, linestyle="--", label=f"{baseline} {value:.3f}")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="sparsity of the prunable weights", ylabel=means[0].metric_name if means else "", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
