"""Every link of the pages leads to a file, and to a heading of it, that are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def headings(page: Path) -> set[str]:
    """Return the headings of a page as GitHub's anchors name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        place, _, heading = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_a_heading_is_known_by_its_anchor(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# Runs, at 90 %\n\ntext\n\n## `gmp`: it's\n")
    assert headings(tmp_path / "page.md") == {"runs-at-90-", "gmp-its"}
