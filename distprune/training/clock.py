"""Where a run's time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds that a run has spent on what is no training step, by what it was.

    A part ends where its work has: it ends in a collective, or with numbers that are read from the device.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time within for a part; parts do not overlap."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def whole(self, seconds: float) -> dict[str, float]:
        """Return the parts of so many seconds, to a tenth: what is in none was training steps."""
        rest = max(0.0, seconds - sum(self.seconds.values()))
        return {part: round(spent, 1) for part, spent in {"training steps": rest, **self.seconds}.items()}
