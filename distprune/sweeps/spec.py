"""A sweep's file, and the runs that it asks for. Free of torch: a mistake is found before anything runs.

Every method has a run for each combination of the values in the two grids, its own and the sweep's. A key in ``models``
gets the ``final/`` of another method's run: of the one that has the same values of all keys that both grids have.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distprune import settings, yaml12
from distprune.config import Config, dotted
from distprune.errors import UserError, unknown

SEED = "train.seed"
MODELS = ("model.path", "teacher.path", "pruning.weights_of")
"""Keys that may get the model of another run."""
_DATA = ("task.train", "task.validation", "task.more_validation")
"""Keys of which only the file's name counts, and not where it is."""
_LONGEST = 255  # bytes of a file's name
_FREE = ("train.output", "teacher.cache", "teacher.rebuild_cache", "recipe.derived", "checkpoint.", "wandb.")


@dataclass
class Method:
    """One line of the plot: what its runs have beside what all have."""

    config: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)


@dataclass
class Sweep:
    """A sweep's file (docs/sweeps.md)."""

    config: str | None = None
    """Of the methods that have none of their own."""
    methods: dict[str, Method] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    output: str = "runs/sweep"
    results: str | None = None
    ranks: int = 1
    at_once: int = 1
    baseline: str | None = None
    chance: float | None = None
    compare: dict[str, list[str]] = field(default_factory=dict)
    """Methods, and those that each is compared with, seed by seed."""
    budget: float | None = None
    """Epochs of every method, with the models that it starts from (`budget`); None: each has its own length."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    method: str
    point: dict[str, Any]
    """The grids' keys, and its values of them."""
    config: Path
    overrides: tuple[str, ...]
    models: dict[str, str]
    """Keys, and the names of the runs whose ``final/`` they get."""

    @property
    def name(self) -> str:
        """Its folder below the sweep's output."""
        values = ",".join(f"{key}={_word(value)}" for key, value in self.point.items())
        return f"{self.method}/{values.replace('/', '_') or 'run'}"

    def arguments(self, output: Path) -> list[str]:
        """Return the overrides with which ``distprune train`` carries it out."""
        models = {key: output / name / "final" for key, name in self.models.items()}
        places = models | {"train.output": output / self.name, "wandb.name": self.name}
        return [*self.overrides, *(_override(key, str(value)) for key, value in places.items())]

    def load(self, output: Path) -> Config:
        """Return its configuration.

        Raises:
            UserError: with the name of the run, where no run can have it.
        """
        try:
            return settings.load_valid(str(self.config), self.arguments(output))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def settings(self, config: Config) -> dict[str, Any]:
        """Return everything that its result depends on and that is not as it is by default, by dotted key.

        Files and folders are named by their last part, models of other runs by those.
        """
        return _settings(config) | self.models

    def settings_in(self, path: Path) -> dict[str, Any]:
        """Return the same of a configuration that ``distprune train`` has written, with the models that it had.

        Raises:
            UserError: with the name of the run, where it is no configuration.
        """
        try:
            found = _settings(settings.load_written(path))
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        return found | {key: str(found[key]).removesuffix("/final") for key in self.models if key in found}


