"""The kinds of task, by the name in ``task.name``."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distprune.config import Config
from distprune.errors import unknown
from distprune.tasks.base import Task
from distprune.tasks.text_classification import TextClassification

__all__ = ["TASKS", "Task", "build_task"]

TASKS: dict[str, Callable[[Config, PreTrainedTokenizerBase, Path | None], Task]] = {
    "text_classification": TextClassification,
}


def build_task(config: Config, tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None = None) -> Task:
    """Load, check and tokenise the data of ``config.task``.

    No collective: every rank calls it for itself, and finds what the first one tokenised in the cache.

    Args:
        config: the run's configuration; ``task`` and ``train.seed`` are read.
        tokenizer: the student's.
        cache_dir: where loaded and tokenised data are kept; null: the cache of the datasets library.

    Raises:
        UserError: an unknown task, or input that it cannot use.
    """
    if config.task.name not in TASKS:
        raise unknown("task.name", config.task.name, TASKS)
    return TASKS[config.task.name](config, tokenizer, cache_dir)
