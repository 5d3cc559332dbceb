"""What the files of this folder share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.engines import write_model
from tests.distributed.processes import Started
from tests.distributed.runs import write_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small task; its run.yaml is a run of 24 steps."""
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Return a function that starts a run; what is left of it is killed."""
    every: list[Started] = []

    def of(command: list[str], **variables: str) -> Started:
        every.append(Started(command, tmp_path / f"log-{len(every)}", **variables))
        return every[-1]

    yield of
    for each in every:
        if each.process.poll() is None:
            for child in psutil.Process(each.process.pid).children(recursive=True):
                child.kill()
            each.process.kill()
