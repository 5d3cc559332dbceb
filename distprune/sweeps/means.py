"""A sweep's rows as means over seeds, and methods compared seed by seed. Pure."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from distprune.sweeps.results import Row
from distprune.sweeps.spec import SEED, Run, lineage, seedless
from distprune.tasks.metrics import LOWER_IS_BETTER, merit_of


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
    """Half of the 95 % interval of that mean (Student's t); None for fewer than two values that differ."""
    pairs: int
    """Seeds of which both converged."""
    steps: int
    total_steps: int
    """With those of the models that it started from, but not of its teacher."""
    teacher_steps: int
    """Of its teacher, with those of the models that that started from; 0 without a teacher of the sweep."""
    score_gradients: float | None
    """Global batches that went forward and backward for the score alone; None where older rows do not tell."""
    sparsity: float
    """Masked over prunable weights."""
    encoder_sparsity: float | None
    """Zeros over the weights of the encoder's, or decoder's, matrices; None where a row has none."""
    model_sparsity: float
    """Zeros over all weights of the model."""
    packed_bytes: float | None
    """Of the weights in packed form; None where an older row does not tell."""
    examples_per_s: float | None


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


def without_result(runs: Sequence[Run], rows: Mapping[str, Row]) -> list[str]:
    """Return the runs that the mean of their method and point lacks, and has of other seeds: some may have failed."""

    def group(run: Run) -> str:
        return json.dumps([run.method, seedless(run.point)], sort_keys=True)

    begun = {group(run) for run in runs if run.name in rows}
    return [run.name for run in runs if run.name not in rows and group(run) in begun]


def _mean(group: Sequence[Row], rows: dict[str, Row], baseline: str | None, chance: float | None) -> Mean:
    first = group[0]
    good = [row for row in group if _converged(row, chance)]
    metrics = [row["final_metric"] for row in good]
    below = [] if first["method"] == baseline else _below_baseline(good, rows, baseline, chance)
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
        round(mean(_total_steps(row, rows) for row in group)),
        round(mean(_teacher_steps(row, rows) for row in group)),
        _known_mean([row.get("score_gradients") for row in group]),
        mean(row["sparsity_masked"] for row in group),
        _known_mean([row["encoder_sparsity"] for row in group]),
        mean(row["model_sparsity"] for row in group),
        _known_mean([row.get("packed_bytes") for row in group]),
        mean(speeds) if speeds else None,
    )


def _converged(row: Row, chance: float | None) -> bool:
    if row["final_metric"] is None:
        return False
    return chance is None or _merit(row) > _merit(row | {"final_metric": chance})


def _merit(row: Row) -> float:
    """Return the merit of a row's metric; older rows go by its name."""
    lower = row.get("lower_is_better")
    known = row["metric_name"] in LOWER_IS_BETTER if lower is None else lower
    return merit_of(row["final_metric"], known)


def _below_baseline(
    group: Iterable[Row], rows: Mapping[str, Row], baseline: str | None, chance: float | None
) -> list[float]:
    """Return how much worse each row is than the baseline's of the same seed, where both converged."""
    pairs = ((row, _partner(row, rows, baseline)) for row in group)
    return [-_gain(row, other) for row, other in pairs if other is not None and _converged(other, chance)]


def _partner(row: Row, rows: Mapping[str, Row], method: str | None) -> Row | None:
    """Return a method's only row of the same metric and seed, and the same value of every key that both grids have."""
    fitting = [
        other
        for other in rows.values()
        if other["method"] == method
        and other["metric_name"] == row["metric_name"]
        and other["settings"].get(SEED) == row["settings"].get(SEED)
        and all(row["point"].get(key, value) == value for key, value in other["point"].items())
    ]
    return fitting[0] if len(fitting) == 1 else None


def _gain(row: Row, other: Row) -> float:
    """Return by how much the first metric is the better one."""
    return _merit(row) - _merit(other)


