"""Labels: what a column holds, and the numbers that the model predicts."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import ClassLabel, Dataset

from distprune.config import TaskConfig
from distprune.errors import UserError
from distprune.tasks.data import Split, is_text, type_of
from distprune.tasks.rows import screen

SHOWN = 8


@dataclass(frozen=True)
class Classes:
    """The classes of a task.

    Attributes:
        names: in the order of their numbers.
        numbers: the number of each value that a label column may hold, a class number or a class name.
        named: whether the names are the data's or the user's, and not made up.
    """

    names: list[str]
    numbers: dict[int | str, int]
    named: bool = True

    def encode(self, split: Split, column: str, task: TaskConfig, notes: list[str]) -> Dataset:
        """Return the rows with the class numbers as ``label``.

        Args:
            split: with the labels.
            column: that they are in.
            task: ``bad_rows`` says what is done with labels that are none of the classes.
            notes: a sentence is added for rows that are left out.

        Raises:
            UserError: such labels are refused.
        """
        values = _values(split, column)
        strange = set(values) - self.numbers.keys()
        wrong = {
            f"have label {_show(strange)} in column {column!r}, which is none of the classes {_show(self.numbers)}": [
                place for place, value in enumerate(values) if value in strange
            ]
        }
        numbers = np.array([self.numbers.get(value, -1) for value in values], dtype=np.int64)
        return screen(_labelled(split.rows, numbers), wrong, split.origin, task, notes)


def find_classes(split: Split, column: str, given: list[str]) -> Classes:
    """Find the classes of a task in its training data.

    Class names (strings, or the named classes of a hub data set) are numbered by ``given``, else in the data
    set's own order, else sorted. Whole numbers are the numbers already, and ``given`` names them; where it is
    whole numbers too, and at least as many of those in the data are in it as are places in it, it lists them. So it
    does with truth values, where it is true and false.

    Args:
        split: all training data.
        column: with the labels.
        given: class names in the order of their numbers; may be empty.

    Raises:
        UserError: labels that are no classes, fewer than two classes, names given twice, or numbers that are
            not 0, 1, ... without gaps where no names are given.
    """
    feature, found = split.rows.features[column], set(_values(split, column))
    if len(set(given)) < len(given):
        raise UserError(f"task.labels names a class twice: {_show(given)}")
    if all(isinstance(value, int) for value in found):
        if not given and found != set(range(len(found))):
            raise UserError(
                f"the labels in column {column!r} of {split.origin} are {_show(found)}; they must be "
                "0, 1, ... without gaps, or task.labels must list them in the order of their classes"
            )
        names = given or [f"LABEL_{int(number)}" for number in sorted(found)]
        listed = [value for name in names if (value := _written(name, found)) is not None]
        lists = len(listed) == len(names) and len(found & set(listed)) >= len(found & set(range(len(names))))
        values = listed if lists else range(len(names))
        classes = Classes(names, {value: number for number, value in enumerate(values)}, named=bool(given))
    else:
        names = given or (feature.names if isinstance(feature, ClassLabel) else sorted(map(str, found)))
        classes = Classes(names, {name: number for number, name in enumerate(names)})
    if len(names) < 2:
        raise UserError(f"column {column!r} of {split.origin} has one class, {_show(names)}; it needs at least two")
    return classes


def _written(name: str, found: set[int | str]) -> int | None:
    """Return the number, or the truth value where some of those found are, that a name is written as; else None."""
    if any(isinstance(value, bool) for value in found):
        return {"false": False, "true": True}.get(name.casefold())
    return int(name) if re.fullmatch(r"-?\d+", name) else None


def encode_numbers(split: Split, column: str, task: TaskConfig, notes: list[str]) -> Dataset:
    """Return the rows with the numbers that a regression predicts as ``label``, float32.

    Args:
        split: with the numbers; text is read as numbers.
        column: that they are in.
        task: ``bad_rows`` says what is done with what is no number, or not finite in float32.
        notes: a sentence is added for rows that are left out.

    Raises:
        UserError: such rows are refused, or the column holds something else.
    """
    if not (is_text(split, column) or type_of(split, column).startswith(("int", "uint", "float"))):
        held = split.rows.features[column]
        raise UserError(f"column {column!r} of {split.origin} holds {held}; task.regression needs numbers")
    with np.errstate(over="ignore"):
        numbers = np.array([_number(value) for value in split.rows[column][:]], dtype=np.float32)
    wrong = {f"have no finite number in column {column!r}": np.flatnonzero(~np.isfinite(numbers)).tolist()}
    return screen(_labelled(split.rows, numbers), wrong, split.origin, task, notes)


def _number(value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _labelled(rows: Dataset, labels: npt.NDArray[Any]) -> Dataset:
    """Return rows with a column ``label``, which may replace what the data call so."""
    others = rows.remove_columns("label") if "label" in rows.column_names else rows
    return others.add_column("label", labels)


def _values(split: Split, column: str) -> list[int | str]:
    """Return the labels of a split: numbers, or names, also where a hub data set numbers its names."""
    feature = split.rows.features[column]
    values: list[int | str] = split.rows[column][:]
    if isinstance(feature, ClassLabel):
        names: dict[Any, str] = dict(enumerate(feature.names))
        return [names.get(value, value) for value in values]
    if type_of(split, column).startswith("float") and all(float(value).is_integer() for value in values):
        return [int(value) for value in values]  # numbers of a table in which one was missing
    if not (_is_whole(split, column) or is_text(split, column)):
        raise UserError(
            f"column {column!r} of {split.origin} holds {feature}; allowed: one class a row, a whole number or a name, "
            "or with task.regression any number (docs/extending.md has a task with a label for each word)"
        )
    return values


def _is_whole(split: Split, column: str) -> bool:
    return type_of(split, column).startswith(("int", "uint", "bool"))


def _show(values: Any) -> str:
    """Return the first few values, in order where they came in none."""
    if isinstance(values, set):
        values = sorted(values, key=lambda value: (isinstance(value, str), value))
    shown = [repr(value) for value in values]
    return ", ".join(shown[:SHOWN] + ["..."] * (len(shown) > SHOWN))
