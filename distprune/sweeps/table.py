"""A sweep's means and differences as tables, and a plot of the metric over the sparsity."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from distprune.monitor.plots import COLORS, GREY, as_it_is
from distprune.sweeps.means import Difference, Mean

SPARSITY = "pruning.sparsity"


def markdown(means: Sequence[Mean], baseline: str | None) -> str:
    """Return the table of the means for a reader."""
    names = ", ".join(sorted({each.metric_name for each in means})) or "metric"
    below = [f"worse than {baseline}", "pairs"] if baseline else []
    titles = ["method", "at", names, *below, "seeds", "diverged", "steps"]
    titles += ["with those before", "its teacher's", "gradients for scores"]
    titles += ["sparsity", "of the encoder", "of the model", "packed MiB", "examples/s"]
    lines = []
    for each in means:
        counts = [str(number) for number in (each.seeds, each.diverged, each.steps, each.total_steps)]
        counts += [str(each.teacher_steps), "" if each.score_gradients is None else f"{each.score_gradients:.0f}"]
        sparsities = [
            "" if part is None else f"{part:.2%}"
            for part in (each.sparsity, each.encoder_sparsity, each.model_sparsity)
        ]
        packed = "" if each.packed_bytes is None else f"{each.packed_bytes / 2**20:.1f}"
        speed = "" if each.examples_per_s is None else f"{each.examples_per_s:.1f}"
        compared = [_with_spread(each.below, each.interval), str(each.pairs)] if baseline else []
        metric = _with_spread(each.metric, each.deviation)
        lines.append([each.method, _words(each.point), metric, *compared, *counts, *sparsities, packed, speed])
    return _rows(titles, lines)


def markdown_of_differences(differences: Sequence[Difference]) -> str:
    """Return the table of the differences for a reader."""
    titles = [
        "method",
        "against",
        "at",
        "better by",
        "more than at the first point",
        "pairs",
        "diverged",
        "of the other",
    ]
    return _rows(
        titles,
        [
            [
                each.method,
                each.other,
                _words(each.point),
                _with_spread(each.better, each.interval),
                _with_spread(each.more, each.more_interval),
                *(str(number) for number in (each.pairs, each.diverged, each.other_diverged)),
            ]
            for each in differences
        ],
    )


def _rows(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in (titles, ["---"] * len(titles), *escaped))


def _words(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in point.items())


def _with_spread(value: float | None, spread: float | None) -> str:
    return "" if value is None else f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _line_of(each: Mean) -> str:
    """Return the name of the line of the plot that a mean is on."""
    return f"{each.method} {_words({key: value for key, value in each.point.items() if key != SPARSITY})}".strip()


def draw(means: Sequence[Mean], baseline: str | None, title: str) -> Figure:
    """Draw the metric over the sparsity, a line with a band (the deviation) for each method, the baseline dashed.

    A method has a line for each value of what else its grid has. Where no seed of one has converged, a cross at the
    bottom says so.
    """
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")
    axes = figure.subplots()
    crosses = 0
    lines: dict[str, list[Mean]] = {}
    for each in (each for each in means if each.method != baseline):
        lines.setdefault(_line_of(each), []).append(each)
    for number, (name, group) in enumerate(lines.items()):
        colour, marker = COLORS[number % len(COLORS)], "osD^v"[number // len(COLORS) % 5]
        points = sorted(group, key=lambda each: each.sparsity)
        line = [(each.sparsity, each.metric, each.deviation or 0.0) for each in points if each.metric is not None]
        if line:
            sparsities, metrics, spreads = zip(*line, strict=True)
            axes.plot(sparsities, metrics, color=colour, marker=marker, label=as_it_is(name))
            low, high = ([m + sign * s for m, s in zip(metrics, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(sparsities, low, high, color=colour, alpha=0.15, linewidth=0)
            if len(line) == 1:  # where a band has no width
                axes.vlines(sparsities, low, high, color=colour)
        diverged = [each.sparsity for each in points if each.metric is None]
        if diverged:
            bottom = axes.get_xaxis_transform()
            label = as_it_is(f"{name}: all diverged")
            crosses += 1
            axes.plot(diverged, [0.03 * crosses] * len(diverged), "x", color=colour, transform=bottom, label=label)
    dense = [(_line_of(each), each.metric) for each in means if each.method == baseline and each.metric is not None]
    for name, value in dense:
        axes.axhline(value, color=GREY, linestyle="--", label=as_it_is(f"{name} {value:.3f}"))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="sparsity of the prunable weights", ylabel=means[0].metric_name if means else "")
    axes.set_title(as_it_is(title))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure
