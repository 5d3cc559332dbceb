"""What a finished run leaves for its reader: its metrics, a table, the environment and the model card."""

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCardData
from rich.table import Table

from distprune import __version__, dist
from distprune.errors import UserError
from distprune.monitor.jsonl import finite

HUB_METRICS = {
    "macro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl.

    Where a run was continued from a checkpoint, records of steps that were done again are left out, and so is
    a line that a kill cut short.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; a run writes it as metrics.jsonl in its directory")
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    return list({(record["step"], record.get("split")): record for record in records}.values())


class Row(NamedTuple):
    """A model in a comparison: its metric, pruned and prunable weights, zeros in its file, and a remark."""

    name: str
    metric: float
    masked: int
    prunable: int
    zeros: int
    note: str = ""


def comparison_table(rows: Iterable[Row], metric_name: str) -> Table:
    """Return models side by side, one a line, for the terminal."""
    table = Table()
    table.add_column("model")
    for title in (metric_name.replace("_", " "), "sparsity", "masked / prunable", "zeros in file"):
        table.add_column(title, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.metric:.4f}",
            f"{row.masked / row.prunable:.2%}" if row.prunable else "-",
            f"{row.masked:,} / {row.prunable:,}",
            f"{row.zeros:,}",
            row.note,
        )
    return table


def environment() -> dict[str, str | None]:
    """Return the versions, the device's name and the git revision that a run was made with.

    The revision is that of the working directory's repository, with ``-dirty`` where tracked files were
    changed, and null outside of one.
    """
    return {
        "distprune": __version__,
        **{name: version(name) for name in ("torch", "deepspeed", "transformers", "datasets")},
        "python": platform.python_version(),
        "device": _device_name(),
        "git": _git_revision(),
    }


def _device_name() -> str:
    if dist.on_gpu():
        return torch.cuda.get_device_name()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def _git_revision() -> str | None:
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records for a spreadsheet, a column for every key that any of them has."""
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for each in records for key in each)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_json(path: Path, data: object) -> None:
    """Write a file that is, at any moment, either as before or complete; NaN and infinities become null."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(finite(data), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def model_card(
    summary: Mapping[str, Any],
    auto_class: str,
    task_type: str,
) -> str:
    """Return the README.md of a pruned or a dense model, for the hub or a directory.

    Local paths are named by their last two parts only.

    Args:
        summary: the run's: ``base_model``, ``teacher`` (or null), ``task`` (hub id or path of the data),
            ``metric_name``, ``final_metric``, ``dense_metric`` (or null), ``method``, ``sparsity_masked``,
            ``masked_weights``, ``prunable_weights``, ``zeros_in_file``, ``encoder_sparsity``,
            ``model_sparsity``.
        auto_class: the class of transformers that loads the model.
        task_type: the hub's name of the task.
    """
    base, data = _short(summary["base_model"]), _short(summary["task"])
    metric, sparsity = summary["metric_name"].replace("_", " "), summary["sparsity_masked"]
    dense = "" if summary["dense_metric"] is None else f" (dense: {summary['dense_metric']:.4f})"
    teacher = "" if summary["teacher"] is None else f" and distilled from `{_short(summary['teacher'])}`"
    title, text, rows, stored = f"{base}, fine-tuned", f"`{base}` trained on `{data}`{teacher} with distprune.", "", ""
    if summary["masked_weights"]:
        title = f"{base}, {sparsity:.0%} pruned"
        text = f"""`{base}` trained on `{data}`{teacher}, while weights were removed step by step:
{summary["method"]}, with distprune after [arXiv 2312.13547](https://arxiv.org/abs/2312.13547)."""
        rows = f"""
| pruned weights | {summary["masked_weights"]:,} of {summary["prunable_weights"]:,} ({sparsity:.2%}) |
| zeros in the prunable matrices, as written | {summary["zeros_in_file"]:,} |
| sparsity of the encoder's matrices | {summary["encoder_sparsity"]:.2%} |
| sparsity of the whole model | {summary["model_sparsity"]:.2%} |"""
        stored = "The pruned weights are stored as zeros: the file is as large as the dense one. "
    return f"""---
{_front_matter(summary, data, task_type)}
---

# {title}

{text}

| | |
| --- | --- |
| {metric} | {summary["final_metric"]:.4f}{dense} |{rows}

{stored}transformers alone loads it:

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/of/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")
```
"""


def _front_matter(summary: Mapping[str, Any], data: str, task_type: str) -> str:
    """Return the hub's metadata as YAML."""
    metric, pruned = summary["metric_name"], summary["masked_weights"] > 0
    result = EvalResult(
        task_type=task_type,
        dataset_type=data,
        dataset_name=data,
        metric_type=HUB_METRICS.get(metric, metric),
        metric_name=metric.replace("_", " "),
        metric_value=summary["final_metric"],
    )
    return ModelCardData(
        base_model=summary["base_model"] if _on_hub(summary["base_model"]) else None,
        datasets=[data] if _on_hub(summary["task"]) else None,
        library_name="transformers",
        pipeline_tag=task_type,
        tags=["pruned", "distprune"] if pruned else ["distprune"],
        metrics=[result.metric_type],
        model_name=f"{Path(_short(summary['base_model'])).name}-{'pruned' if pruned else 'fine-tuned'}",
        eval_results=[result],
    ).to_yaml()


def _on_hub(name: str) -> bool:
    """Return whether a name is a hub id and not a path."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _short(name: str) -> str:
    """Return a hub id as it is, and the last two parts of a path."""
    return name if _on_hub(name) else "/".join(Path(name).resolve().parts[-2:])
