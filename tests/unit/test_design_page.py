"""What docs/design.md says of the folders is so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "distprune"


def imported(path: Path) -> Iterator[str]:
    """Yield the parts of the package that a file imports from, as folders or files without their ending."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = getattr(node, "module", None)
        whole = [f"{module}.{name}" for name in names] if module else names
        yield from (name.split(".")[1] for name in whole if name.startswith("distprune."))


def test_each_folder_imports_only_from_its_own_line_and_those_below() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    table = text.partition("## Where things are")[2].partition("Beside them")[0]
    lines = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    height = {folder: -number for number, line in enumerate(lines) for folder in line}
    assert height.keys() == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for path in PACKAGE.glob("*/**/*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        for other in imported(path):
            assert height.get(other, -99) <= height[folder], f"{path} imports from {other}"


def test_files_that_all_may_read_import_from_no_folder_but_settings_its_checks() -> None:
    files = [path for path in PACKAGE.glob("*.py") if path.stem != "__main__"]
    found = {(path.stem, other) for path in files for other in imported(path) if (PACKAGE / other).is_dir()}
    assert found == {("settings", "checks")}
