"""The rows in docs/results are of the runs that the pages' commands carry out, and of no others."""

import json

import pytest

from tests.tables import FOLDER, REPOSITORY, carried_out, commands, opened, tables

COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_are_those_of_the_commands(name: str) -> None:
    """But for rows of seeds that their sweep has no more."""
    rows = {json.loads(line)["run"] for line in (FOLDER / name).read_text().splitlines()}
    given = COMMANDS[name]
    assert rows & carried_out(given[0] | {"only": []}) == set().union(*map(carried_out, given))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_can_go_on_from_the_rows(name: str) -> None:
    for given in COMMANDS[name]:
        assert opened(name, given).rows


def test_every_file_of_a_shipped_sweep_has_commands() -> None:
    sweeps = {path.stem for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml")}
    assert {path.name for path in FOLDER.glob("*.jsonl") if path.stem in sweeps} <= COMMANDS.keys()


def test_the_tables_are_those_of_the_rows() -> None:
    assert {path: path.read_text() for path in (FOLDER / "tables").iterdir()} == tables()
