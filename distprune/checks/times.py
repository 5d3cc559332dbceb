"""Times of a configuration, compared as far as that goes without the data."""

from collections.abc import Callable
from operator import le
from typing import Any

from distprune.config import Config, value_of
from distprune.durations import Duration, parse


def time(config: Config, key: str) -> Duration:
    """Return the time that a key has."""
    return parse(str(value_of(config, key)), key)


def compare(config: Config, key: str, relation: Callable[[Any, Any], bool], other: str) -> bool:
    """Return whether two times stand in a relation; steps and epochs do not compare without the data."""
    first, second = time(config, key), time(config, other)
    return first.in_epochs != second.in_epochs or relation(first.amount, second.amount)


def within_run(config: Config, key: str) -> bool:
    """Return whether a time is null, or more than 0 and not after the end of the run."""
    if value_of(config, key) is None:
        return True
    return time(config, key).amount > 0 and compare(config, key, le, "train.epochs")


def evaluates(config: Config) -> bool:
    """Return whether a run is evaluated on its way; one of less than an epoch need not be."""
    every = time(config, "train.eval_every")
    return every.amount > 0 and (every.amount <= 1 or compare(config, "train.eval_every", le, "train.epochs"))


def prunes_often(config: Config) -> bool:
    """Return whether the time between prunings fits into that from the first to the last."""
    every, start, end = (time(config, f"pruning.{key}") for key in ("every", "start", "end"))
    comparable = every.in_epochs == start.in_epochs == end.in_epochs
    return every.amount > 0 and (
        not comparable or start.amount >= end.amount or every.amount <= end.amount - start.amount
    )


def first_cycle(config: Config) -> str:
    """Return the key that holds the length of the learning rate's first cycle."""
    keys = ("lr.rewind_first", "lr.rewind_every", "train.epochs")
    return next(key for key in keys if value_of(config, key) is not None)
