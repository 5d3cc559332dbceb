"""Recipes: what a target sparsity and a task's dense recipe make of everything else. Free of torch, as config.py is.

``gmp`` is the second guideline of arXiv 2312.13547: training, sparsification and learning rate scale with the target
together. The dense recipe (E epochs with a linear decay) is replicated k times; the first replica trains the dense
model, the last one trains with the fixed mask, and the model is pruned in between. What is published of the rule and
what is this project's own: docs/recipes.md.
"""

import math
from collections.abc import Callable, Collection
from decimal import Decimal
from typing import Any, NamedTuple

from distprune.config import COMPONENTS, Config, set_value
from distprune.errors import UserError, unknown


class Derived(NamedTuple):
    """A value that a recipe sets, and why."""

    value: Any
    why: str


Values = dict[str, Derived]


def replicas_for(sparsity: float) -> int:
    """Return how often ``gmp`` replicates the dense recipe: a replica for every halving of the weights that survive.

    One more trains the dense model before them, and one more the pruned model behind them: 3 at 50 %, 5 at 80 %, 6 at
    90 %, 8 at 97 %.
    """
    return 2 + math.ceil(math.log2(1 / (1 - sparsity)) - 1e-9)


def first_step_for(sparsity: float) -> float:
    """Return the sparsity of the first pruning of ``gmp``: a third of the halvings at once, to the nearest 10 %.

    40 % for a target of 80 %, 50 % for 90 %, 70 % for 97 %: the higher the target, the more of it comes first, because
    there must be time to recover behind the last weights that go. Never more than 90 %.
    """
    return min(round(1 - math.pow(1 - sparsity, 1 / 3), 1), 0.9)


def gmp(config: Config, given: Collection[str]) -> Values:
    """Gradual magnitude pruning with everything scaled to the target (GMP*, arXiv 2210.06384, and its successor)."""
    sparsity = _target(config)
    values = _replicated(config, given, replicas_for(sparsity), "2, and 1 for each halving of what survives")
    total = _decimal(config.train.epochs if "train.epochs" in given else values["train.epochs"].value)
    epochs = _decimal(config.recipe.epochs)
    least = 2 if {"pruning.start", "pruning.end"} <= set(given) else 3
    if total < least * epochs:
        raise UserError(
            f"the recipe gmp has {total} epochs; allowed: at least {least} replicas of {epochs} epochs, of which the "
            "first and the last do not prune" + " where nothing else is given" * (least == 2)
        )
    return values | {
        "pruning.initial": Derived(first_step_for(sparsity), "a third of the halvings at once"),
        "pruning.start": Derived(_epochs(epochs), "behind the first replica, which is dense"),
        "pruning.end": Derived(_epochs(total - epochs), "ahead of the last replica, whose mask is fixed"),
        "pruning.every": Derived(_epochs(epochs / 20), "20 prunings in a replica (GMP*: 10 in an epoch of 2)"),
        "distillation.hardness": Derived(1.0, "the teacher alone (GMP*)"),
        "distillation.temperature": Derived(5.5, "softer than usual, or the teacher says no more than labels (GMP*)"),
    }


def dense(config: Config, given: Collection[str]) -> Values:
    """Train without pruning, for as long as ``recipe.replicas`` says: the model to compare a pruned one with."""
    if config.pruning.sparsity > 0:
        raise UserError(f"pruning.sparsity is {config.pruning.sparsity}; allowed where recipe.name is dense: 0")
    taught = config.teacher.path is not None
    return _replicated(config, given, 1, "the dense recipe itself") | {
        "pruning.sparsity": Derived(0.0, "nothing is pruned"),
        "distillation.hardness": Derived(float(taught), "the teacher alone" if taught else "there is no teacher"),
        "distillation.temperature": Derived(5.5, "as gmp"),
    }


def _target(config: Config) -> float:
    sparsity = config.pruning.sparsity
    if not 0 < sparsity < 1:
        name = config.recipe.name
        raise UserError(
            f"pruning.sparsity is {sparsity}; allowed where recipe.name is {name}: more than 0, less than 1"
        )
    return sparsity


