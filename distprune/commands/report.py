"""``distprune report``: a page, a picture and a table of a run, or of several side by side."""

from distprune.checkpoints.run_directory import CONFIG
from distprune.errors import UserError
from distprune.monitor.plots import save_png
from distprune.monitor.records import csv_text
from distprune.paths import expanded
from distprune.reports.figures import curves
from distprune.reports.page import page, write
from distprune.reports.runs import read_runs


def run(run_dirs: list[str], html: str) -> None:
    """Write the page, and beside it the curves as PNG and every record of metrics.jsonl as CSV.

    Args:
        run_dirs: directories of runs, which may be under way.
        html: where the page goes; the others have its name with another suffix.

    Raises:
        UserError: a directory that is no run's, or a file that cannot be written.
    """
    target = expanded(html)
    if target.suffix != ".html":
        raise UserError(f"--html is {html!r}; allowed: a name that ends in .html")
    if target.stem in ("plot", "layers") and (target.parent / CONFIG).exists():
        raise UserError(f"--html is {html!r}, and {target.stem}.png beside it is the run's own; allowed: another name")
    runs = read_runs(run_dirs)
    figure = curves(runs)
    write(target, page(runs, figure))
    save_png(figure, str(target.with_suffix(".png")))
    records = [{"run": run.name, **record} for run in runs for record in run.metrics]
    write(target.with_suffix(".csv"), csv_text(records))
    print(f"{target}, {target.with_suffix('.png')} and {target.with_suffix('.csv')}")
