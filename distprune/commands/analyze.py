"""``distprune analyze``: what a user's own teacher, model and data say about the choices of a recipe."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from distprune import dist, settings, turns
from distprune.analysis.components import Part, pays, reason, record, setting
from distprune.analysis.figures import draw_components, draw_softness
from distprune.analysis.pruned_alone import costs_of, dense_setup, pruned_alone
from distprune.analysis.softened import soften
from distprune.analysis.temperature import ENOUGH, TEMPERATURES, Softness, recommended
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import evaluate
from distprune.errors import UserError
from distprune.monitor.plots import check_suffix, save_png
from distprune.monitor.records import check_places, save_json
from distprune.training.setup import load_task, local_model, teacher_directory


def run(subject: str, config_path: str, overrides: list[str], png: str, json_path: str | None, **options: Any) -> None:
    """Analyse, print a table, draw it and write JSON on rank 0. Collective: every rank calls it."""
    dist.init()
    turns.on_main(lambda: check_places(png, json_path))
    turns.on_main(lambda: check_suffix(png))
    if subject == "teacher":
        _teacher(config_path, overrides, png, json_path, **options)
    else:
        _components(config_path, overrides, png, json_path, **options)
    dist.shutdown()


# ------------------------------------------------------------------------------ the teacher


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
    directory = teacher_directory(config, task, student)
    size = config.train.eval_batch_size
    if dist.is_main():
        print(f"the teacher is run on {min(rows, len(task.train)):,} training rows", flush=True)
    engine = build_frozen(config.deepspeed.teacher, directory, task.auto_class, task.model_options(), size)
    means = soften(engine, task, sorted(temperatures or TEMPERATURES), rows, size, config.train.seed)
    best = recommended(means)

    def show() -> None:
        Console().print(_softness_table(means, best))
        if json_path is not None:
            save_json(json_path, {"recommended": best, "results": [each._asdict() for each in means]})
        title = f"the teacher {path} on {min(rows, len(task.train)):,} training rows"
        save_png(draw_softness(means, best, title), png)
        if best is None:
            print(f"the teacher is soft at none of these temperatures; {png}")
        else:
            print(f"distillation.temperature={best:g} is the lowest at which the teacher is soft; {png}")

    turns.on_main(show)


def _softness_table(means: list[Softness], best: float | None) -> Table:
    table = Table(title="what the teacher says over the temperature", title_justify="left")
    for name in ("temperature", "entropy / log C", "top probability", "gradient", ""):
        table.add_column(name, justify="left" if not name else "right")
    for each in means:
        remark = f"lowest with an entropy of at least {ENOUGH:g}" if each.temperature == best else ""
        table.add_row(f"{each.temperature:g}", f"{each.entropy:.4f}", f"{each.top:.4f}", f"{each.gradient:.4f}", remark)
    return table


# ------------------------------------------------------------------------------ the components


def _components(
    config_path: str, overrides: list[str], png: str, json_path: str | None, sparsities: list[float], layers: bool
) -> None:
    """Collective: every rank calls it."""
    if not all(0 < each < 1 for each in sparsities):
        raise UserError(f"--sparsities is {sparsities}; allowed: more than 0 and less than 1 each")
    config = dist.agree(lambda: settings.load_valid(config_path, overrides))
    setup = dense_setup(config)

    def measure() -> tuple[str, float]:
        return next(iter(evaluate(setup.student, setup.task, config.train.eval_batch_size).items()))

    metric, dense = measure()
    parts = costs_of(config, setup, layers)
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
        save_png(draw_components(parts, dense, metric), png)

    turns.on_main(show)


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
