"""``distprune analyze components``: what each component of a model costs, and what pruning it alone does to the metric.

The model runs as a run's student would, sharded or not, and is pruned by a run's own pruner; nothing is trained.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from distprune import dist, settings
from distprune.analysis.components import Part, measure_parts, pays, reason, record, setting
from distprune.config import ENCODER, Config, DistillationConfig, PruningConfig, RegrowthConfig
from distprune.engines.batches import eval_batches
from distprune.engines.build import set_learning_rate
from distprune.engines.evaluate import evaluate, on_device
from distprune.errors import UserError
from distprune.monitor.plots import BLUE, GREEN, GREY, RED, save_png
from distprune.monitor.records import save_json
from distprune.training.setup import Setup, build_pruner, prepare

REPEAT = 7
"""Forward passes that are timed."""

T = TypeVar("T")


def analyse_components(
    config_path: str, overrides: list[str], png: str, json_path: str | None, sparsities: list[float], layers: bool
) -> None:
    """Measure, print a table and a recommendation, draw and write JSON on rank 0. Collective: every rank calls it."""
    if not all(0 < each < 1 for each in sparsities):
        raise UserError(f"--sparsities is {sparsities}; allowed: more than 0 and less than 1 each")
    config = dist.agree(lambda: settings.load_valid(config_path, overrides))
    setup = dense_setup(config)

    def measure() -> tuple[str, float]:
        return next(iter(evaluate(setup.student, setup.task, config.train.eval_batch_size).items()))

    metric, dense = measure()
    parts = _costs(config, setup, layers)
    steps = sorted(set(sparsities))
    for part in parts:
        found = pruned_alone(config, setup, part.matrices, steps, measure)
        part.metrics = {step: value for step, (_, value) in zip(steps, found, strict=True)}

    def show() -> None:
        _show(config.model.path, parts, dense, metric, setup.new_weights)
        if json_path is not None:
            model = {"model": config.model.path, "metric": metric, "dense": dense}
            recommended = [each.place.component for each in parts if each.place.layer is None and pays(each)]
            save_json(json_path, model | {"recommended": recommended, "results": [record(part) for part in parts]})
        _draw(parts, dense, metric, png)

    dist.on_main(show)


def dense_setup(config: Config) -> Setup:
    """Return a run's student with a learning rate of 0, all of it trained. Collective: every rank calls it.

    Args:
        config: of the run; what only its training needs is taken out, so that any number of ranks fits its batch.

    Raises:
        UserError: on every rank, where any part of the configuration does not fit the others.
    """
    config.task.more_validation = []
    config.model.dropout, config.model.freeze = 0.0, []
    config.train.batch_size, config.train.accumulation = dist.detect().size, 1
    config.pruning, config.regrowth, config.distillation = PruningConfig(), RegrowthConfig(), DistillationConfig()
    setup = prepare(config)
    set_learning_rate(setup.student, 0.0)
    return setup


def _costs(config: Config, setup: Setup, layers: bool) -> list[Part]:
    """Return what the parts cost on the first evaluation batch, the same on every rank. Collective: all call it."""
    student, task = setup.student, setup.task
    rows = eval_batches(task.validation["length"], config.train.eval_batch_size, 0, 1)[0].indices
    batch = on_device(task.collate(task.validation.__getitems__(rows)), student)
    was_training = student.module.training
    student.eval()
    with torch.no_grad():
        parts = measure_parts(
            student.module,
            lambda: task.forward(student, batch),
            batch["input_ids"].numel(),
            student.device,
            REPEAT,
            layers,
        )
    student.train(was_training)
    sums = dist.all_sum([part.latency_share for part in parts])
    return [replace(part, latency_share=total / setup.world.size) for part, total in zip(parts, sums, strict=True)]


def pruned_alone(
    config: Config, setup: Setup, matrices: Sequence[str], sparsities: Sequence[float], measure: Callable[[], T]
) -> list[T]:
    """Return what is measured with nothing but some matrices pruned by magnitude; the model is then as it was.

    Collective: every rank calls it.

    Args:
        config: of the run; its pruning section does not matter.
        setup: of `dense_setup`.
        matrices: names of the parameters, pruned together.
        sparsities: ascending.
        measure: called at each of them.
    """
    pruning = PruningConfig(include=[f"^{re.escape(name)}$" for name in matrices])
    pruner = build_pruner(replace(config, pruning=pruning), setup.student)
    dense = [shard.master.clone() for shard in pruner.shards]
    measured = []
    for sparsity in sparsities:
        _backward(setup)
        pruner.after_backward(Fraction(str(sparsity)))
        setup.student.step()
        measured.append(measure())
    pruner.detach()
    for shard, values in zip(pruner.shards, dense, strict=True):
        shard.master.copy_(values)
    _backward(setup)
    setup.student.step()
    return measured


def _backward(setup: Setup) -> None:
    """Let DeepSpeed have gradients that are all zero, for a step that only carries the fp32 weights everywhere.

    Collective: every rank calls it.
    """
    batch = on_device(setup.task.collate(setup.task.train.__getitems__([0])), setup.student)
    setup.student.backward(setup.task.forward(setup.student, batch).float().sum() * 0.0)


def _show(model: str, parts: list[Part], dense: float, metric: str, new_weights: list[str]) -> None:
    """Print the table, a line on each component, and the setting that follows."""
    components = [part for part in parts if part.place.layer is None]
    console = Console()
    console.print(_costs_table(f"what the components of {model} cost", parts))
    console.print(_metrics_table(f"{metric} with one component pruned, by sparsity; dense {dense:.4f}", parts))
    for part in components:
        is_new = not set(part.matrices).isdisjoint(new_weights)
        console.print(reason(part, dense, metric, is_new), highlight=False, soft_wrap=True)
    console.print(setting(components), highlight=False, markup=False, soft_wrap=True)


def _costs_table(title: str, parts: list[Part]) -> Table:
    headings = ("M\nweights", "of all", "MiB", "MFLOPs\na token", "of all", "of the\ntime")
    components = [part for part in parts if part.place.layer is None]
    shares = ("weights_share", "flops_share", "latency_share")
    left = [max(0.0, 1 - sum(getattr(part, share) for part in components)) for share in shares]
    table = _empty_table(title, headings)
    for part in components:
        table.add_row(*_costs_cells(part))
    table.add_row("all else", "", f"{left[0]:.1%}", "", "", f"{left[1]:.1%}", f"{left[2]:.1%}", end_section=True)
    for part in parts[len(components) :]:
        table.add_row(*_costs_cells(part))
    return table


def _costs_cells(part: Part) -> list[str]:
    weights = [f"{part.weights / 1e6:.2f}", f"{part.weights_share:.1%}", f"{part.bytes / 2**20:.2f}"]
    return [
        str(part.place),
        *weights,
        f"{part.flops / 1e6:.2f}",
        f"{part.flops_share:.1%}",
        f"{part.latency_share:.1%}",
    ]


def _metrics_table(title: str, parts: list[Part]) -> Table:
    table = _empty_table(title, [f"{sparsity:.4g}" for sparsity in parts[0].metrics])
    for part in parts:
        table.add_row(str(part.place), *(f"{value:.4f}" for value in part.metrics.values()))
    return table


def _empty_table(title: str, headings: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("component", overflow="fold", min_width=18)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _draw(parts: list[Part], dense: float, metric: str, path: str) -> None:
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
    save_png(figure, path)


def _finish(axes: Axes, title: str, label: str, dense: float | None = None) -> None:
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", label="dense")
    axes.set(title=title, ylabel=label.replace("_", " "))
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
