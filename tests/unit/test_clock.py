"""Where a run's time goes."""

import time
from contextlib import suppress

from distprune.training.clock import Clock


def test_parts_add_up_and_the_rest_is_training() -> None:
    clock = Clock()
    with clock.of("evaluations"):
        time.sleep(0.06)
    with suppress(KeyError), clock.of("evaluations"):
        time.sleep(0.06)
        raise KeyError
    assert clock.seconds["evaluations"] >= 0.12, "also of what was broken off"
    clock.seconds = {"evaluations": 1.26, "checkpoints": 2.0}
    assert clock.whole(10.0) == {"training steps": 6.7, "evaluations": 1.3, "checkpoints": 2.0}
    assert clock.whole(3.0)["training steps"] == 0.0
