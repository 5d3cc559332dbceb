"""Units of several weights by loops over whole tensors: which go, by exact sums."""

from collections.abc import Callable
from fractions import Fraction
from math import floor, prod
from typing import NamedTuple

import torch
from torch import Tensor

from distprune.pruning.masks import PRUNED
from tests.unit.structures.harness import Parameters, Shapes

Unit = dict[str, list[int]]
"""Places, in each flattened parameter, of the weights that go together."""

HIDDEN, INTERMEDIATE, HEADS = 12, 20, 3
HEAD_MATRICES = [f"attention.self.{each}" for each in ("query", "key", "value")] + ["attention.output.dense"]


def bert_heads(hidden: int = HIDDEN) -> Shapes:
    """Return the shapes of the matrices that the heads of two layers are made of."""
    names = [f"bert.encoder.layer.{n}.{each}.weight" for n in range(2) for each in HEAD_MATRICES]
    return dict.fromkeys(names, (hidden, hidden))


def bert_neurons(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2):
        shapes[f"bert.encoder.layer.{n}.intermediate.dense.weight"] = (intermediate, hidden)
        shapes[f"bert.encoder.layer.{n}.output.dense.weight"] = (hidden, intermediate)
    return shapes


def rectangle(shape: tuple[int, ...], rows: range, columns: range) -> list[int]:
    return [row * shape[1] + column for row in rows for column in columns]


def tile_units(shapes: Shapes, rows: int, columns: int) -> list[Unit]:
    return [
        {name: rectangle(shape, range(top, top + rows), range(left, left + columns))}
        for name, shape in shapes.items()
        for top in range(0, shape[0], rows)
        for left in range(0, shape[1], columns)
    ]


def head_units(shapes: Shapes, heads: int = HEADS) -> list[Unit]:
    """Return rows of queries, keys and values and columns of the output, layer by layer."""
    units, names = [], list(shapes)
    for first in range(0, len(names), 4):
        layer = names[first : first + 4]
        size = shapes[layer[0]][0] // heads
        for head in range(heads):
            part = range(head * size, head * size + size)
            *rows, columns = layer
            unit = {name: rectangle(shapes[name], part, range(shapes[name][1])) for name in rows}
            units.append(unit | {columns: rectangle(shapes[columns], range(shapes[columns][0]), part)})
    return units


def neuron_units(shapes: Shapes) -> list[Unit]:
    units, names = [], list(shapes)
    for first in range(0, len(names), 2):
        rows, columns = names[first : first + 2]
        for neuron in range(shapes[rows][0]):
            one = range(neuron, neuron + 1)
            row = rectangle(shapes[rows], one, range(shapes[rows][1]))
            units.append({rows: row, columns: rectangle(shapes[columns], range(shapes[columns][0]), one)})
    return units


class Expected(NamedTuple):
    """What goes, and the largest sum of a unit that was pruned now; 0 where none was."""

    gone: Tensor
    threshold: float
    sums: list[float]


def reference(
    parameters: Parameters, units: list[Unit], sparsity: Fraction, score: Callable[[Parameters, str], Tensor]
) -> Expected:
    """Prune the units of the smallest sums, after those that are pruned; ties by number. Sums are of float64."""
    scores = {name: score(parameters, name).double() for name in parameters}
    gone = {name: each.mask == PRUNED for name, each in parameters.items()}
    entries = []
    for number, unit in enumerate(units):
        pruned = all(bool(gone[name][places].all()) for name, places in unit.items())
        total = sum(float(scores[name][places][~gone[name][places]].sum()) for name, places in unit.items())
        entries.append((not pruned, total, number))
    wanted = max(floor(sparsity * len(units)), sum(not entry[0] for entry in entries))
    chosen = sorted(entries)[:wanted]
    for _, _, number in chosen:
        for name, places in units[number].items():
            gone[name][places] = True
    threshold = max((total for fresh, total, _ in chosen if fresh), default=0.0)
    return Expected(torch.cat(list(gone.values())), threshold, [total for _, total, _ in entries])


def covered_once(units: list[Unit], shapes: Shapes) -> bool:
    """Return whether each weight is in one unit, and all units have as many."""
    places = sorted((name, place) for unit in units for name, each in unit.items() for place in each)
    every = sorted((name, place) for name, shape in shapes.items() for place in range(prod(shape)))
    return places == every and len({sum(map(len, unit.values())) for unit in units}) == 1
