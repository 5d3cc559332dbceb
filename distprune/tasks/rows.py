"""Rows that cannot be used as they are: counted, named, and refused, left out or cut short as configured."""

from collections.abc import Collection, Mapping

from datasets import Dataset

from distprune.config import TaskConfig
from distprune.errors import UserError

SHOWN = 8


def screen(
    rows: Dataset, wrong: Mapping[str, Collection[int]], origin: str, task: TaskConfig, notes: list[str]
) -> Dataset:
    """Return the rows without those that cannot be used.

    Args:
        rows: with their numbers in the data, from 0, in ``_row`` (`distprune.tasks.data.load_splits`).
        wrong: what is wrong ("have no value in ..."), and places in ``rows`` where it is.
        origin: how to call the data in a message.
        task: ``bad_rows`` says what is done with them.
        notes: a sentence is added for each kind that is left out.

    Raises:
        UserError: there are such rows and ``task.bad_rows`` is refuse, or none is left.
    """
    for what, places in wrong.items():
        if places:
            sentence = describe(rows, places, origin, what)
            if task.bad_rows == "refuse":
                raise UserError(f"{sentence}; allowed: none, or task.bad_rows=skip to leave them out")
            notes.append(f"{sentence}; left out")
    because = "; ".join(describe(rows, places, origin, what) for what, places in wrong.items() if places)
    return without(rows, {place for places in wrong.values() for place in places}, origin, because)


def settle_length(rows: Dataset, origin: str, task: TaskConfig, notes: list[str]) -> Dataset:
    """Return tokenised rows that have tokens, without the column ``cut``: whether some of a row's text was cut off.

    Args:
        rows: with ``cut``, ``length`` and ``_row``.
        origin: how to call the data in a message.
        task: ``too_long`` says what is done with rows that were cut, ``bad_rows`` with those without tokens.
        notes: a sentence is added where there are any.

    Raises:
        UserError: there are such rows and they are refused, or none is left.
    """
    empty = [place for place, length in enumerate(rows["length"][:]) if length == 0]
    rows = screen(rows, {"have no tokens": empty}, origin, task, notes)
    cut = [place for place, is_cut in enumerate(rows["cut"][:]) if is_cut]
    kept = rows.remove_columns("cut")
    if not cut:
        return kept
    sentence = describe(rows, cut, origin, f"have more than task.max_length {task.max_length} tokens")
    if task.too_long == "refuse":
        raise UserError(f"{sentence}; allowed: none, or task.too_long=truncate or skip")
    if task.too_long == "truncate":
        notes.append(f"{sentence}; cut short")
        return kept
    notes.append(f"{sentence}; left out")
    return without(kept, set(cut), origin, sentence)


def describe(rows: Dataset, places: Collection[int], origin: str, what: str) -> str:
    """Return a sentence that counts rows and names the first of them, by their numbers in the data from 1."""
    numbers = sorted(rows["_row"][place] + 1 for place in sorted(places)[:SHOWN])
    named = ", ".join(map(str, numbers)) + (", ..." if len(places) > SHOWN else "")
    return f"{len(places)} of {len(rows)} rows of {origin} {what}: row{'s' * (len(places) > 1)} {named}"


def without(rows: Dataset, places: set[int], origin: str, because: str) -> Dataset:
    """Return the rows without some places.

    Raises:
        UserError: none is left.
    """
    if not places:
        return rows
    if len(places) == len(rows):
        raise UserError(f"no row of {origin} can be used: {because}; allowed: at least one")
    return rows.select([place for place in range(len(rows)) if place not in places])
