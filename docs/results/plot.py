"""Draws sst2_minilm.png and sst2_minilm_methods.png from the rows beside this file.

The first has the accuracy of every seed at each sparsity, and over the pruned runs; the second is the plot of a sweep,
of the rows in bf16, and of those that were run in fp32 alone.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distprune.monitor.plots import BLUE, GREEN, GREY, RED
from distprune.sweeps.means import means_of
from distprune.sweeps.results import read_rows
from distprune.sweeps.table import draw

FOLDER = Path(__file__).parent
COLORS = {"dense": GREY, "one-shot": RED, "gradual": BLUE}
SHADES = {0.8: GREEN, 0.9: BLUE}
IN_FP32 = ("movement", "smc_gmp_own_rate", "one_shot")
"""Methods of which points are in the file of the rows in fp32."""
AFTER = ("magnitude_after", "obert_diagonal_after")
"""Methods of which the points are those with equal budgets: half of the epochs dense, half pruned."""

Runs = list[dict[str, Any]]


def main() -> None:
    """Draw both."""
    draw_seeds()
    draw_methods()


def draw_methods() -> None:
    """Draw the methods' means over the sparsity, as the sweep does."""
    files = (FOLDER / f"sst2_minilm_{name}.jsonl" for name in ("methods", "baselines", "equal_budget_bf16"))
    bf16, fp32, equal = map(read_rows, files)
    rows = bf16 | {name: row for name, row in fp32.items() if row["method"] in IN_FP32 and name not in bf16}
    rows |= {name: row for name, row in equal.items() if row["method"] in AFTER}
    draw(means_of(rows, "dense", 0.55), "dense", "sst2_minilm_methods").savefig(FOLDER / "sst2_minilm_methods.png")


def draw_seeds() -> None:
    """Read the runs of the table and draw them."""
    rows = [json.loads(line) for line in (FOLDER / "sst2_minilm.jsonl").read_text().splitlines()]
    runs = [row for row in rows if row["table"] == "seeds"]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_sparsities(left, runs)
    draw_epochs(right, [run for run in runs if run["method"] == "gradual"])
    for axes in (left, right):
        axes.set_ylabel("accuracy on validation")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left" if axes is left else "lower right")
    figure.savefig(FOLDER / "sst2_minilm.png", format="png")


def draw_sparsities(axes: Axes, runs: Runs) -> None:
    """Draw each seed as a dot and the mean of a method and sparsity as a line through them."""
    for method, color in COLORS.items():
        chosen = [run for run in runs if run["method"] == method]
        sparsities = sorted({run["sparsity_target"] for run in chosen})
        axes.plot(
            [run["sparsity_target"] for run in chosen], [run["accuracy"] for run in chosen], "o", color=color, alpha=0.5
        )
        means = [mean(run["accuracy"] for run in chosen if run["sparsity_target"] == s) for s in sparsities]
        label = f"{method}: " + ", ".join(f"{value:.3f}" for value in means)
        if method == "dense":
            axes.axhline(means[0], color=color, linestyle="--", linewidth=1, label=label)
        else:
            axes.plot(sparsities, means, "_-", color=color, markersize=18, label=label)
    axes.set_xlabel("sparsity of the encoder")
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def draw_epochs(axes: Axes, runs: Runs) -> None:
    """Draw the accuracy over the epochs of each run, and where its last pruning is."""
    for sparsity, color in SHADES.items():
        for number, run in enumerate(run for run in runs if run["sparsity_target"] == sparsity):
            epochs, values = zip(*run["curve"], strict=True)
            label = f"gradual to {sparsity:.0%}, each seed" if number == 0 else None
            axes.plot(epochs, values, color=color, marker="o", markersize=3, linewidth=1, label=label)
    ends = {float(str(run["end"]).split()[0]) for run in runs}
    for end in ends:
        axes.axvline(end, color=GREY, linestyle=":", linewidth=1)
        axes.text(end, axes.get_ylim()[1], " last pruning", color=GREY, va="top")
    axes.set_xlabel("epoch")


if __name__ == "__main__":
    main()
