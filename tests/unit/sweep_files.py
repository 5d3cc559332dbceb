"""A small sweep's file, its runs, and rows as their results."""

import json
from pathlib import Path
from typing import Any

from distprune import settings
from distprune.sweeps import results
from distprune.sweeps.results import Row
from distprune.sweeps.spec import Run, read_sweep, runs_of

FILE = """
config: run.yaml
output: {folder}/runs
baseline: dense
set: {{train.epochs: 4}}
grid: {{train.seed: [1, 2]}}
methods:
  after:
    set: {{recipe.name: one_shot}}
    grid: {{pruning.sparsity: [0.5, 0.9]}}
    models: {{model.path: dense}}
  dense:
    set: {{recipe.name: dense}}
"""


def write_sweep(folder: Path) -> Path:
    (folder / "run.yaml").write_text("model: {path: m}\ntask: {hub: a, validation: b}\n")
    (folder / "sweep.yaml").write_text(FILE.format(folder=folder))
    return folder / "sweep.yaml"


def runs(file: Path, *overrides: str) -> list[Run]:
    return runs_of(read_sweep(file), file, overrides)


def settings_of(run: Run, output: Path = Path("out")) -> dict[str, Any]:
    return run.settings(run.load(output))


def write_finished(run: Run, output: Path, metric: float) -> None:
    """Write the directory of a run that has come to its end."""
    folder = output / run.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(settings.to_yaml(run.load(output)))
    told = {"metric_name": "accuracy", "final_metric": metric, "data": {}}
    (folder / "summary.json").write_text(json.dumps(dict.fromkeys(results.OF_SUMMARY, 0) | told))
    (folder / "metrics.jsonl").write_text("")


def row(run: Run, metric: float, output: Path, **more: Any) -> Row:
    shared = {"metric_name": "accuracy", "steps": 100, "sparsity_masked": run.point.get("pruning.sparsity", 0.0)}
    shared |= {"model_sparsity": 0.1, "examples_per_s": 50.0, "final_metric": metric}
    shared = dict.fromkeys(results.OF_SUMMARY) | shared
    named = {"run": run.name, "method": run.method, "point": run.point, "models": run.models}
    return {**named, "settings": settings_of(run, output), **shared, **more}
