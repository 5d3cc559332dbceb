"""The sweeps in configs/sweeps: every run can be, and a waterfall is one."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from distprune import settings
from distprune.config import Config
from distprune.sweeps.budget import check_budget
from distprune.sweeps.spec import SEED, read_sweep, runs_of
from tests.unit.sweep_files import settings_of
from tests.unit.test_configs import SWEEPS


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_shipped_sweep_has_runs_that_can_be(path: Path) -> None:
    sweep = read_sweep(path)
    every = runs_of(sweep, path)
    of_a_seed = [run for run in every if run.point.get(SEED) == every[0].point.get(SEED)]  # the others differ by it
    found = [json.dumps(settings_of(run), sort_keys=True) for run in of_a_seed]
    assert len(set(found)) == len(found) > 1
    if sweep.budget is not None:
        check_budget(sweep.budget, of_a_seed, {run.name: run.load(Path("runs")) for run in of_a_seed})


@pytest.mark.parametrize("path", [path for path in SWEEPS if "waterfall" in path.name], ids=lambda path: path.name)
def test_a_waterfall_changes_one_thing_at_a_time_and_ends_at_the_recipe_gmp(path: Path) -> None:
    runs = {run.method: run for run in reversed(runs_of(read_sweep(path), path))}
    steps = {name: run.load(Path("runs")) for name, run in runs.items() if not name.startswith("dense")}
    order = ["smc_gmp", "without_head", "without_embeddings", "higher_rate", "longer", "rewinds", "many_prunings"]
    order = [name for name in [*order, "large_first_step", "distillation_2", "distillation", "obs"] if name in steps]
    assert set(order) == steps.keys()
    changed = {after: changes(steps[before], steps[after]) for before, after in pairwise(order)}
    times = {"pruning.start", "pruning.end", "pruning.every"}
    assert changed["without_head"] == changed["without_embeddings"] == {"pruning.components"}
    assert changed.get("higher_rate", {"lr.peak"}) == {"lr.peak"}
    assert changed["longer"] - {"lr.warmup"} == {"train.epochs", *times}, "warm-up and prunings are parts of the run"
    assert changed["rewinds"] == {"lr.rewind_every", "lr.final"}
    assert changed["many_prunings"] == times
    assert changed["large_first_step"] == {"pruning.initial"}
    assert changed["distillation_2"] == {"distillation.hardness", "distillation.temperature"}
    assert changed["distillation"] == {"distillation.temperature"}
    assert changed["obs"] <= {"pruning.score", "fisher.block", "fisher.dropout", "fisher.samples"}
    end, epochs = steps["distillation"], read_sweep(path).methods["dense"].set.get("recipe.epochs", 2)
    gmp = settings.load_valid(
        str(runs["distillation"].config),
        [
            *f"recipe.name=gmp recipe.epochs={epochs} train.epochs={end.train.epochs}".split(),
            *f"pruning.sparsity={end.pruning.sparsity} lr.peak={end.lr.peak} model.path=m teacher.path=t".split(),
        ],
    )
    smc = {"lr.warmup", "lr.final", *(f"optimizer.{key}" for key in ("betas", "eps", "weight_decay", "clip"))}
    method = ("optimizer.", "lr.", "pruning.", "regrowth.", "fisher.", "distillation.", "train.epochs")
    assert {key for key in changes(gmp, end) if key.startswith(method)} <= smc


def changes(before: Config, after: Config) -> set[str]:
    """Return the keys that differ, without places and what only says where values are from."""
    one, other = (
        {f"{section}.{key}": value for section, values in asdict(config).items() for key, value in values.items()}
        for config in (before, after)
    )
    places = ("train.output", "wandb.name", "teacher.path", "recipe.derived", "recipe.derived_by")
    return {key for key in one if one[key] != other[key] and key not in places}
