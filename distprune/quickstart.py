"""What the quickstart has shown: a table of its three models, and whether they are what pruning promises."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

DENSE_AT_LEAST = 0.97
GRADUAL_WITHIN = 0.02
ONESHOT_BELOW = 0.15


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


def failures(dense: float, oneshot: float, gradual: float) -> list[str]:
    """Return what three accuracies do not keep of the quickstart's promises; empty where all is well."""
    kept = {
        f"the dense model reaches {DENSE_AT_LEAST:.0%}": dense >= DENSE_AT_LEAST,
        f"gradual pruning stays within {GRADUAL_WITHIN:.0%} of it": gradual >= dense - GRADUAL_WITHIN,
        f"one-shot pruning falls by {ONESHOT_BELOW:.0%} or more": oneshot <= dense - ONESHOT_BELOW,
    }
    return [promise for promise, holds in kept.items() if not holds]


def main(directory: Path) -> int:
    """Print the table and the plot's path; return the exit status."""
    dense, gradual = (_read(directory / run / "summary.json") for run in ("dense", "gradual"))
    oneshot, cut = _read(directory / "oneshot.json"), _read(directory / "oneshot" / "pruning.json")
    prunable = gradual["prunable_weights"]
    rows = [
        Row("dense", dense["final_metric"], 0, prunable, dense["encoder_zeros"]),
        Row(
            "one-shot",
            oneshot["accuracy"],
            cut["masked_weights"],
            cut["prunable_weights"],
            oneshot["encoder_zeros"],
            "no training",
        ),
        Row(
            "gradual",
            gradual["final_metric"],
            gradual["masked_weights"],
            prunable,
            gradual["zeros_in_file"],
            "with distillation",
        ),
    ]
    console = Console(width=100)
    console.print(comparison_table(rows, gradual["metric_name"]))
    console.print(f"plot: {directory / 'gradual' / 'plot.png'}\nmodel: {directory / 'gradual' / 'final'}")
    broken = failures(dense["final_metric"], oneshot["accuracy"], gradual["final_metric"])
    for promise in broken:
        print(f"quickstart: error: it does not hold that {promise}", file=sys.stderr)
    return 1 if broken else 0


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