def _replicated(config: Config, given: Collection[str], replicas: int, why: str) -> Values:
    """Return the length and the learning rate of replicas of the dense recipe."""
    epochs = _decimal(config.recipe.epochs)
    if "train.epochs" in given and (config.recipe.replicas or _decimal(config.train.epochs) % epochs):
        raise UserError(
            f"train.epochs is {config.train.epochs} and recipe.replicas {config.recipe.replicas}; allowed with "
            f"recipe.name {config.recipe.name}: one of the two, and whole replicas of recipe.epochs {epochs}"
        )
    chosen = config.recipe.replicas or replicas
    length = float(epochs * chosen)
    total = _decimal(config.train.epochs if "train.epochs" in given else length)
    number = Derived(None, "train.epochs is given") if "train.epochs" in given else Derived(chosen, why)
    return {
        "recipe.replicas": number,
        "train.epochs": Derived(length, f"{chosen} replicas of recipe.epochs {epochs}"),
        "lr.final": Derived(config.lr.peak / 100, "a hundredth of lr.peak (GMP*: 1e-4 to 1e-6)"),
        "lr.rewind_every": Derived(_epochs(epochs) if total > epochs else None, "every replica begins at lr.peak"),
        "lr.rewind_first": Derived(None, "every replica begins at lr.peak"),
    }


def one_shot(config: Config, given: Collection[str]) -> Values:
    """Prune everything before the first step, then train with that mask for as long as the dense recipe (SMC-Bench).

    Which of its one-shot methods it is follows from what is given: ``model.path`` (pretrained, or trained already),
    ``pruning.score`` (magnitude, random, taylor) and ``pruning.weights_of`` (docs/recipes.md, baselines).
    """
    sparsity = _target(config)
    return _replicated(config, given, 1, "the dense recipe itself") | {
        "pruning.initial": Derived(sparsity, "all at once"),
        "pruning.start": Derived("0 steps", "before the first step"),
        "pruning.end": Derived("0 steps", "the mask is fixed from there on"),
        "distillation.hardness": Derived(0.0, "SMC-Bench's code: no distillation"),
    }


def obert_10(config: Config, given: Collection[str]) -> Values:
    """Ten epochs (oBERT, arXiv 2203.07259, table 9)."""
    source = "oBERT, table 9"
    return _obert(config, source, final=3e-5 if _answers(config) else 2e-5, peak=8e-5) | {
        "train.epochs": Derived(10.0, source),
        "lr.rewind_first": Derived(None, source),
        "lr.rewind_every": Derived("8 epochs", f"{source}: one rewind, at epoch 8"),
        "pruning.end": Derived("8 epochs", source),
        "pruning.every": Derived("0.5 epochs", source),
    }


def obert_30(config: Config, given: Collection[str]) -> Values:
    """Thirty epochs (oBERT, arXiv 2203.07259, and the recipe that sparseml published for it)."""
    source = "oBERT and sparseml's recipe"
    peak, final = (8e-5, 8e-6) if _answers(config) else (5e-5, 5e-6)
    return _obert(config, source, peak, final) | {
        "train.epochs": Derived(30.0, source),
        "lr.rewind_first": Derived("2 epochs", source),
        "lr.rewind_every": Derived("4 epochs", source),
        "pruning.end": Derived("26 epochs", source),
        "pruning.every": Derived("4 epochs", source),
    }


def _obert(config: Config, source: str, peak: float, final: float) -> Values:
    _target(config)
    return {
        "task.max_length": Derived(384 if _answers(config) else 128, source),
        "train.batch_size": Derived(16 if _answers(config) else 32, source),
        "lr.peak": Derived(peak, source),
        "lr.final": Derived(final, source),
        "pruning.initial": Derived(0.7, f"{source}, for 12 layers; 0.3 for 3 or 6"),
        "pruning.start": Derived("2 epochs", source),
        "pruning.score": Derived("obs", source),
        "distillation.hardness": Derived(1.0, source),
        "distillation.temperature": Derived(2.0, source),
    }


