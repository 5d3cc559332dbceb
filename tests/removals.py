"""Carries out what docs/invariants.md says: takes each named line away, and watches its test fail.

``python -m tests.removals [PART ...]`` tries every row, or those whose text holds one of the parts.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "invariants.md"


class Removal(NamedTuple):
    """A guarantee, its test, and the line that it stands on."""

    guarantee: str
    test: str
    where: str
    line: str
    becomes: str

    @property
    def file(self) -> Path:
        """The file, from the repository's root."""
        return Path("distprune") / self.where.partition("::")[0]

    def place(self, root: Path) -> int:
        """Return the index of the line in its file, of which there is exactly one in the named function."""
        text = (root / self.file).read_text()
        node: ast.AST = ast.parse(text)
        for name in self.where.partition("::")[2].split("."):
            node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name)
        assert isinstance(node, ast.FunctionDef)
        lines = text.splitlines()[: node.end_lineno]
        (found,) = [n for n, line in enumerate(lines) if n >= node.lineno - 1 and line.strip() == self.line]
        return found

    def carry_out(self, root: Path) -> None:
        """Replace the line."""
        lines = (root / self.file).read_text().splitlines()
        place = self.place(root)
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        lines[place] = indent + self.becomes
        (root / self.file).write_text("\n".join(lines) + "\n")


def removals() -> list[Removal]:
    """Read the page's table."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")][2:]
    # A bar inside of a cell is written \|.
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [Removal(row[0], *(cell.strip("`") for cell in row[1:])) for row in cells]


def main(parts: list[str]) -> int:
    """Try the removals; return 1 where a test passed all the same."""
    silent = []
    for removal in removals():
        if parts and not any(part in " ".join(removal) for part in parts):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "repository"
            shutil.copytree(REPOSITORY, root, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
            removal.carry_out(root)
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", removal.test]
            ours = os.environ | {"PYTHONPATH": str(root)}  # for what tests start, which would find what is installed
            done = subprocess.run(command, cwd=root, env=ours, capture_output=True, text=True)
        # 1: tests ran and one failed; anything else is no answer.
        noticed = done.returncode == 1
        print(f"{'fails' if noticed else 'PASSES'}: {removal.guarantee} <- {removal.where}: {removal.line}", flush=True)
        if not noticed:
            silent.append(removal)
            print(done.stdout[-2000:])
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
