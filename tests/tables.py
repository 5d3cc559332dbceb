"""The sweeps on the pages of docs/results, by their commands.

``python -m tests.tables`` writes docs/results/tables: what ``distprune sweep --table`` says of each file of rows.
"""

import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

from distprune.__main__ import options_of
from distprune.commands.sweep import chosen, table_of
from distprune.sweeps.opened import Opened, open_sweep
from distprune.sweeps.spec import read_sweep, runs_of

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "docs" / "results"
PLACES = {"$MINILM": "model", "$DATA": "data"}


def commands() -> dict[str, list[dict[str, Any]]]:
    """Return what the pages give to ``distprune sweep``, by the file of the rows: where none is named, the sweep's."""
    found = defaultdict(list)
    for page in sorted(FOLDER.glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("distprune sweep "):
                    for name, place in PLACES.items():
                        line = line.replace(name, place)
                    given = options_of(shlex.split(line)[1:])
                    rows = given["results_file"] or Path(given["sweep_path"]).with_suffix(".jsonl")
                    found[Path(rows).name].append(given)
    return found


def carried_out(given: dict[str, Any]) -> set[str]:
    """Return the names of a command's runs, and of those whose models they need."""
    path = REPOSITORY / given["sweep_path"]
    runs = runs_of(read_sweep(path), path)
    names = set(chosen([run.name for run in runs], given["only"]))
    for run in reversed(runs):  # behind those whose models it gets
        if run.name in names:
            names |= set(run.models.values())
    return names


def opened(name: str, given: dict[str, Any]) -> Opened:
    """Return the sweep of a command with the rows of a file.

    Raises:
        UserError: where the rows are of other settings than the sweep has.
    """
    return open_sweep(str(REPOSITORY / given["sweep_path"]), given["overrides"], str(FOLDER / name))


def table_file(name: str) -> Path:
    """Return where the table of a file of rows is."""
    return FOLDER / "tables" / Path(name).with_suffix(".md")


if __name__ == "__main__":
    for name, (given, *_) in commands().items():
        table_file(name).write_text(table_of(opened(name, given))[0])
        print(table_file(name).relative_to(REPOSITORY))
