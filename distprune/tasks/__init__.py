"""The kinds of task, by the name in ``task.name``."""

from transformers import PreTrainedTokenizerBase

from distprune.config import Config
from distprune.plugins import find_class
from distprune.tasks.base import Task
from distprune.tasks.choice_by_masked_lm import ChoiceByMaskedLM
from distprune.tasks.language_modelling import CausalLM, MaskedLM
from distprune.tasks.multiple_choice import MultipleChoice
from distprune.tasks.question_answering import QuestionAnswering
from distprune.tasks.text_classification import TextClassification

__all__ = ["TASKS", "Task", "build_task", "task_kind"]

TASKS: dict[str, type[Task]] = {
    "question_answering": QuestionAnswering,
    "text_classification": TextClassification,
    "multiple_choice": MultipleChoice,
    "choice_by_masked_lm": ChoiceByMaskedLM,
    "masked_lm": MaskedLM,
    "causal_lm": CausalLM,
}


def task_kind(name: str) -> type[Task]:
    """Return a kind of task by its name, or by ``module:Class`` where it is of another package.

    Raises:
        UserError: where there is none of this name.
    """
    return find_class("task.name", name, TASKS, Task)  # type: ignore[type-abstract]


def build_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Load, check and tokenise the data of ``config.task``.

    No collective: every rank calls it for itself, and finds what the first one tokenised in the cache.

    Args:
        config: the run's configuration; ``task`` and ``train.seed`` are read.
        tokenizer: the student's.

    Raises:
        UserError: an unknown task, or input that it cannot use.
    """
    return task_kind(config.task.name)(config, tokenizer)
