"""The pictures of a run, as PNG files; matplotlib's objects only, no global state."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distprune.errors import UserError, written
from distprune.monitor.records import RESERVED

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"  # of Okabe and Ito: colour-blind safe
COLORS = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Metrics = Sequence[Mapping[str, Any]]


def plot_run(metrics: Metrics, path: Path, dense: float | None, title: str) -> None:
    """Draw a run as a PNG of 1200 x 700 pixels: main metric and sparsity above, learning rate below.

    Args:
        metrics: records of metrics.jsonl; the main metric is the first one of the validation records.
        path: where the PNG goes.
        dense: the dense model's main metric, a dashed line; null: no line.
        title: above the plot.
    """
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2])
    _draw_sparsity(upper.twinx(), metrics)
    _draw_metric(upper, metrics, dense)
    _draw_learning_rate(lower, metrics)
    _mark_epochs(upper, metrics)
    figure.suptitle(as_it_is(title), weight="bold")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")


def as_it_is(text: str) -> str:
    """Return a text that matplotlib shows as it is: with its dollars, and as a label also where it begins with _."""
    return " " * text.startswith("_") + text.replace("$", r"\$")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure where a user says; another suffix that matplotlib knows gives that kind of file.

    Raises:
        UserError: it cannot be written, or has a suffix that matplotlib does not know.
    """
    check_suffix(path)
    try:
        with written(path):
            figure.savefig(path)
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from error


def check_suffix(path: str | Path) -> None:
    """Refuse a picture's file without the suffix that says of which kind it is.

    Raises:
        UserError: as said.
    """
    if not Path(path).suffix:
        raise UserError(f"{str(path)!r} has no suffix, which says the kind of picture; allowed: e.g. {path}.png")


def series(metrics: Metrics, name: str, split: str | None = None) -> tuple[list[int], list[float]]:
    """Return the steps and values of the records that have a value of that name."""
    found = [record for record in metrics if split in (None, record["split"]) and record.get(name) is not None]
    return [record["step"] for record in found], [record[name] for record in found]


def main_metric(metrics: Metrics) -> str | None:
    """Return the name of the first metric of the validation records that is ever finite."""
    names = dict.fromkeys(name for record in metrics if record["split"] == "validation" for name in record)
    found = (name for name in names if name not in RESERVED and "/" not in name)
    return next((name for name in found if series(metrics, name, "validation")[0]), None)


def _draw_metric(axes: Axes, metrics: Metrics, dense: float | None) -> None:
    axes.set_zorder(2)  # above the sparsity's area
    axes.patch.set_visible(False)
    name = main_metric(metrics)
    if name is not None:
        steps, values = series(metrics, name, "validation")
        label = as_it_is(name.replace("_", " "))
        axes.plot(steps, values, color=BLUE, marker="o", linewidth=2, label=f"{label} {values[-1]:.3f}")
        axes.set_ylabel(f"{label} on validation", color=BLUE)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.5, label=f"dense {dense:.3f}")
    axes.margins(x=0.02, y=0.1)
    axes.tick_params(axis="y", colors=BLUE)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sparsity(axes: Axes, metrics: Metrics) -> None:
    steps, values = series(metrics, "sparsity")
    label = f"sparsity {values[-1]:.1%}" if values else None
    axes.plot(steps, values, color=RED, drawstyle="steps-post", linewidth=1.5, label=label)
    axes.fill_between(steps, values, step="post", color=RED, alpha=0.1, linewidth=0)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("sparsity", color=RED)
    axes.tick_params(axis="y", colors=RED)
    axes.spines[["top", "left"]].set_visible(False)


def _draw_learning_rate(axes: Axes, metrics: Metrics) -> None:
    steps, values = series(metrics, "lr")
    axes.plot(steps, values, color=GREEN, linewidth=1.5)
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylabel("learning rate", color=GREEN)
    axes.tick_params(axis="y", colors=GREEN)
    axes.set_xlabel("optimizer steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_epochs(axes: Axes, metrics: Metrics) -> None:
    """Add an axis in epochs on top."""
    pace = next((record["step"] / record["epoch"] for record in reversed(metrics) if record.get("epoch")), None)
    if pace is not None:
        top = axes.secondary_xaxis("top", functions=(lambda step: step / pace, lambda epoch: epoch * pace))
        top.set_xlabel("epochs")
        top.spines["top"].set_visible(False)


def layers_figure(sparsity_by_name: Mapping[str, float]) -> Figure:
    """Return a picture of the sparsity of each matrix: a heat map of layers and kinds, and bars for the rest.

    Args:
        sparsity_by_name: sparsity of each parameter, [0, 1]; at least one. The first number in a name is the
            layer's.
    """
    kinds, rest = _by_kind(sparsity_by_name)
    rows = [len(part) for part in (kinds, rest) if part]
    columns = max((len(layers) for layers in kinds.values()), default=0)
    size = max(9, 3 + 0.3 * columns), 1.5 + 0.4 * sum(rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    if kinds:
        _draw_heat_map(axes[0], kinds)
    if rest:
        _draw_bars(axes[-1], rest)
    return figure


def _by_kind(sparsity_by_name: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Split the matrices into those with a layer number, by kind and layer, and the rest."""
    kinds: dict[str, dict[int, float]] = {}
    rest: dict[str, float] = {}
    for name, sparsity in sparsity_by_name.items():
        prefix, *layer_and_kind = re.split(r"\.(\d+)\.", name.removesuffix(".weight"), maxsplit=1)
        if layer_and_kind:
            kinds.setdefault(f"{prefix}.{layer_and_kind[1]}", {})[int(layer_and_kind[0])] = sparsity
        else:
            rest[prefix] = sparsity
    return dict(zip(_without_shared_start(list(kinds)), kinds.values(), strict=True)), rest


def _without_shared_start(names: list[str]) -> list[str]:
    """Return dotted names without the components with which all of them start."""
    parts = [name.split(".") for name in names]
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))))
    return [".".join(part[shared:] or part[-1:]) for part in parts]


def _draw_heat_map(axes: Axes, kinds: Mapping[str, Mapping[int, float]]) -> None:
    layers = sorted({layer for row in kinds.values() for layer in row})
    values = np.array([[row.get(layer, np.nan) for layer in layers] for row in kinds.values()])
    axes.imshow(values, aspect="auto", cmap="Blues")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, size=8)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), [as_it_is(kind) for kind in kinds])
    axes.set_xlabel("layer")
    axes.set_title("sparsity of each matrix in %", weight="bold")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_bars(axes: Axes, sparsity_by_name: Mapping[str, float]) -> None:
    bars = axes.barh([as_it_is(name) for name in sparsity_by_name], list(sparsity_by_name.values()), color=BLUE)
    axes.bar_label(bars, fmt="{:.0%}", padding=3)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("sparsity")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
