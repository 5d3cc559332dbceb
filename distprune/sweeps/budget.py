"""Equal budgets: every method trains for as long, with the models that it starts from, and on as much. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from distprune.config import Config, dotted
from distprune.errors import UserError
from distprune.sweeps.spec import Run, lineage

_OF_AN_EPOCH = ("task.", "train.batch_size", "model.tokenizer")
"""How keys begin that say how many steps an epoch has, as the blocks of a language model do, and what is measured."""


def check_budget(budget: float, runs: Iterable[Run], configs: Mapping[str, Config]) -> None:
    """Refuse runs of other lengths than a budget. A teacher's steps are not the student's, and do not count.

    Args:
        budget: epochs of each run, with those of the runs whose models it starts from, or whose weights say what goes.
            Runs that others start from may be shorter.
        runs: all of the sweep.
        configs: of the runs, by name.

    Raises:
        UserError: with the first run that has more or less, or may end early.
    """
    models = {run.name: run.models for run in runs}
    inner = {other for name in models for other in lineage(name, models)}
    first = next(iter(models))
    for name in models:
        epochs = math.fsum(configs[each].train.epochs for each in {name, *lineage(name, models)})
        if not (math.isclose(epochs, budget) or (epochs < budget and name in inner)):
            raise UserError(
                f"{name} has {epochs:g} epochs with those of the models that it starts from; allowed with budget "
                f"{budget:g}: as many"
            )
        if configs[name].train.patience is not None:
            raise UserError(f"{name} has train.patience; allowed with a budget: null, as it may end a run early")
        ours, theirs = (dotted(asdict(configs[each])) for each in (name, first))
        for key in (key for key in ours if key.startswith(_OF_AN_EPOCH) and ours[key] != theirs[key]):
            raise UserError(
                f"{name} has {key} {ours[key]} and {first} {theirs[key]}; allowed with a budget: the same for all, so "
                "that they train on as much and are measured alike"
            )
