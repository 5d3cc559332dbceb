"""A run's configuration cut down to one pruning, and that pruning by the gradients of one step."""

from dataclasses import replace
from pathlib import Path

from distprune import dist, settings, turns
from distprune.config import Config, DistillationConfig, RecipeConfig, RegrowthConfig
from distprune.errors import UserError
from distprune.models.export import export
from distprune.models.files import begin_directory, gone_if_it_fails
from distprune.models.pruned import Pruned
from distprune.monitor import Monitor
from distprune.training.lr import LrSchedule
from distprune.training.setup import local_model, prepare
from distprune.training.train import Trainer
from distprune.training.written import verify


def for_one_pruning(config: Config) -> None:
    """Let a configuration prune to its target at once, and take out what else a run does.

    Raises:
        UserError: it prunes nothing, or by another model's weights.
    """
    pruning = config.pruning
    if pruning.sparsity == 0:
        raise UserError("pruning.sparsity is 0.0; allowed without training: more than 0, e.g. pruning.sparsity=0.9")
    if pruning.weights_of is not None:
        raise UserError(f"pruning.weights_of is {pruning.weights_of!r}; allowed without training: null")
    pruning.initial, pruning.start, pruning.end, pruning.every = pruning.sparsity, "0 steps", "0 steps", "1 steps"
    config.recipe, config.task.more_validation = RecipeConfig(), []
    config.train.select, config.train.patience = "last", None
    config.checkpoint.epochs, config.checkpoint.steps, config.checkpoint.minutes = False, None, None
    config.regrowth, config.distillation = RegrowthConfig(), DistillationConfig()


def prune_by_gradients(config: Config, target: Path) -> Pruned:
    """Take one optimizer step at a learning rate of 0, pruning in it. Collective: every rank calls it.

    Args:
        config: of `for_one_pruning`.
        target: the new directory, which is not made yet; the model is written beside it.

    Raises:
        UserError: on every rank, where no run can have the configuration, or the model cannot be written.
    """
    if not config.fisher.dropout:
        config.model.dropout = 0.0
    dist.agree(lambda: settings.validate(config))
    setup = prepare(config)
    source = local_model(config.model.path, config.model.revision)
    directory = turns.on_main(lambda: begin_directory(source, target))
    assert setup.pruner is not None
    setup.plan = replace(setup.plan, total_steps=1, lr=LrSchedule(0.0, 0.0, 0, (0, 1)))
    trainer = Trainer(config, setup, Monitor(target, config, 1, enabled=False), target)
    with gone_if_it_fails(directory):
        trainer.run()
        verify(setup, trainer.step)
        export(setup.student, setup.task.tokenizer, directory)
    return Pruned(directory, setup.pruner.masked, setup.pruner.total, setup.pruner.threshold)
