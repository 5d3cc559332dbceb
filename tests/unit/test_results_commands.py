"""The rows in docs/results are of the runs that the pages' commands carry out, and of no others."""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from distprune.__main__ import _options
from distprune.commands.sweep import _chosen
from distprune.sweeps.spec import read_sweep, runs_of

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "docs" / "results"


def commands() -> dict[str, list[dict[str, Any]]]:
    """Return what the pages give to ``distprune sweep``, by the file of the rows: where none is named, the sweep's."""
    found = defaultdict(list)
    for page in sorted(FOLDER.glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("distprune sweep "):
                    given = _options(shlex.split(line)[1:])
                    rows = given["results_file"] or Path(given["sweep_path"]).with_suffix(".jsonl")
                    found[Path(rows).name].append(given)
    return found


def carried_out(given: dict[str, Any]) -> set[str]:
    """Return the names of a command's runs, and of those whose models they need."""
    path = REPOSITORY / given["sweep_path"]
    runs = runs_of(read_sweep(path), path)
    names = set(_chosen([run.name for run in runs], given["only"]))
    for run in reversed(runs):  # behind those whose models it gets
        if run.name in names:
            names |= set(run.models.values())
    return names


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_are_those_of_the_commands(name: str) -> None:
    """But for rows of seeds that their sweep has no more."""
    rows = {json.loads(line)["run"] for line in (FOLDER / name).read_text().splitlines()}
    given = COMMANDS[name]
    assert rows & carried_out(given[0] | {"only": []}) == set().union(*map(carried_out, given))


def test_every_file_of_a_shipped_sweep_has_commands() -> None:
    sweeps = {path.stem for path in (REPOSITORY / "configs" / "sweeps").glob("*.yaml")}
    assert {path.name for path in FOLDER.glob("*.jsonl") if path.stem in sweeps} <= COMMANDS.keys()
