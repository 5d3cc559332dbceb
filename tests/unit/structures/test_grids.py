"""Which weights make up a unit: grids by brute force, matrices by their names, and what is refused."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.errors import UserError
from distprune.pruning.components import layer_of
from distprune.pruning.structures.attention import is_by_columns, members
from distprune.pruning.structures.blocks import Grid
from tests.unit.structures.harness import drawn, prune
from tests.unit.structures.units import HEADS, bert_heads, bert_neurons

# ------------------------------------------------------------------------------ grids

sides = st.integers(1, 4)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    block = draw(sides), draw(sides)
    shape = block[0] * draw(sides), block[1] * draw(sides)
    return Grid(shape, block, draw(st.sampled_from([0, 7, 1000])))


def units_by_element(grid: Grid) -> list[int]:
    """Return the unit of each weight of the flattened matrix."""
    across = grid.shape[1] // grid.block[1]
    places = (divmod(place, grid.shape[1]) for place in range(grid.shape[0] * grid.shape[1]))
    return [grid.first_unit + row // grid.block[0] * across + column // grid.block[1] for row, column in places]


@given(grids())
def test_a_grid_knows_where_its_units_begin_and_which_a_cut_divides(grid: Grid) -> None:
    units = units_by_element(grid)
    assert grid.count == len(set(units))
    for offset in range(len(units) + 1):
        before, after = set(units[:offset]), set(units[offset:])
        assert grid.begun_before(offset) == len(before)
        assert grid.cut_at(offset).tolist() == sorted(before & after)


@given(grids(), st.data())
def test_the_units_of_a_slice_are_those_of_the_rows_that_it_touches(grid: Grid, data: st.DataObject) -> None:
    units = units_by_element(grid)
    start = data.draw(st.integers(0, len(units) - 1))
    end = data.draw(st.integers(start + 1, len(units)))
    row_of = [place // (grid.shape[1] * grid.block[0]) for place in range(len(units))]
    rows = set(row_of[start:end])
    assert list(grid.rows_of(start, end)) == sorted(rows)
    assert list(grid.units_of(start, end)) == sorted({units[i] for i in range(len(units)) if row_of[i] in rows})


# ------------------------------------------------------------------------------ names

NAMINGS = {
    "roberta": {"bert.": "roberta."},
    "distilbert": {
        "bert.encoder": "distilbert.transformer",
        "self.query": "q_lin",
        "self.key": "k_lin",
        "self.value": "v_lin",
        "attention.output.dense": "attention.out_lin",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
    },
    "mpnet": {
        "bert.": "mpnet.",
        "self.query": "attn.q",
        "self.key": "attn.k",
        "self.value": "attn.v",
        "attention.output.dense": "attention.attn.o",
    },
}
SHAPES = {"heads": bert_heads(), "neurons": bert_neurons()}
OTHERS = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight",
    "bert.encoder.layer.0.attention.self.query.bias",
    "bert.encoder.layer.0.output.dense.bias",
    "bert.pooler.dense.weight",
]


def renamed(name: str, naming: str) -> str:
    for old, new in NAMINGS[naming].items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("structure", SHAPES)
def test_other_models_names_make_up_the_same_units(structure: str, naming: str) -> None:
    shapes = SHAPES[structure]
    other = {renamed(name, naming): shape for name, shape in shapes.items()}
    assert not set(other) & set(shapes)
    parameters = drawn(shapes, 0)
    same = dict(zip(other, parameters.values(), strict=True))
    expected = prune(parameters, shapes, Fraction("0.5"), structure=structure, heads=HEADS)
    found = prune(same, other, Fraction("0.5"), structure=structure, heads=HEADS, split="2", world=3)
    for name in shapes:
        assert torch.equal(found.parameters[renamed(name, naming)].mask, expected.parameters[name].mask)


@pytest.mark.parametrize("structure", SHAPES)
def test_the_order_of_a_layers_matrices_does_not_matter(structure: str) -> None:
    """With columns before rows it is still the first matrix of rows where units are counted."""
    shapes = SHAPES[structure]
    order = sorted(shapes, key=lambda name: (layer_of(name), not is_by_columns(name)))
    assert is_by_columns(order[0])
    parameters = drawn(shapes, 1, 2)
    expected = prune(parameters, shapes, Fraction("0.5"), structure=structure, heads=HEADS)
    found = prune(
        {name: parameters[name] for name in order},
        {name: shapes[name] for name in order},
        Fraction("0.5"),
        structure=structure,
        heads=HEADS,
        split="3",
        world=3,
    )
    for name in shapes:
        assert torch.equal(found.parameters[name].mask, expected.parameters[name].mask)


@pytest.mark.parametrize("naming", [None, *NAMINGS])
def test_the_matrices_of_heads_and_neurons_are_found_among_all(naming: str | None) -> None:
    names = [*OTHERS[:3], *SHAPES["heads"], *SHAPES["neurons"], *OTHERS[3:]]
    every = [name if naming is None else renamed(name, naming) for name in names]
    for structure, shapes in SHAPES.items():
        mine = [name if naming is None else renamed(name, naming) for name in shapes]
        assert members(every, structure) == mine
        columns = [name for name, of_bert in zip(mine, shapes, strict=True) if "output" in of_bert]
        assert [name for name in mine if is_by_columns(name)] == columns


# ------------------------------------------------------------------------------ refused

QUERY, _, VALUE, OUTPUT = list(SHAPES["heads"])[:4]
FIRST, SECOND = list(SHAPES["neurons"])[:2]
MATRICES = {"a.weight": (4, 8), "b.weight": (8, 4)}
# Another layer, of a smaller hidden size.
SMALLER = {name.replace("layer.0", "layer.7"): shape for name, shape in {FIRST: (6, 8), SECOND: (8, 6)}.items()}


def without(structure: str, name: str) -> dict[str, tuple[int, ...]]:
    return {other: shape for other, shape in SHAPES[structure].items() if other != name}


@pytest.mark.parametrize(
    ("structure", "shapes", "message"),
    [
        ("heads", without("heads", VALUE), r"layer\.0 has 3 of the 4 matrices of its heads"),
        ("heads", without("heads", OUTPUT), r"layer\.0 has 3 of the 4 matrices of its heads"),
        ("neurons", without("neurons", FIRST), r"layer\.0 has 1 of the 2 matrices of its neurons"),
        ("neurons", without("neurons", SECOND), r"layer\.0 has 1 of the 2 matrices of its neurons"),
        ("heads", {**SHAPES["heads"], FIRST: (20, 12)}, r"intermediate.* of shape \[20, 12\] is no matrix of heads"),
        ("neurons", {**SHAPES["neurons"], QUERY: (12, 12)}, r"query.* of shape \[12, 12\] is no matrix of neurons"),
        ("heads", {**SHAPES["heads"], VALUE: (15, 12)}, r"layer\.0 has matrices of heads of .*sizes: \[12, 15\]"),
        ("neurons", {**SHAPES["neurons"], SECOND: (12, 18)}, r"layer\.0 has matrices of neurons .*: \[18, 20\]"),
        ("heads", dict.fromkeys(SHAPES["heads"], (10, 10)), r"query\.weight has shape \[10, 10\], whose rows 3 heads"),
        ("neurons", SHAPES["neurons"] | SMALLER, r"neurons differ in their number of weights: .*: 24.*: 16"),
        ("3x4", MATRICES, r"a\.weight has shape \[4, 8\]; blocks of 3x4 need a matrix whose rows 3 divides"),
        ("4x8", MATRICES, r"b\.weight has shape \[8, 4\]; blocks of 4x8 .* whose columns 8"),
        ("1x4", {"a.weight": (4, 8), "a.bias": (8,)}, r"a\.bias has shape \[8\]; blocks of 1x4 need a matrix"),
        ("0x4", MATRICES, r"pruning\.structure is '0x4'; allowed: blocks of at least 1x1"),
        ("4x0", MATRICES, r"pruning\.structure is '4x0'; allowed: blocks of at least 1x1"),
    ],
)
def test_what_has_no_such_units_is_refused(structure: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune(drawn(shapes, 0), shapes, Fraction("0.5"), structure=structure, heads=HEADS)


def test_heads_of_a_model_that_does_not_tell_their_number_are_refused() -> None:
    with pytest.raises(UserError, match="tells no num_attention_heads"):
        prune(drawn(SHAPES["heads"], 0), SHAPES["heads"], Fraction("0.5"), structure="heads")
