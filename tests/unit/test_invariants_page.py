"""The page of guarantees names lines and tests that are there; tests/removals.py carries it out."""

import pytest

from tests.removals import REPOSITORY, Removal, removals


@pytest.mark.parametrize("removal", removals(), ids=lambda removal: f"{removal.where}-{removal.becomes}")
def test_the_line_and_the_test_are_there(removal: Removal) -> None:
    assert removal.line != removal.becomes
    removal.place(REPOSITORY)
    file, _, name = removal.test.partition("::")
    assert f"def {name}(" in (REPOSITORY / file).read_text()


def test_every_row_of_the_table_is_read() -> None:
    assert len(removals()) > 20