def _half_interval(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of a mean; None where the values say nothing of it: one, or all are equal."""
    if not values or isclose(min(values), max(values), abs_tol=1e-9):
        return None
    return float(student_t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5)


def _total_steps(row: Row, rows: Mapping[str, Row]) -> int:
    """Return a run's steps, with those of the models that it started from, or whose weights said what goes."""
    before = lineage(row["run"], {name: each["models"] for name, each in rows.items()})
    return int(row["steps"] + sum(rows[name]["steps"] for name in before))


def _teacher_steps(row: Row, rows: Mapping[str, Row]) -> int:
    teacher = rows.get(row["models"].get("teacher.path", ""))
    return 0 if teacher is None else _total_steps(teacher, rows)


def _known_mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None where one of them is not known."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Difference:
    """One method against another at one point of both, seed by seed."""

    method: str
    other: str
    point: dict[str, Any]
    better: float | None
    """By how much the first one's metric is better, a mean over pairs of the same seed; None without a pair."""
    interval: float | None
    """Half of the 95 % interval of that mean (Student's t); None for fewer than two values that differ."""
    pairs: int
    """Seeds of which both converged."""
    more: float | None
    """How much more that is than at the first point with results, over seeds that are pairs at both; None at it."""
    more_interval: float | None
    """Half of the 95 % interval of ``more``."""
    diverged: int
    """Seeds at chance of the first method, of those that both have a result of."""
    other_diverged: int
    """Seeds at chance of the other one, of the same."""


def record(of: Mean | Difference) -> dict[str, Any]:
    """Return what a table has a line of as one flat record."""
    return {**vars(of), "point": ",".join(f"{key}={value}" for key, value in of.point.items())}


def differences_of(
    runs: Sequence[Run], rows: Mapping[str, Row], compare: Mapping[str, Sequence[str]], chance: float | None
) -> list[Difference]:
    """Return how methods differ at the points at which both have results of a seed, in the sweep's order.

    Args:
        runs: all of the sweep; the first of the points that both methods have is the first one of these.
        rows: by the names of their runs.
        compare: methods, and those that each is compared with; both have grids of the same keys.
        chance: as for ``means_of``.
    """
    return [
        difference
        for method, others in compare.items()
        for other in others
        for difference in _differences_between(_pairs_by_point(runs, rows, method, other), chance)
    ]


_Pairs = dict[Any, tuple[Row, Row]]


def _pairs_by_point(
    runs: Sequence[Run], rows: Mapping[str, Row], method: str, other: str
) -> list[tuple[dict[str, Any], _Pairs]]:
    """Return the points at which both methods have results of a seed, each with its pairs of them, by their seeds."""
    theirs = [seedless(run.point) for run in runs if run.method == other]
    found: dict[str, tuple[dict[str, Any], _Pairs]] = {}
    for run in (run for run in runs if run.method == method and seedless(run.point) in theirs):
        point = seedless(run.point)
        _, pairs = found.setdefault(json.dumps(point, sort_keys=True), (point, {}))
        row = rows.get(run.name)
        if row is not None and (partner := _partner(row, rows, other)) is not None:
            pairs[row["settings"].get(SEED)] = (row, partner)
    return [(point, pairs) for point, pairs in found.values() if pairs]


def _differences_between(points: Iterable[tuple[dict[str, Any], _Pairs]], chance: float | None) -> list[Difference]:
    found: list[Difference] = []
    first: dict[Any, float] | None = None
    for point, pairs in points:
        gains = {
            seed: _gain(our, their)
            for seed, (our, their) in pairs.items()
            if _converged(our, chance) and _converged(their, chance)
        }
        more = [] if first is None else [gain - first[seed] for seed, gain in gains.items() if seed in first]
        first = gains if first is None else first
        found.append(_difference(point, list(pairs.values()), list(gains.values()), more, chance))
    return found


def _difference(
    point: dict[str, Any],
    pairs: Sequence[tuple[Row, Row]],
    gains: Sequence[float],
    more: Sequence[float],
    chance: float | None,
) -> Difference:
    our, their = pairs[0]
    return Difference(
        our["method"],
        their["method"],
        point,
        mean(gains) if gains else None,
        _half_interval(gains),
        len(gains),
        mean(more) if more else None,
        _half_interval(more),
        sum(not _converged(our, chance) for our, _ in pairs),
        sum(not _converged(their, chance) for _, their in pairs),
    )
