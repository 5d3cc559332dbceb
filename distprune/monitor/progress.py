"""How far the run is: a bar in a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LINES = 20  # plain lines in a run
HIDDEN = ("step", "epoch", "split")
FORMATS: dict[str, Callable[[float], str]] = {
    "lr": lambda value: f"lr {value:.1e}",
    "sparsity": lambda value: f"sparsity {value:.1%}",
    "examples_per_s": lambda value: f"{value:.0f} examples/s",
    "memory_mib": lambda value: f"{value:.0f} MiB",
}


class Bar:
    """A bar that is redrawn in place."""

    def __init__(self, total_steps: int, console: Console):
        self._shown: dict[str, object] = {}
        self._bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=console,
            refresh_per_second=2,
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task("", start=False, total=total_steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def log(self, record: Mapping[str, object]) -> None:
        """Print a line above the bar for an evaluation."""
        if record.get("split") == "validation":
            self._bar.console.print(evaluation(record), markup=False, highlight=False)

    def move(self, step: int, shown: Mapping[str, object]) -> None:
        """Redraw the bar; the speed is measured from the first call on, which may be a resumed step."""
        self._shown |= shown
        if not self._bar.tasks[0].started:
            self._bar.reset(self._task, completed=step)
        self._bar.update(self._task, completed=step, description=line(self._shown))


class Lines:
    """A line for every twentieth of the run and for every evaluation."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._shown: dict[str, object] = {}
        self._first: tuple[int, float] | None = None
        self._printed = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, record: Mapping[str, object]) -> None:
        """Print a line for an evaluation."""
        if record.get("split") == "validation":
            print(evaluation(record), flush=True)

    def move(self, step: int, shown: Mapping[str, object]) -> None:
        """Print a line where another twentieth is done."""
        self._shown |= shown
        first_step, first_time = self._first = self._first or (step, time.monotonic())
        part = step * LINES // self._total
        if part == self._printed:
            return
        self._printed = part
        parts = [f"step {step}/{self._total} ({step / self._total:.0%})", line(self._shown)]
        if first_step < step < self._total:
            pace = (time.monotonic() - first_time) / (step - first_step)
            parts.append(f"left {timedelta(seconds=round(pace * (self._total - step)))}")
        print("  ".join(part for part in parts if part), flush=True)


def for_stdout(total_steps: int) -> Bar | Lines:
    """Return a bar where stdout is a terminal, else plain lines."""
    return Bar(total_steps, Console()) if sys.stdout.isatty() else Lines(total_steps)


def evaluation(record: Mapping[str, object]) -> str:
    """Return the line for a validation record."""
    head = f"validation at step {record['step']}"
    return "  ".join([f"{head}, epoch {record['epoch']:.2f}" if "epoch" in record else head, line(record)])


def line(values: Mapping[str, object]) -> str:
    """Return the numbers among the values in one line, each with its name; per-layer values are left out."""
    return "  ".join(
        FORMATS.get(name, lambda value, name=name: f"{name} {_rounded(value)}")(value)
        for name, value in values.items()
        if name not in HIDDEN and "/" not in name and isinstance(value, int | float)
    )


def _rounded(value: float) -> str:
    """Return four decimals, or two digits where those would show one at most."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
