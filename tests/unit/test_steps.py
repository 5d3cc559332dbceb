"""What a step of the optimizer that DeepSpeed refuses comes to."""

from types import SimpleNamespace

import pytest

from distprune.errors import UserError
from distprune.training.train import Trainer


def trainer_whose_step_raises(error: Exception) -> Trainer:
    def fail() -> None:
        raise error

    trainer = object.__new__(Trainer)
    trainer.step = 7
    trainer.setup = SimpleNamespace(student=SimpleNamespace(step=fail))  # type: ignore[assignment]
    return trainer


def test_the_smallest_scale_of_the_loss_is_one_sentence() -> None:
    error = Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    with pytest.raises(UserError, match=r"^fp16's gradients are not finite at step 7, .*; allowed: a lower lr\.peak"):
        trainer_whose_step_raises(error)._take_step()


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        trainer_whose_step_raises(RuntimeError("a defect"))._take_step()
