"""What the runs of a sweep came to: one line of JSON a run, which a sweep goes on from without the runs themselves."""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from statistics import median
from types import NoneType
from typing import Any

from distprune.checkpoints.run_directory import SUMMARY, read_summary
from distprune.errors import UserError, written
from distprune.monitor.jsonl import finite
from distprune.monitor.records import read_metrics
from distprune.sweeps.spec import Run

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Settings = dict[str, Any]

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
OF_LATER_VERSIONS = ("model_files", "lower_is_better", "score_gradients", "stored_bytes", "packed_bytes", "layers")
"""What older summaries and lines lack, and are read without."""
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "method", "metric_name"), (str,)),
    **dict.fromkeys(("point", "models", "settings"), (dict,)),
    **dict.fromkeys(("sparsity_masked", "model_sparsity", "steps"), (int, float)),
    **dict.fromkeys(("final_metric", "examples_per_s"), (int, float, NoneType)),
}
"""What the table is made of, and of which kind that is."""


def read_rows(path: Path) -> dict[str, Row]:
    """Return the lines of a results file by the names of their runs; none where there is no file.

    Raises:
        UserError: a line that is no result, as one whose writing was cut off; or a file that cannot be read.
    """
    rows: dict[str, Row] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; allowed: a file of results") from error
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is None:
            raise UserError(f"{path}: line {number} is no result of a run; allowed: without that line")
        if row["run"] in rows:
            raise UserError(f"{path}: line {number} is a second result of {row['run']}; allowed: one of them")
        rows[row["run"]] = row
    return rows


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and row.keys() >= {"run", *OF_RUN, *OF_SUMMARY}
    hashes = [row.get(key, {}) for key in ("data", "model_files")] if whole else []
    if not whole or not all(isinstance(each, dict) for each in hashes) or row != finite(row):
        return None
    return row if all(isinstance(row[key], kinds) for key, kinds in _KINDS.items()) else None


def difference(before: Settings, now: Settings, derived: Collection[str]) -> str | None:
    """Return in words the first key that has another value: one that was given, before those that a recipe derives."""
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    for key in sorted(differing, key=lambda key: (key in derived, key)):
        old, new = (json.dumps(each[key]) if key in each else "the default" for each in (before, now))
        return f"{key} {old} -> {new}"
    return None


def is_finished(run: Run, output: Path) -> bool:
    """Return whether a run's directory is there, and it has come to its end."""
    return (output / run.name / SUMMARY).exists()


def summary_of(run: Run, output: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        UserError: it is cut off, or of a version that knew less.
    """
    summary = read_summary(output / run.name)
    if lacking := [key for key in OF_SUMMARY if key not in summary]:
        raise UserError(f"{output / run.name / SUMMARY} has no {lacking[0]!r}; allowed: without that run's directory")
    return summary


def row_of(run: Run, settings: Settings, output: Path) -> Row:
    """Return the result of a finished run; a metric that is not finite is None."""
    summary = summary_of(run, output)
    speeds = [
        record["examples_per_s"]
        for record in read_metrics(output / run.name / "metrics.jsonl")
        if "examples_per_s" in record
    ]
    row = {
        "run": run.name,
        "method": run.method,
        "point": run.point,
        "models": run.models,
        "settings": settings,
        "data": summary.get("data", {}),
        **{key: summary[key] for key in (*OF_SUMMARY, *OF_LATER_VERSIONS) if key in summary},
        "examples_per_s": median(speeds) if speeds else None,
    }
    return finite(row)  # type: ignore[return-value]


def append(path: Path, row: Row) -> None:
    """Add a line to a results file, on the disk when this returns; a line of that run that is there stays.

    Raises:
        UserError: it cannot be written, and is as it was; or it holds a line that is no result.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # sweeps that share the work, each with an output of its own
            except OSError as error:  # some network file systems know no locks
                logger.warning("%s cannot be locked (%s): make sure that one sweep at a time writes it", path, error)
            if row["run"] in read_rows(path):
                return
            there = path.read_bytes()
            line = b"\n" * (there[-1:] not in (b"", b"\n")) + json.dumps(row, allow_nan=False).encode() + b"\n"
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, len(there))  # half a line would be no result
                raise
