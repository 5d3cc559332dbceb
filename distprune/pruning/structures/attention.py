"""Attention heads and feed-forward neurons as units: which rows and columns of which matrices belong together.

A head is its rows of the query, key and value matrices and its columns of the output matrix; a neuron is its row of the
first feed-forward matrix and its column of the second. With the columns at zero a unit adds nothing to the layer's
output, whatever its biases are, so that it can be taken out.
"""

import re

from distprune.errors import UserError
from distprune.pruning.components import layer_of
from distprune.pruning.structures.blocks import Grid

# BERT, RoBERTa and ELECTRA; DistilBERT; MPNet.
HEAD_ROWS = [
    r"attention\.self\.(query|key|value)\.weight$",
    r"attention\.[qkv]_lin\.weight$",
    r"attention\.attn\.[qkv]\.weight$",
]
HEAD_COLUMNS = [
    r"attention\.output\.dense\.weight$",
    r"attention\.out_lin\.weight$",
    r"attention\.attn\.o\.weight$",
]
NEURON_ROWS = [r"intermediate\.dense\.weight$", r"ffn\.lin1\.weight$"]
NEURON_COLUMNS = [r"(?<!attention\.)output\.dense\.weight$", r"ffn\.lin2\.weight$"]

Shapes = dict[str, tuple[int, ...]]


def heads(shapes: Shapes, number: int) -> dict[str, Grid]:
    """Return grids whose units are attention heads.

    Args:
        shapes: of the parameters to prune.
        number: heads in a layer.

    Raises:
        UserError: where some of them are not matrices of heads, or a layer's are not all there.
    """
    grids: dict[str, Grid] = {}
    for index, (rows, columns) in enumerate(_layers(shapes, HEAD_ROWS, HEAD_COLUMNS, "heads", 3)):
        for name, (out, into) in rows.items():
            if out % number:
                raise UserError(f"{name} has shape {[out, into]}, whose rows {number} heads cannot share")
            grids[name] = Grid((out, into), (out // number, into), index * number, name == next(iter(rows)))
        for name, (out, into) in columns.items():
            grids[name] = Grid((out, into), (out, into // number), index * number, False)
    return grids


def neurons(shapes: Shapes) -> dict[str, Grid]:
    """Return grids whose units are feed-forward neurons.

    Raises:
        UserError: where some of the parameters are not matrices of neurons, or a layer's are not both there.
    """
    grids: dict[str, Grid] = {}
    first = 0
    for rows, columns in _layers(shapes, NEURON_ROWS, NEURON_COLUMNS, "neurons", 1):
        for name, (out, into) in rows.items():
            grids[name] = Grid((out, into), (1, into), first)
        for name, (out, into) in columns.items():
            grids[name] = Grid((out, into), (out, 1), first, False)
            first += into
    return grids


def members(names: list[str], structure: str) -> list[str]:
    """Return the parameters that heads or neurons are made of."""
    patterns = HEAD_ROWS + HEAD_COLUMNS if structure == "heads" else NEURON_ROWS + NEURON_COLUMNS
    return [name for name in names if _matches(name, patterns)]


def is_by_columns(name: str) -> bool:
    """Return whether a head's or neuron's part of this matrix are columns."""
    return _matches(name, HEAD_COLUMNS + NEURON_COLUMNS)


def _layers(
    shapes: Shapes, row_patterns: list[str], column_patterns: list[str], what: str, row_matrices: int
) -> list[tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]]:
    """Return, layer by layer, the matrices that units are rows of, and the one that they are columns of."""
    layers: dict[str, tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]] = {}
    for name, shape in shapes.items():
        is_row, is_column = _matches(name, row_patterns), _matches(name, column_patterns)
        if not (is_row or is_column):
            raise UserError(f"{name} of shape {list(shape)} is no matrix of {what} that distprune knows")
        rows, columns = layers.setdefault(layer_of(name) or name, ({}, {}))
        (rows if is_row else columns)[name] = (shape[0], shape[1])
    for layer, (rows, columns) in layers.items():
        if len(rows) != row_matrices or len(columns) != 1:
            raise UserError(f"{layer} has {len(rows) + len(columns)} of the {row_matrices + 1} matrices of its {what}")
        sizes = {shape[0] for shape in rows.values()} | {shape[1] for shape in columns.values()}
        if len(sizes) > 1:
            raise UserError(f"{layer} has matrices of {what} of different sizes: {sorted(sizes)}")
    return list(layers.values())


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
