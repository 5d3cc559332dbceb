"""A sweep with everything that is known of it before a run begins: its runs, their settings, and the results so far."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distprune.checkpoints import run_directory
from distprune.config import Config
from distprune.errors import UserError
from distprune.paths import expanded
from distprune.sweeps import results
from distprune.sweeps.budget import check_budget
from distprune.sweeps.data import changed_data, changed_model, check_files
from distprune.sweeps.results import Row, Settings, difference, is_finished
from distprune.sweeps.spec import Run, Sweep, read_sweep, runs_of, without_folders


@dataclass
class Opened:
    """A sweep's file and its results."""

    path: Path
    sweep: Sweep
    runs: list[Run]
    """Each behind those whose models it gets."""
    configs: dict[str, Config]
    settings: dict[str, Settings]
    rows: dict[str, Row] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The sweep's folder."""
        return expanded(self.sweep.output)

    @property
    def stored(self) -> Path:
        """The file of its results."""
        given = self.sweep.results
        return self.output / "results.jsonl" if given is None else expanded(given)

    def check_directories(self, runs: Iterable[Run]) -> None:
        """Refuse run directories of other runs than these, or of runs on other data or with other models.

        Raises:
            UserError: with the first of them.
        """
        for run in (run for run in runs if (self.output / run.name / run_directory.CONFIG).exists()):
            directory = self.output / run.name
            if changed := self._difference(run, run.settings_in(directory / run_directory.CONFIG)):
                raise UserError(
                    f"{directory} holds a run with other settings, {changed}; allowed: another output, or without it"
                )
            if not is_finished(run, self.output):
                continue
            if problem := self._has_changed(run, results.summary_of(run, self.output)):
                raise UserError(f"{directory} holds a run {problem}; allowed: another output, or without it")

    def missing(self, names: Collection[str]) -> list[Run]:
        """Return the runs to carry out for those of these names.

        They are those without a result, and those whose models they need and that are not here any more.

        Raises:
            UserError: a run directory holds another run than the sweep's.
        """
        self.check_directories(self.runs)
        needed = {name for name in names if name not in self.rows}
        for run in reversed(self.runs):  # behind those whose models it gets
            if run.name in needed and not is_finished(run, self.output):
                needed |= set(run.models.values())
        return [
            run
            for run in self.runs
            if run.name in needed and not (run.name in self.rows and is_finished(run, self.output))
        ]

    def check_can_begin(self, runs: Iterable[Run]) -> None:
        """Refuse runs whose data are not there, and runs that are still under way by themselves.

        Raises:
            UserError: with the first of them.
        """
        for each in runs:
            check_files(each, self.configs[each.name])
            if (holder := run_directory.holder_of(self.output / each.name)) is not None:
                raise UserError(f"{each.name} is still under way in {holder}; allowed: once that has ended")

    def read(self) -> None:
        """Read the results.

        Raises:
            UserError: where they are of other runs than the sweep's of their names, or of other data.
        """
        self.rows.clear()
        self.rows |= results.read_rows(self.stored)
        for run in (run for run in self.runs if run.name in self.rows):
            self._check_row(run, self.rows[run.name])

    def _check_row(self, run: Run, row: Row) -> None:
        changed = self._difference(run, without_folders(row["settings"]))
        if changed:
            problem = f"was measured with other settings than the sweep has now, {changed}"
        elif other := self._has_changed(run, row):
            problem = f"was measured {other}"
        elif (row["method"], row["point"], row["models"]) != (run.method, run.point, run.models):
            problem = "is of another method, point or models than its name says"
        else:
            return
        raise UserError(f"{self.stored}: {run.name} {problem}; allowed: another results file, or without that line")

    def _has_changed(self, run: Run, before: Mapping[str, Any]) -> str | None:
        """Return in words which local data or model are others than in a summary or a line; None: none."""
        config = self.configs[run.name]
        if what := changed_data(before.get("data", {}), config):
            return f"on another {what} than the one that is there now"
        if key := changed_model(before.get("model_files", {}), run, config):
            return f"with other files of {key} than those that are there now"
        return None

    def _difference(self, run: Run, before: Settings) -> str | None:
        return difference(before, self.settings[run.name], self.configs[run.name].recipe.derived)

    def add(self, run: Run) -> Row:
        """Return the result of a run that has ended, and write its line where there is none."""
        row = results.row_of(run, self.settings[run.name], self.output)
        if run.name not in self.rows:
            results.append(self.stored, row)
            self.rows[run.name] = row
        return row


def open_sweep(sweep_path: str, overrides: Sequence[str], results_file: str | None = None) -> Opened:
    """Return a sweep that fits its results.

    Args:
        sweep_path: the file.
        overrides: ``key=value`` for all runs.
        results_file: in place of the one that the file names.

    Raises:
        UserError: where file or results do not fit.
    """
    path = Path(sweep_path)
    sweep = read_sweep(path)
    sweep.results = results_file or sweep.results
    return expand(sweep, path, overrides)


def expand(sweep: Sweep, path: Path, overrides: Sequence[str]) -> Opened:
    """Return a sweep that fits its results.

    Args:
        sweep: what its file says.
        path: the file, to which configurations are relative.
        overrides: ``key=value`` for all runs.

    Raises:
        UserError: where runs or results do not fit.
    """
    if sweep.results is not None and not sweep.results.endswith(".jsonl"):
        raise UserError(f"{path}: results is {sweep.results!r}; allowed: a name that ends in .jsonl")
    runs = runs_of(sweep, path, overrides)
    output = expanded(sweep.output)
    configs = {each.name: each.load(output) for each in runs}
    settings = {each.name: each.settings(configs[each.name]) for each in runs}
    _refuse_twins(settings)
    if sweep.budget is not None:
        check_budget(sweep.budget, runs, configs)
    found = Opened(path, sweep, runs, configs, settings)
    found.read()
    return found


def _refuse_twins(settings: Mapping[str, Settings]) -> None:
    """Refuse two runs that are the same."""
    known: dict[str, str] = {}
    for name, each in settings.items():
        same = known.setdefault(json.dumps(each, sort_keys=True), name)
        if same != name:
            raise UserError(f"{name} has the settings of {same}; allowed: a grid whose values make a difference")
