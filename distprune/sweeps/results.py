"""What the runs of a sweep came to: one line of JSON a run, which a sweep goes on from without the runs themselves."""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from distprune.checkpoints.run_directory import CONFIG, SUMMARY
from distprune.errors import UserError, written
from distprune.monitor.jsonl import finite
from distprune.monitor.records import read_metrics
from distprune.sweeps.spec import Run

Row = dict[str, Any]
Settings = dict[str, Any]
DerivedKeys = Mapping[str, Collection[str]]

OF_RUN = ("method", "point", "models", "settings", "examples_per_s")
OF_SUMMARY = (
    "metric_name",
    "final_metric",
    "dense_metric",
    "final_metrics",
    "steps",
    "sparsity_target",
    "sparsity_masked",
    "encoder_sparsity",
    "model_sparsity",
    "masked_weights",
    "prunable_weights",
    "zeros_in_file",
    "world_size",
    "zero_stage",
    "wall_time_s",
    "environment",
)


def read_rows(path: Path) -> dict[str, Row]:
    """Return the lines of a results file by the names of their runs; none where there is no file.

    Raises:
        UserError: a line that is no result, as one whose writing was cut off.
    """
    rows: dict[str, Row] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            name, _ = row["run"], [row[key] for key in (*OF_RUN, *OF_SUMMARY)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no result of a run; allowed: without that line") from error
        if name in rows:
            raise UserError(f"{path}: line {number} is a second result of {name}; allowed: one of them")
        rows[name] = row
    return rows


def check_rows(rows: dict[str, Row], settings: Mapping[str, Settings], derived: DerivedKeys, path: Path) -> None:
    """Refuse results of runs that had other settings, and two runs that are the same.

    Args:
        rows: by the names of their runs.
        settings: of all runs, by name.
        derived: keys that a recipe has set, by the names of runs.
        path: where the rows are from.

    Raises:
        UserError: with the first of them.
    """
    known: dict[str, str] = {}
    for name, wanted in settings.items():
        same = known.setdefault(json.dumps(wanted, sort_keys=True), name)
        if same != name:
            raise UserError(f"{name} has the settings of {same}; allowed: a grid whose values make a difference")
        if name in rows and (changed := _difference(rows[name]["settings"], wanted, derived[name])):
            raise UserError(
                f"{path}: {name} was measured with other settings than the sweep has now, {changed}; allowed: another "
                "results file, or without that line"
            )


def _difference(before: Settings, now: Settings, derived: Collection[str]) -> str | None:
    """Return in words the first key that has another value: one that was given, before those that a recipe derives."""
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    for key in sorted(differing, key=lambda key: (key in derived, key)):
        old, new = (json.dumps(each[key]) if key in each else "the default" for each in (before, now))
        return f"{key} {old} -> {new}"
    return None


def check_directories(
    runs: Iterable[Run], settings: Mapping[str, Settings], derived: DerivedKeys, output: Path
) -> None:
    """Refuse run directories of other runs than these.

    Raises:
        UserError: with the first of them.
    """
    for run in runs:
        directory = output / run.name
        if not (directory / CONFIG).exists():
            continue
        there = Run(run.method, run.point, directory / CONFIG, (), run.models)
        if changed := _difference(there.settings(there.load(output)), settings[run.name], derived[run.name]):
            raise UserError(
                f"{directory} holds a run with other settings, {changed}; allowed: another output, or without it"
            )


def is_finished(run: Run, output: Path) -> bool:
    """Return whether a run's directory is there, and it has come to its end."""
    return (output / run.name / SUMMARY).exists()


def row_of(run: Run, settings: Settings, data: Mapping[str, str], output: Path) -> Row:
    """Return the result of a finished run, with the hashes of its data; a metric that is not finite is None."""
    directory = output / run.name
    summary = json.loads((directory / SUMMARY).read_text())
    speeds = [
        record["examples_per_s"] for record in read_metrics(directory / "metrics.jsonl") if "examples_per_s" in record
    ]
    row = {
        "run": run.name,
        "method": run.method,
        "point": run.point,
        "models": run.models,
        "settings": settings,
        "data": data,
        **{key: summary[key] for key in OF_SUMMARY},
        "examples_per_s": median(speeds) if speeds else None,
    }
    return finite(row)  # type: ignore[return-value]


def append(path: Path, row: Row) -> None:
    """Add a line to a results file, on the disk when this returns; a line of that run that is there stays.

    Raises:
        UserError: it cannot be written, or holds a line that is no result.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # sweeps that share the work, each with an output of its own
            if row["run"] in read_rows(path):
                return
            if path.read_bytes()[-1:] not in (b"", b"\n"):
                file.write("\n")
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def still_to_run(runs: Sequence[Run], rows: dict[str, Row], output: Path, names: Collection[str]) -> list[Run]:
    """Return the runs without a result, and those whose models they need and that are not here any more.

    Args:
        runs: all of the sweep.
        rows: results, by name.
        output: the sweep's folder.
        names: of the runs that are asked for.
    """
    needed = {name for name in names if name not in rows}
    for run in reversed(runs):  # behind those whose models it gets
        if run.name in needed and not is_finished(run, output):
            needed |= set(run.models.values())
    return [run for run in runs if run.name in needed and not (run.name in rows and is_finished(run, output))]