def read_sweep(path: Path) -> Sweep:
    """Return a sweep's file.

    Raises:
        UserError: it cannot be read, or has a key or a value that no sweep has.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Sweep), OmegaConf.create(yaml12.parse(path.read_text(encoding="utf-8")))
        )
        sweep = OmegaConf.to_object(merged)
    except FileNotFoundError as error:
        raise UserError(f"the sweep {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None)  # OmegaConf's own further lines are of its types
        what = f"{key}: {str(error).splitlines()[0]}" if key else " ".join(str(error).split())
        raise UserError(f"{path} is no sweep: {what}") from error
    assert isinstance(sweep, Sweep)
    for key, value in (("ranks", sweep.ranks), ("at_once", sweep.at_once)):
        if value < 1:
            raise UserError(f"{path}: {key} is {value}; allowed: at least 1")
    if not sweep.methods:
        raise UserError(f"{path} has no methods; allowed: at least one")
    for name, method in sweep.methods.items():
        if method.config is None and sweep.config is None:
            raise UserError(f"{path} has no config, nor has the method {name}; allowed: one in either place")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{path}: a method is called {name!r}; allowed: letters, digits, '_', '-' and '.'")
        for key, other in method.models.items():
            if key not in MODELS:
                raise unknown(f"{path}: the key of models in {name}", key, MODELS)
            if str(other) not in sweep.methods:
                raise unknown(f"{path}: the method of models in {name}", str(other), sweep.methods)
    if sweep.chance is not None and not math.isfinite(sweep.chance):
        raise UserError(f"{path}: chance is {sweep.chance}; allowed: a number, or null")
    if sweep.budget is not None and not 0 < sweep.budget < math.inf:
        raise UserError(f"{path}: budget is {sweep.budget}; allowed: epochs, more than 0, or null")
    _check_baseline(sweep, path)
    _check_compare(sweep, path)
    return sweep


def _check_baseline(sweep: Sweep, path: Path) -> None:
    """Refuse a baseline that has several runs for one of another method."""
    if sweep.baseline is None:
        return
    if sweep.baseline not in sweep.methods:
        raise unknown(f"{path}: baseline", sweep.baseline, sweep.methods)
    for name, method in sweep.methods.items():
        further = sweep.methods[sweep.baseline].grid.keys() - method.grid.keys() - sweep.grid.keys()
        if further:
            raise UserError(
                f"{path}: the grid of the baseline {sweep.baseline} has {sorted(further)}, and that of {name} has not; "
                "allowed: keys that all methods have"
            )


def _check_compare(sweep: Sweep, path: Path) -> None:
    """Refuse to compare methods whose grids have other keys."""
    for name, others in sweep.compare.items():
        for each in (name, *others):
            if each not in sweep.methods:
                raise unknown(f"{path}: the method of compare", each, sweep.methods)
        for other in others:
            ours, theirs = ((sweep.grid | sweep.methods[each].grid).keys() for each in (name, other))
            if name == other or ours != theirs:
                raise UserError(
                    f"{path}: {name} is compared with {other}, whose grid has {sorted(theirs)}; allowed: another "
                    f"method whose grid has {sorted(ours)}"
                )


def runs_of(sweep: Sweep, path: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """Return all runs of a sweep, each behind those whose models it gets.

    Args:
        sweep: what the file says.
        path: the file, to which configurations are relative.
        overrides: ``key=value``, on top of what all runs have.

    Raises:
        UserError: a grid without values, a key that does not exist or is set twice, a method that there is not, or
            methods that wait for each other.
    """
    runs: dict[str, list[Run]] = {}
    for name in _in_order(sweep, path):
        _check_set_once(sweep, path, name, overrides)
        runs[name] = [_run(sweep, path, name, point, overrides, runs) for point in _points(sweep, path, name)]
    found = [run for each in runs.values() for run in each]
    twice = next((name for name, number in Counter(run.name for run in found).items() if number > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two runs have the name {twice!r}; allowed: values that differ in more than / and _")
    for name in (run.name for run in found):
        if "\0" in name or len(f"{name.partition('/')[2]}.log".encode()) > _LONGEST:
            raise UserError(f"{path}: a run cannot be called {name!r}; allowed: fewer or shorter values in the grid")
    return found


def _check_set_once(sweep: Sweep, path: Path, name: str, overrides: Sequence[str]) -> None:
    """Refuse a key of a method's grid or models that is set beside it, and those that the sweep sets."""
    method = sweep.methods[name]
    shared, own = (_keys([_override(*item) for item in values.items()]) for values in (sweep.set, method.set))
    in_grid, given = _keys_of_grid(sweep.grid | method.grid), shared | own | _keys(overrides)
    beside = given | method.models.keys()
    for key in sorted(in_grid & beside | own & method.models.keys()):
        raise UserError(f"{path}: {key} is in grid or models of {name}, and set beside it; allowed: one of the two")
    for key in sorted({"train.output", "wandb.name"} & (given | in_grid)):
        raise UserError(f"{path}: {key} is set; allowed: output, the folder of the sweep's runs, which names each")


def _keys_of_grid(grid: Mapping[str, list[Any]]) -> set[str]:
    """Return the dotted keys of a grid: as they are, and those of sections among its values."""
    sections = [(key, value) for key, values in grid.items() for value in values if isinstance(value, dict)]
    return {*grid, *(f"{key}.{name}" for key, section in sections for name in section)}


