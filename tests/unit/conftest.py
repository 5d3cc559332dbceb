"""Fixtures that several files of unit tests share."""

from collections.abc import Iterator

import datasets
import pytest

from distprune.config import Config
from distprune.pruning import native
from distprune.tasks import Task, build_task
from tests.unit.task_files import TRAIN, VALIDATION, make_tokenizer, write


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Return a function that writes the two files and builds the task from them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    written = {}

    def run(rows=TRAIN, held=VALIDATION, suffix=".jsonl", seed=0, tokenizer=None, **options) -> Task:
        for name, content in {f"train{suffix}": rows, f"validation{suffix}": held}.items():
            if written.get(name) != content:
                write(tmp_path / name, content)
                written[name] = content
        config = Config()
        config.train.seed = seed
        for key, value in ({"train": f"train{suffix}", "validation": f"validation{suffix}"} | options).items():
            assert hasattr(config.task, key)
            setattr(config.task, key, value)
        return build_task(config, tokenizer or make_tokenizer())

    return run


@pytest.fixture(scope="module", params=["native", "numpy"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Pass over weights by machine code, and by NumPy. Of a module: hypothesis tests may use it."""
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "library", lambda: None)
        yield request.param
