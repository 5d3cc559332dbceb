"""Finished runs and runs under way, as their directories tell of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from distprune import yaml12
from distprune.checkpoints.run_directory import CONFIG, SUMMARY, read_summary
from distprune.errors import UserError
from distprune.monitor.records import read_metrics
from distprune.paths import expanded


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        name: the last part of its path, or more where two runs have the same.
        metrics: records of metrics.jsonl.
        config: every key, dotted, and its value.
        summary: {} where the run has not ended.
    """

    name: str
    directory: Path
    metrics: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def layers(self) -> dict[str, float]:
        """Sparsity of each matrix at the end, or at the last evaluation."""
        found: dict[str, float] = {}
        for record in self.metrics:
            of_record = {key: value for key, value in record.items() if key.startswith("sparsity/")}
            found = {key.removeprefix("sparsity/"): value for key, value in of_record.items()} or found
        ended = self.summary.get("layers", {})
        return found or {name: layer["masked"] / layer["weights"] for name, layer in ended.items()}


def read_runs(directories: Sequence[str]) -> list[RunRecord]:
    """Return runs in the order in which they are given.

    Raises:
        UserError: a directory that is no run's, or is given twice.
    """
    paths = [expanded(each) for each in directories]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"the runs are {', '.join(directories)}; allowed: each once")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read(path: Path, name: str) -> RunRecord:
    config = path / CONFIG
    if not config.exists():
        raise UserError(f"{str(path)!r} is no run's directory, which has a {CONFIG}; allowed: train.output of a run")
    try:
        keys = _flat(yaml12.parse(config.read_text(encoding="utf-8")) or {})
        told = read_summary(path) if (path / SUMMARY).exists() else {}
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if lacking := {"train.batch_size", "model.path"} - keys.keys():
        raise UserError(f"{config} has no {min(lacking)}; allowed: the configuration that a run has written")
    return RunRecord(name, path, read_metrics(path / "metrics.jsonl"), keys, told)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys in which configurations differ, and each run's value as JSON; "" where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [json.dumps(run.config[key]) if key in run.config else "" for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def times(run: RunRecord) -> dict[str, float | None]:
    """Return what a run's seconds went into, as its summary says.

    While it is under way, and of one of an older version: its training steps, timed from one line of metrics.jsonl to
    the next, evaluations left out, and all else, None while it is under way.
    """
    if parts := run.summary.get("seconds_of"):
        return dict(parts)
    size, before, training = run.config["train.batch_size"], 0, 0.0
    for record in run.metrics:
        if record["split"] == "train" and record.get("examples_per_s"):
            training += (record["step"] - before) * size / record["examples_per_s"]
            before = record["step"]
    whole = run.summary.get("wall_time_s")
    rest = None if whole is None else max(0.0, whole - training)
    return {"training steps": training, "evaluations, checkpoints, export": rest}
