"""A run's model: verified, then written."""

from pathlib import Path

from distprune import turns
from distprune.disk import partial_of, replace
from distprune.models.export import export
from distprune.models.files import gone_if_it_fails
from distprune.training.diagnose import refuse_nonfinite_weights
from distprune.training.setup import Setup


def verify(setup: Setup, step: int) -> None:
    """Refuse a model that nobody is to get: a pruned weight has come back, or a weight is not finite. Collective.

    Raises:
        AssertionError: the first.
        UserError: on every rank, the second.
    """
    refuse_nonfinite_weights(setup.student, step)
    if setup.pruner is not None:
        setup.pruner.verify()


def write(setup: Setup, directory: Path) -> None:
    """Export to a directory; what was there goes once the new one is complete. Collective: every rank calls it.

    Raises:
        UserError: on every rank, where it cannot be written; what was begun is gone.
    """
    partial = partial_of(directory)
    with gone_if_it_fails(partial):
        export(setup.student, setup.task.tokenizer, partial)
        turns.write_on_main(lambda: replace(partial, directory), directory)