def smc_gmp(config: Config, given: Collection[str]) -> Values:
    """The GMP that "Sparsity May Cry" compares with (its code): a baseline, in the length of the dense recipe.

    Unlike theirs it ends at its target exactly, where their command ends at 0.993 of it, and counts the 500 steps from
    the start of its window, where they prune at multiples of 500.
    """
    _target(config)
    source, length = "SMC-Bench's code", _decimal(config.recipe.epochs) * (config.recipe.replicas or 1)
    epochs = _decimal(config.train.epochs) if "train.epochs" in given else length
    return {
        "train.epochs": Derived(float(length), "the dense recipe's, as often as recipe.replicas says"),
        "lr.final": Derived(0.0, source),
        "lr.warmup": Derived(_epochs(epochs / 20), f"{source}: 150 of 3,000 steps for CommonsenseQA"),
        "optimizer.betas": Derived([0.9, 0.98], source),
        "optimizer.eps": Derived(1e-6, source),
        "optimizer.weight_decay": Derived(0.01, source),
        "optimizer.clip": Derived(0.0, source),
        "pruning.components": Derived(list(COMPONENTS), f"{source}: every matrix, in one pool"),
        "pruning.initial": Derived(0.0, source),
        "pruning.start": Derived(_epochs(epochs / 10), source),
        "pruning.end": Derived(_epochs(epochs * 8 / 10), source),
        "pruning.every": Derived("500 steps", source),
        "distillation.hardness": Derived(0.0, f"{source}: no distillation"),
    }


def sparse_transfer(config: Config, given: Collection[str]) -> Values:
    """Fine-tune a model that was pruned upstream; its zeros stay (oBERT, arXiv 2203.07259)."""
    source = "oBERT's sparse transfer"
    return {
        "train.epochs": Derived(8.0, source),
        "lr.peak": Derived(1.5e-4, source),
        "lr.final": Derived(1.5e-6, source),
        "pruning.start_sparse": Derived(True, "the zeros of the model stay"),
        "distillation.hardness": Derived(1.0, source),
        "distillation.temperature": Derived(5.5, source),
    }


RECIPES: dict[str, Callable[[Config, Collection[str]], Values]] = {
    "gmp": gmp,
    "dense": dense,
    "one_shot": one_shot,
    "obert_10": obert_10,
    "obert_30": obert_30,
    "smc_gmp": smc_gmp,
    "sparse_transfer": sparse_transfer,
}


def apply(config: Config, given: Collection[str]) -> Values:
    """Set what the recipe derives and is not given, and note those keys in ``recipe.derived``.

    Args:
        config: with what is given, and defaults elsewhere.
        given: the dotted keys that are given.

    Returns:
        Everything that the recipe says, also where other values are given.

    Raises:
        UserError: an unknown recipe, or one that does not fit what is given.
    """
    config.recipe.derived, config.recipe.derived_by = [], config.recipe.name
    if config.recipe.name is None:
        return {}
    if config.recipe.name not in RECIPES:
        raise unknown("recipe.name", config.recipe.name, RECIPES)
    for key, epochs in (("recipe.epochs", config.recipe.epochs), ("train.epochs", config.train.epochs)):
        if not 0 < epochs < math.inf:
            raise UserError(f"{key} is {epochs}; allowed: more than 0")
    values = RECIPES[config.recipe.name](config, given)
    derived = {key: each.value for key, each in values.items() if key not in given}
    for key, value in derived.items():
        set_value(config, key, value)
    config.recipe.derived = sorted(derived)
    return values


def _answers(config: Config) -> bool:
    return config.task.name == "question_answering"


def _decimal(number: float) -> Decimal:
    return Decimal(str(number))


def _epochs(number: Decimal) -> str:
    return f"{number.normalize():f} epochs"
