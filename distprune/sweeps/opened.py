"""A sweep with everything that is known of it before a run begins: its runs, their settings, and the results so far."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distprune.checkpoints import run_directory
from distprune.config import Config
from distprune.errors import UserError
from distprune.sweeps import results
from distprune.sweeps.data import check_data, check_files, hashes_of
from distprune.sweeps.results import Row, Settings
from distprune.sweeps.spec import Run, Sweep, read_sweep, runs_of


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
        return Path(self.sweep.output).expanduser()

    @property
    def stored(self) -> Path:
        """The file of its results."""
        given = self.sweep.results
        return self.output / "results.jsonl" if given is None else Path(given).expanduser()

    @property
    def derived(self) -> dict[str, list[str]]:
        """The keys that a recipe has set, by the names of the runs."""
        return {name: config.recipe.derived for name, config in self.configs.items()}

    def check_directories(self, runs: Iterable[Run]) -> None:
        """Refuse run directories of other runs than these.

        Raises:
            UserError: with the first of them.
        """
        results.check_directories(runs, self.settings, self.derived, self.output)

    def missing(self, names: Collection[str]) -> list[Run]:
        """Return the runs to carry out for those of these names: with the runs whose models they need.

        Raises:
            UserError: a run directory holds another run than the sweep's.
        """
        self.check_directories(self.runs)
        return results.still_to_run(self.runs, self.rows, self.output, names)

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
            UserError: where they are of other runs.
        """
        self.rows.clear()
        self.rows |= results.read_rows(self.stored)
        results.check_rows(self.rows, self.settings, self.derived, self.stored)
        check_data(self.rows, self.configs, self.stored)

    def add(self, run: Run) -> Row:
        """Return the result of a run that has ended, and write its line where there is none."""
        data = hashes_of(self.configs[run.name])
        row = results.row_of(run, self.settings[run.name], data, self.output)
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
    output = Path(sweep.output).expanduser()
    configs = {each.name: each.load(output) for each in runs}
    found = Opened(path, sweep, runs, configs, {each.name: each.settings(configs[each.name]) for each in runs})
    found.read()
    return found
