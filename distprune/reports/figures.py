"""The pictures of a report; matplotlib's objects only, no global state."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distprune.errors import UserError
from distprune.models.files import match_names, open_source, resolve
from distprune.monitor.plots import COLORS, GREY, as_it_is, main_metric, series
from distprune.reports.runs import RunRecord

_LOSSES: dict[str, Any] = {
    "loss": "-",
    "task_loss": "--",
    "distillation_loss": ":",
    "hidden_loss": "-.",
    "attention_loss": (0, (5, 1, 1, 1, 1, 1)),
}
"""Names in metrics.jsonl, and how each is drawn."""
_BINS = 120
_SAMPLE = 1 << 16
"""Weights of a matrix that tell how wide a histogram is."""


def curves(runs: Sequence[RunRecord]) -> Figure:
    """Draw metric, losses, learning rate, sparsity, threshold and speed over the steps, a colour for each run."""
    figure = Figure(figsize=(11, 9), dpi=120, layout="constrained")
    panels = figure.subplots(3, 2, sharex=True)
    names = dict.fromkeys(name for run in runs if (name := main_metric(run.metrics)) is not None)
    titles = (
        as_it_is(f"{', '.join(names) or 'metric'} on validation"),
        "losses",
        "sparsity",
        "threshold of the score",
        "learning rate",
        "examples/s",
    )
    for axes, title in zip(panels.flat, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    metric, losses, *others = panels.flat
    drawn_of: list[list[str]] = []
    for index, run in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        if (name := main_metric(run.metrics)) is not None:
            metric.plot(*series(run.metrics, name, "validation"), color=color, marker="o", label=as_it_is(run.name))
        drawn_of.append(_draw_losses(losses, run, color))
        for axes, key in zip(others, ("sparsity", "threshold", "lr", "examples_per_s"), strict=True):
            axes.plot(*series(run.metrics, key, "train"), color=color)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer steps")
    drawn = [key for key in _LOSSES if any(key in parts for parts in drawn_of)]
    lines = [Line2D([], [], color=GREY, linestyle=_LOSSES[key]) for key in drawn]
    losses.legend(lines, [key.replace("_", " ") for key in drawn], fontsize=8, frameon=False)
    figure.legend(*metric.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_losses(axes: Axes, run: RunRecord, color: str) -> list[str]:
    """Draw the total, and parts that are neither 0 nor all of it; return which."""
    total = series(run.metrics, "loss", "train")[1]
    drawn = []
    for key, style in _LOSSES.items():
        steps, values = series(run.metrics, key, "train")
        if any(values) and (key == "loss" or values != total):
            axes.plot(steps, values, color=color, linestyle=style, linewidth=1.2)
            drawn.append(key)
    return drawn


def weights(run: RunRecord) -> Figure:
    """Draw the pruned matrices' weights, before the run and after it, zeros left out, as histograms on a log scale.

    Raises:
        UserError: where the run has not ended, pruned nothing, or one of the two models cannot be read.
    """
    if not run.summary:
        raise UserError("the run has not ended")
    names = list(run.summary.get("layers", {}))
    before = _matrices(resolve(run.config["model.path"], run.config["model.revision"], download=False), names)
    after = _matrices(run.directory / "final", names)
    edge = _edge(before)
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for matrices, color, label in ((before, COLORS[0], "before"), (after, COLORS[1], "after, without zeros")):
        counts = sum(np.histogram(each[each != 0], _BINS, (-edge, edge))[0] for each in matrices())
        axes.stairs(counts, np.linspace(-edge, edge, _BINS + 1), color=color, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("weight")
    axes.set_ylabel("weights in a bin")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _matrices(directory: Path, names: list[str]) -> Callable[[], Iterator[np.ndarray]]:
    """Return what reads the weights of a model's matrices, flat, one matrix after the other."""
    if not names:
        raise UserError("nothing was pruned")
    source = open_source(directory)
    stored = match_names(names, list(source.file_of), names[0].partition(".")[0])
    if len(stored) < len(names):
        raise UserError(f"{directory} lacks weights that were pruned")
    return lambda: (source.read(stored[name]).float().flatten().numpy() for name in names)


def _edge(matrices: Callable[[], Iterator[np.ndarray]]) -> float:
    """Return a size that one in 2,000 weights exceeds; by a sample of each matrix, where it is large."""
    sample = np.concatenate([each[:: max(1, each.size // _SAMPLE)] for each in matrices()])
    return float(np.quantile(np.abs(sample), 0.9995))
