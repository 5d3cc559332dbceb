"""Settings that must stand before torch is imported, and the fixtures that several files share."""

import os

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    # torch looks up the name of every address that it connects to, 127.0.0.1 too; where no answer comes, for 5 s.
    "RES_OPTIONS": "timeout:1",
}
os.environ.pop("DISTPRUNE_DEBUG", None)

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.world import World

settings.register_profile("distprune", deadline=None)  # how long an example takes is the machine's
settings.load_profile("distprune")


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """Return the group of so many ranks, started at its first use."""
    worlds: dict[int, World] = {}
    yield lambda size: worlds.setdefault(size, World(size))
    for each in worlds.values():
        each.stop()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let jobs on a cluster be asked for."""
    parser.addoption("--cluster", action="store_true", help="submit jobs to the cluster that sbatch reaches")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave jobs on a cluster out, unless they are asked for."""
    return True if collection_path.name == "cluster" and not config.getoption("--cluster") else None
