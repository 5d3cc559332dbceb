"""One HTML page about runs, with everything in it: it opens without a network, and can be mailed."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from distprune.checkpoints.run_directory import CONFIG
from distprune.errors import UserError, written
from distprune.monitor.plots import layers_figure
from distprune.reports import figures
from distprune.reports.runs import RunRecord, differences, times

_RESULTS = {
    "method": "method",
    "metric": "metric_name",
    "at the end": "final_metric",
    "dense model": "dense_metric",
    "masked": "masked_weights",
    "prunable": "prunable_weights",
    "sparsity": "sparsity_masked",
    "of the encoder": "encoder_sparsity",
    "of the whole model": "model_sparsity",
    "optimizer steps": "steps",
    "ranks": "world_size",
}


def page(runs: Sequence[RunRecord], curves: Figure) -> str:
    """Return the page.

    Args:
        runs: at least one.
        curves: of these.
    """
    environment = Environment(
        loader=PackageLoader("distprune.reports", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    versions = dict.fromkeys(key for run in runs for key in run.summary.get("environment", {}))
    return environment.get_template("page.html.jinja").render(
        title=" and ".join(run.name for run in runs),
        names=[run.name for run in runs],
        results=[(title, [_result(run, key) for run in runs]) for title, key in _RESULTS.items()] + _further(runs),
        curves=_embedded(curves),
        layers=[(run.name, *_picture(_layers, run)) for run in runs],
        weights=[(run.name, *_picture(figures.weights, run)) for run in runs],
        times=_times(runs),
        differences=list(differences(runs).items()),
        configurations=[(run.name, (run.directory / CONFIG).read_text()) for run in runs],
        environment=[(key, [_shown(run.summary.get("environment", {}).get(key)) for run in runs]) for key in versions],
    )


def _result(run: RunRecord, key: str) -> str:
    if not run.summary:
        return "under way"
    return "dense" if key == "method" and not run.summary.get("masked_weights") else _shown(run.summary.get(key))


def _times(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return what the runs' seconds went into, a row for each part that any of them has."""
    spent = [times(run) for run in runs]
    return [(part, [_seconds(each.get(part)) for each in spent]) for part in dict.fromkeys(chain(*spent))]


def _further(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the metrics beside the main one, as rows of the results."""
    ends = [run.summary.get("final_metrics", {}) for run in runs]
    main = {run.summary.get("metric_name") for run in runs}
    names = dict.fromkeys(name for end in ends for name in end if name not in main)
    return [(f"{name} at the end", [_shown(end.get(name)) for end in ends]) for name in names]


def _layers(run: RunRecord) -> Figure:
    if not run.layers:
        raise UserError("nothing was pruned" if run.summary else "nothing is pruned yet, or evaluated since")
    return layers_figure(run.layers)


def _picture(draw: Callable[[RunRecord], Figure], run: RunRecord) -> tuple[str | None, str]:
    """Return a picture of a run for the page, or why there is none."""
    try:
        return _embedded(draw(run)), ""
    except UserError as error:
        return None, f"not shown: {error}"


def _embedded(figure: Figure) -> str:
    image = BytesIO()
    figure.savefig(image, format="png")
    return f"data:image/png;base64,{b64encode(image.getvalue()).decode()}"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def write(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        UserError: it cannot be written.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
