"""``distprune analyze``: what a user's own teacher, model and data say about the choices of a recipe."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from distprune import dist, settings
from distprune.analysis.temperature import ENOUGH, TEMPERATURES, Softness, recommended, softness
from distprune.commands.analyze_components import analyse_components
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import logits_of_rows
from distprune.errors import UserError
from distprune.monitor.plots import BLUE, GREEN, GREY, RED, save_png
from distprune.monitor.records import save_json
from distprune.tasks.base import Task
from distprune.training.setup import check_teacher, load_task, local_model


def run(subject: str, config_path: str, overrides: list[str], png: str, json_path: str | None, **options: Any) -> None:
    """Analyse, print a table, draw it and write JSON on rank 0. Collective: every rank calls it."""
    dist.init()
    if subject == "teacher":
        _teacher(config_path, overrides, png, json_path, **options)
    else:
        analyse_components(config_path, overrides, png, json_path, **options)
    dist.shutdown()


def _teacher(
    config_path: str, overrides: list[str], png: str, json_path: str | None, rows: int, temperatures: list[float]
) -> None:
    """Collective: every rank calls it."""
    config = dist.agree(lambda: settings.load_valid(config_path, overrides))
    path = config.teacher.path
    if path is None:
        raise UserError("teacher.path is not set; allowed: the model to analyse")
    if config.task.regression:
        raise UserError("the task is a regression, whose teacher has no temperature; allowed: another task")
    if rows < 1 or not all(0 < each < float("inf") for each in temperatures):
        raise UserError(
            f"--rows is {rows} and --temperatures {temperatures}; allowed: at least 1, and more than 0 each"
        )
    student = local_model(config.model.path, config.model.revision)
    task = load_task(config, student)
    directory = local_model(path, config.teacher.revision)
    dist.agree(lambda: check_teacher(config, directory, task, student))
    size = config.train.eval_batch_size
    if dist.is_main():
        print(f"the teacher is run on {min(rows, len(task.train)):,} training rows", flush=True)
    engine = build_frozen(config.deepspeed.teacher, directory, task.auto_class, task.model_options(), size)
    means = soften(engine, task, sorted(temperatures or TEMPERATURES), rows, size, config.train.seed)
    best = recommended(means)

    def show() -> None:
        Console().print(_table(means, best))
        if json_path is not None:
            save_json(json_path, {"recommended": best, "results": [vars(each) for each in means]})
        _draw(means, best, png, f"the teacher {path} on {min(rows, len(task.train)):,} training rows")
        if best is None:
            print(f"the teacher is soft at none of these temperatures; {png}")
        else:
            print(f"distillation.temperature={best:g} is the lowest at which the teacher is soft; {png}")

    dist.on_main(show)


def soften(engine: Any, task: Task, temperatures: list[float], rows: int, batch_size: int, seed: int) -> list[Softness]:
    """Return the means over training rows for each temperature, the same on every rank. Collective.

    Args:
        engine: the teacher's.
        task: gives the rows.
        temperatures: ascending.
        rows: how many are drawn; all where there are no more.
        batch_size: rows in a forward pass on one rank.
        seed: draws them.
    """
    drawn = np.sort(np.random.default_rng(seed).permutation(len(task.train))[:rows])
    data = task.train.select(drawn)
    sums = {each: Softness(each) for each in temperatures}
    for _, logits in logits_of_rows(engine, task, data, batch_size):
        for each in temperatures:
            sums[each] += softness(logits[None], each)
    return [Softness(each, *dist.all_sum(sums[each].sums())).mean() for each in temperatures]


def _table(means: list[Softness], best: float | None) -> Table:
    table = Table(title="what the teacher says over the temperature", title_justify="left")
    for name in ("temperature", "entropy / log C", "top probability", "gradient", ""):
        table.add_column(name, justify="left" if not name else "right")
    for each in means:
        remark = f"lowest with an entropy of at least {ENOUGH:g}" if each.temperature == best else ""
        table.add_row(f"{each.temperature:g}", f"{each.entropy:.4f}", f"{each.top:.4f}", f"{each.gradient:.4f}", remark)
    return table


def _draw(means: list[Softness], best: float | None, path: str, title: str) -> None:
    figure = Figure(figsize=(8, 14 / 3), dpi=150, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    temperatures = [each.temperature for each in means]
    left.plot(temperatures, [each.entropy for each in means], color=BLUE, marker="o", label="entropy / log C")
    left.plot(temperatures, [each.top for each in means], color=GREEN, marker="s", label="top probability")
    right.plot(temperatures, [each.gradient for each in means], color=RED, marker="^", label="gradient (right)")
    if best is not None:
        left.axvline(best, color=GREY, linestyle="--", label=f"T = {best:g}")
    left.set(xlabel="temperature", ylabel="mean over rows", ylim=(0, 1.02), title=title)
    right.set(ylabel="norm of the gradient", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save_png(figure, path)