def _keys(texts: Sequence[str]) -> set[str]:
    """Return the dotted keys that ``key=value`` gives: as they are, and those of a section."""
    _, given = settings.load_given(None, list(texts))
    sections = {key for key in given if not key.startswith("deepspeed.")}  # which has keys of DeepSpeed's in its own
    return {text.partition("=")[0] for text in texts} | sections


def _in_order(sweep: Sweep, path: Path) -> list[str]:
    """Return the methods, each behind those whose models it gets."""
    order: list[str] = []
    left = list(sweep.methods)
    while left:
        ready = [name for name in left if set(sweep.methods[name].models.values()) <= set(order)]
        if not ready:
            raise UserError(f"{path}: {' and '.join(left)} wait for each other's models; allowed: one before the other")
        order += ready
        left = [name for name in left if name not in ready]
    return order


def _points(sweep: Sweep, path: Path, name: str) -> list[dict[str, Any]]:
    axes = sweep.grid | sweep.methods[name].grid
    for key, values in axes.items():
        if not values:
            raise UserError(f"{path}: the grid of {name} has no values of {key}; allowed: at least one")
        if len({_word(value) for value in values}) < len(values):
            raise UserError(f"{path}: the grid of {name} has a value of {key} twice; allowed: each once")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _run(
    sweep: Sweep, path: Path, name: str, point: dict[str, Any], overrides: Sequence[str], runs: Mapping[str, list[Run]]
) -> Run:
    method = sweep.methods[name]
    common = {key: value for key, value in sweep.set.items() if key not in method.models}
    values = {"wandb.group": path.stem} | common | method.set | point
    texts = [_override(key, value) for key, value in values.items()]
    models = {key: _source(path, name, other, point, runs[other]) for key, other in method.models.items()}
    named = method.config or sweep.config
    assert named is not None, "read_sweep has looked at it"
    config = path.parent / named
    return Run(name, point, config, (*texts, *overrides), models)


def _source(path: Path, name: str, other: str, point: dict[str, Any], runs: list[Run]) -> str:
    """Return the name of the only run of another method that has the same values of all keys that both have."""
    fitting = [run.name for run in runs if all(run.point[key] == point[key] for key in run.point.keys() & point.keys())]
    if len(fitting) != 1:
        raise UserError(
            f"{path}: {name} at {point} fits {len(fitting)} runs of {other}; allowed: one, so that the grid of {name} "
            f"has every key of the grid of {other}"
        )
    return fitting[0]


def _settings(config: Config) -> dict[str, Any]:
    default, found = dotted(asdict(Config())), {}
    for key, value in dotted(asdict(config)).items():
        if value == default[key] or key.startswith(_FREE):
            continue
        if key in MODELS or key == "model.tokenizer":
            value = value and _last_part(value)
        found[key] = value
    if config.task.hub is None:
        found = without_folders(found)
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def without_folders(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the names of data files alone; a split of the hub's is its name."""
    files = {key: found[key] for key in _DATA if key in found}
    names = {
        key: [Path(file).name for file in value] if isinstance(value, list) else Path(value).name
        for key, value in files.items()
    }
    return {**found, **names}


def lineage(name: str, models: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return the runs whose models a run started from, or whose weights said what goes, and theirs; no teachers.

    Args:
        name: of the run.
        models: of each run that counts, its keys of `MODELS` and the names of the runs that they got.
    """
    direct = {other for key, other in models[name].items() if key != "teacher.path" and other in models}
    return direct.union(*(lineage(other, models) for other in direct))


def seedless(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point without its seed: what the runs of one mean share."""
    return {key: value for key, value in point.items() if key != SEED}


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"  # JSON is YAML, and keeps texts that look like something else


def _word(value: Any) -> str:
    """Return a value as a part of a name."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _last_part(place: str) -> str:
    """Return a hub id, or a path of two parts, as it is, and the last part of a longer path.

    Every run calls its model ``final``: of such a path the run's name belongs to it, which has two parts in a sweep.
    """
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place):
        return place
    *_, method, run, name = ("", "", *Path(place).parts)
    if name != "final":
        return name
    return f"{method}/{run}/{name}" if "=" in run or run == "run" else f"{run}/{name}"
