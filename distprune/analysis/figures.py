"""What the analyses draw."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distprune.analysis.components import Part
from distprune.analysis.temperature import Softness
from distprune.config import ENCODER
from distprune.monitor.plots import BLUE, GREEN, GREY, RED, as_it_is


def draw_softness(means: list[Softness], best: float | None, title: str) -> Figure:
    """Draw what the teacher says over the temperature, and the temperature that is recommended."""
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    temperatures = [each.temperature for each in means]
    left.plot(temperatures, [each.entropy for each in means], color=BLUE, marker="o", label="entropy / log C")
    left.plot(temperatures, [each.top for each in means], color=GREEN, marker="s", label="top probability")
    right.plot(temperatures, [each.gradient for each in means], color=RED, marker="^", label="gradient (right)")
    if best is not None:
        left.axvline(best, color=GREY, linestyle="--", label=f"T = {best:g}")
    left.set(xlabel="temperature", ylabel="mean over rows", ylim=(0, 1.02), title=as_it_is(title))
    right.set(ylabel="norm of the gradient", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_components(parts: list[Part], dense: float, metric: str) -> Figure:
    """Draw the metric and the shares of each component as bars, and below them the metric over layers where known."""
    components = [part for part in parts if part.place.layer is None]
    of_layers = parts[len(components) :]
    figure = Figure(figsize=(11, 8 if of_layers else 14 / 3), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2 if of_layers else 1, 2)
    left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    names = [part.place.component.replace("_", "\n") for part in components]
    _bars(left, names, {f"{step:.4g}": [part.metrics[step] for part in components] for step in components[0].metrics})
    _finish(left, "one component pruned, by sparsity", metric, dense)
    kinds = {"parameters": "weights_share", "FLOPs": "flops_share", "latency": "latency_share"}
    _bars(right, names, {kind: [getattr(part, name) for part in components] for kind, name in kinds.items()})
    right.yaxis.set_major_formatter(PercentFormatter(1))
    _finish(right, "what the components cost", "of the model")
    if of_layers:
        below = figure.add_subplot(grid[1, :])
        _lines(below, of_layers)
        _finish(below, "one component of one layer pruned, by sparsity", metric, dense)
    return figure


def _finish(axes: Axes, title: str, label: str, dense: float | None = None) -> None:
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", label="dense")
    axes.set(title=title, ylabel=as_it_is(label.replace("_", " ")))
    axes.margins(y=0.2)  # room for the legend
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize="small")


def _bars(axes: Axes, names: list[str], heights: dict[str, list[float]]) -> None:
    """Draw a group of bars for each name, one of each kind."""
    width, colors = 0.8 / len(heights), (BLUE, RED, GREEN)
    for index, (kind, values) in enumerate(heights.items()):
        places = [at + (index - (len(heights) - 1) / 2) * width for at in range(len(names))]
        alpha = 1 / (1 + index // len(colors))
        axes.bar(places, values, width, color=colors[index % len(colors)], alpha=alpha, label=kind)
    axes.set_xticks(range(len(names)), names, fontsize="x-small")


def _lines(axes: Axes, parts: list[Part]) -> None:
    """Draw a line over the layers for each component and sparsity."""
    for component, color in zip(ENCODER, (BLUE, RED), strict=True):
        chosen = [part for part in parts if part.place.component == component]
        for index, step in enumerate(parts[0].metrics):
            style, values = ("-", "--", ":", "-.")[index % 4], [part.metrics[step] for part in chosen]
            axes.plot(values, color=color, linestyle=style, marker="o", label=f"{component} {step:.4g}")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
