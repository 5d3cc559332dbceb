"""What docs/design.md says of the folders is so."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "distprune"


def test_each_folder_imports_only_from_its_own_line_and_those_below() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    table = text.partition("## Where things are")[2].partition("Beside them")[0]
    lines = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    height = {folder: -number for number, line in enumerate(lines) for folder in line}
    assert height.keys() == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for path in PACKAGE.glob("*/**/*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        for other in re.findall(r"^\s*from distprune[. ](?:import )?(\w+)", path.read_text(), re.MULTILINE):
            assert height.get(other, -99) <= height[folder], f"{path} imports from {other}"


def test_files_that_all_may_read_import_from_no_folder_but_settings_its_checks() -> None:
    found = {
        (path.name, other)
        for path in PACKAGE.glob("[a-z]*.py")
        for other in re.findall(r"^from distprune\.(\w+)", path.read_text(), re.MULTILINE)
        if (PACKAGE / other).is_dir()
    }
    assert found == {("settings.py", "checks")}
