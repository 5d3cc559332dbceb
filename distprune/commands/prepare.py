"""``distprune prepare``: everything that needs a network or a compiler, before a job that has neither."""

from pathlib import Path

from transformers import PreTrainedModel

from distprune import settings
from distprune.config import Config
from distprune.pruning import native
from distprune.pruning.targets import targets_of
from distprune.training.fit import check_model, check_zeros
from distprune.training.plan import make_plan
from distprune.training.setup import load_task, local_model, teacher_directory, weights_of


def run(config_path: str, overrides: list[str]) -> None:
    """Fetch models and data, tokenise, compile; on one process, with the caches that the job will use.

    Raises:
        UserError: as a run would, for whatever it would refuse of models and data.
    """
    config = settings.load_valid(config_path, overrides)
    directory = local_model(config.model.path, config.model.revision)
    print(f"model    {config.model.path}: {directory}")
    task = load_task(config, directory)
    student = check_model(config, make_plan(config, len(task.train)), task, directory)
    check_zeros(config, student, directory)
    if config.distillation.teaches and config.teacher.path is not None:
        print(f"teacher  {config.teacher.path}: {teacher_directory(config, task, directory)}")
    if config.pruning.weights_of is not None:
        scored = local_model(config.pruning.weights_of, None)
        _check_scored(config, scored, student)
        print(f"scored   {config.pruning.weights_of}: {scored}")
    print(f"data     {len(task.train):,} training and {len(task.validation):,} validation examples, tokenised")
    why = native.why_none()
    print(f"code     {'compiled' if why is None else f'{why}: pruning will take NumPy, in more than twice the time'}")
    print("A job on nodes without a network: set HF_HUB_OFFLINE=1, and the same HF_HOME where it is not the default.")


def _check_scored(config: Config, scored: Path, student: PreTrainedModel) -> None:
    shapes = {name: tuple(student.get_parameter(name).shape) for name in targets_of(config.pruning, student)}
    weights_of(scored, shapes, student)
