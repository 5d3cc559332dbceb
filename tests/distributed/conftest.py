"""What the files of this folder share."""

from pathlib import Path

import pytest

from tests.distributed.engines import write_model
from tests.distributed.runs import write_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small task; its run.yaml is a run of 24 steps."""
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model."""
    return write_model(tmp_path_factory.mktemp("model"))
