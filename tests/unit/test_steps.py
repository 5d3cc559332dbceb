"""What a step of the optimizer that DeepSpeed refuses comes to."""

from types import SimpleNamespace

import pytest

from distprune.errors import UserError
from distprune.training.steps import take_step


def engine_that_raises(error: Exception) -> SimpleNamespace:
    def fail() -> None:
        raise error

    return SimpleNamespace(step=fail)


def test_the_smallest_scale_of_the_loss_is_one_sentence() -> None:
    error = Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")
    with pytest.raises(UserError, match=r"^fp16's gradients are not finite at step 7, .*; allowed: a lower lr\.peak"):
        take_step(engine_that_raises(error), 7)


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        take_step(engine_that_raises(RuntimeError("a defect")), 7)
