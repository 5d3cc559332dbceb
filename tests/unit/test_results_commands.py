"""The rows in docs/results are of the runs that the pages' commands carry out, and of no others."""

import json

import pytest

from distprune.commands.sweep import table_of
from tests.tables import FOLDER, REPOSITORY, carried_out, commands, opened, table_file

COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_are_those_of_the_commands(name: str) -> None:
    """But for rows of seeds that their sweep has no more."""
    rows = {json.loads(line)["run"] for line in (FOLDER / name).read_text().splitlines()}
    given = COMMANDS[name]
    assert rows & carried_out(given[0] | {"only": []}) == set().union(*map(carried_out, given))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_can_go_on_from_the_rows_whose_table_is_there(name: str) -> None:
    first, *others = (opened(name, given) for given in COMMANDS[name])
    assert all(each.rows == first.rows for each in others)
    assert table_file(name).read_text() == table_of(first)[0]


def test_every_file_of_a_shipped_sweep_has_commands() -> None:
    sweeps = {path.stem for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml")}
    assert {path.name for path in FOLDER.glob("*.jsonl") if path.stem in sweeps} <= COMMANDS.keys()


def test_there_are_no_tables_of_other_rows() -> None:
    assert set((FOLDER / "tables").iterdir()) == {table_file(name) for name in COMMANDS}
