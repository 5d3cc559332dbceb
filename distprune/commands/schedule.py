"""``distprune schedule``: the learning rate and the sparsity over a run, as a table and as a picture."""

from bisect import bisect_right
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table

from distprune import recipes, settings
from distprune.config import Config, value_of
from distprune.errors import UserError
from distprune.monitor.plots import as_it_is, save_png
from distprune.tasks import task_kind
from distprune.training.plan import Plan, make_plan
from distprune.training.setup import load_task, local_model

ROWS = 40
_NEAR_ZERO = 0.15
"""A sparsity below which no label finds room."""
LR_COLOR, SPARSITY_COLOR, MUTED = "#1f5fa8", "#c2410c", "#6b7280"


def run(config_path: str, overrides: list[str], examples: int | None, png: str) -> None:
    """Print the schedule's table, and draw it.

    Args:
        config_path: YAML file.
        overrides: ``key=value``.
        examples: number of training examples; None: counted in the data.
        png: path of the picture.
    """
    config, given = settings.load_given(config_path, overrides)
    values = recipes.apply(config, given)
    settings.validate(config)
    if examples is not None and examples < 1:
        raise UserError(f"--examples is {examples}; allowed: at least 1")
    if examples is None:
        examples = task_kind(config.task.name).count_train(config)
    if examples is None:
        examples = len(load_task(config, local_model(config.model.path, config.model.revision)).train)
    plan = make_plan(config, examples)
    console = Console()
    if values:
        console.print(recipe_table(config, values))
    console.print(table(plan))
    draw(plan, png, Path(config_path).stem)
    left = examples % config.train.batch_size
    without = f" ({left} of {examples} examples, which fill no batch, are left out of each)" if left else ""
    said = f"{plan.steps_per_epoch} steps per epoch{without}, {plan.total_steps} steps; {png}"
    console.print(said, soft_wrap=True)


def recipe_table(config: Config, values: recipes.Values) -> Table:
    """Return a table of what the recipe has set and why, and what is given in its place."""
    rows = Table("key", "value", "because", title=f"recipe {config.recipe.name}", title_justify="left")
    for name, derived in values.items():
        value = value_of(config, name)
        is_given = name not in config.recipe.derived
        rows.add_row(name, _short(value), f"given; the recipe has {_short(derived.value)}" if is_given else derived.why)
    return rows


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sparsity_at(plan: Plan, step: int) -> float:
    """Return the sparsity that an optimizer step trains with."""
    steps = sorted(plan.ladder)
    reached = bisect_right(steps, step)
    return float(plan.ladder[steps[reached - 1]]) if reached else 0.0


def rows(plan: Plan) -> list[int]:
    """Return the optimizer steps worth a row, in order.

    The run's ends, rewinds and the first and last pruning are always there; the other prunings and the starts
    of epochs as far as about ``ROWS`` rows allow, evenly thinned.
    """
    prunings = sorted(plan.ladder)
    kept = {0, plan.total_steps, *plan.lr.rewinds, *prunings[:1], *prunings[-1:]}
    others = sorted({*range(0, plan.total_steps, plan.steps_per_epoch), *prunings} - kept)
    stride = max(1, ceil(len(others) / max(1, ROWS - len(kept))))
    return sorted(kept.union(others[::stride]))


def table(plan: Plan) -> Table:
    """Return a table of the run's epochs, prunings and rewinds."""
    prunings = sorted(plan.ladder)
    shown = Table(title="Learning rate and sparsity")
    for name in ("epoch", "step", "learning rate", "sparsity"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for step in rows(plan):
        events = ["rewind"] if step in plan.lr.rewinds else []
        if step in plan.ladder:
            events.append(f"pruning {prunings.index(step) + 1} of {len(prunings)}")
        if step == plan.total_steps:
            events.append("end")
        shown.add_row(
            f"{step / plan.steps_per_epoch:.2f}",
            str(step),
            f"{plan.lr.at(step):.2e}",
            f"{sparsity_at(plan, step):.2%}",
            ", ".join(events),
        )
    return shown


def draw(plan: Plan, png: str, title: str) -> None:
    """Draw the learning rate and, where the run prunes, the sparsity below it, over epochs."""
    panels = 2 if plan.ladder else 1
    figure = Figure(figsize=(9, 1.4 + 2.3 * panels), dpi=150, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    _draw_lr(axes[0], plan)
    if plan.ladder:
        _draw_sparsity(axes[1], plan)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[-1].set_xlabel(f"epochs of {plan.steps_per_epoch:,} optimizer steps")
    axes[-1].set_xlim(0, plan.total_steps / plan.steps_per_epoch)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    figure.suptitle(as_it_is(title), fontsize=11)
    save_png(figure, png)


def _draw_lr(axis: Axes, plan: Plan) -> None:
    starts = {*plan.lr.bounds[:-1], plan.lr.warmup}
    ends = [(step, plan.lr.final) for step in plan.lr.bounds[1:]]
    # Sorted, the end of a cycle comes before the peak of the next at the same step.
    points = sorted([(step, plan.lr.at(step)) for step in starts] + ends)
    epochs = [step / plan.steps_per_epoch for step, _ in points]
    axis.plot(epochs, [rate for _, rate in points], color=LR_COLOR, linewidth=1.8)
    axis.set_ylabel("learning rate")
    axis.set_ylim(0, plan.lr.peak * 1.08)
    axis.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if rewinds := [step / plan.steps_per_epoch for step in plan.lr.rewinds]:
        peaks = [plan.lr.peak] * len(rewinds)
        axis.plot(rewinds, peaks, "^", color=LR_COLOR, markersize=7, clip_on=False, label=f"rewinds: {len(rewinds)}")
        _legend(axis)


def _draw_sparsity(axis: Axes, plan: Plan) -> None:
    prunings = sorted(plan.ladder)
    steps = [0, *prunings, plan.total_steps]
    values = [sparsity_at(plan, step) for step in steps]
    epochs = [step / plan.steps_per_epoch for step in steps]
    axis.plot(epochs, values, drawstyle="steps-post", color=SPARSITY_COLOR, linewidth=1.8)
    axis.plot(
        epochs[1:-1],
        values[1:-1],
        "o",
        color=SPARSITY_COLOR,
        markersize=3.5,
        label=f"prunings: {len(prunings)}",
    )
    first = ((6, -13), "left") if values[1] > _NEAR_ZERO else ((-6, 6), "right")
    for place, (offset, side) in ((1, first), (-2, ((-6, 6), "right"))):
        at = (epochs[place], values[place])
        axis.annotate(f"{100 * values[place]:g}%", at, offset, textcoords="offset points", ha=side)
    _name_phases(axis, epochs)
    axis.set_ylabel("sparsity")
    axis.set_ylim(0, 1.05)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _legend(axis)


def _legend(axis: Axes) -> None:
    """Put the legend above the panel, out of the curve's way."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0, handlelength=1)


def _name_phases(axis: Axes, epochs: list[float]) -> None:
    """Shade and name what comes before the first pruning and after the last one."""
    for start, end, name in ((epochs[0], epochs[1], "dense"), (epochs[-2], epochs[-1], "mask fixed")):
        if end > start:
            axis.axvspan(start, end, color="#f3f4f6", zorder=0)
            axis.text((start + end) / 2, 0.5, name, color=MUTED, ha="center", va="center")
