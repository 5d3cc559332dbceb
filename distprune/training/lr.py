"""The learning rate: a linear decay, rewound to its peak at given times (GMP*, arXiv 2210.06384)."""

from bisect import bisect_right
from dataclasses import dataclass

from distprune.config import LrConfig
from distprune.durations import parse, whole
from distprune.errors import UserError


@dataclass(frozen=True)
class LrSchedule:
    """The learning rate of each optimizer step of a run.

    Attributes:
        peak: learning rate at the start of each cycle.
        final: learning rate at the end of each cycle.
        warmup: optimizer steps from 0 to the peak; they belong to the first cycle.
        bounds: optimizer steps where the cycles start, and last the end of the run.
    """

    peak: float
    final: float
    warmup: int
    bounds: tuple[int, ...]

    @property
    def rewinds(self) -> tuple[int, ...]:
        """Optimizer steps at which the learning rate goes back to its peak."""
        return self.bounds[1:-1]

    def at(self, step: int) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: optimizer steps completed before it; at the end of the run it is the final learning rate.
        """
        if step < self.warmup:
            return self.peak * step / self.warmup
        cycle = min(bisect_right(self.bounds, step), len(self.bounds) - 1)
        start, end = max(self.bounds[cycle - 1], self.warmup), self.bounds[cycle]
        done = (step - start) / (end - start)
        return self.peak * (1 - done) + self.final * done


def lr_schedule(config: LrConfig, steps_per_epoch: int, total_steps: int) -> LrSchedule:
    """Return the learning rates of a run of ``total_steps`` optimizer steps.

    Raises:
        UserError: where a cycle is shorter than a step, or the warm-up as long as the first cycle.
    """
    bounds = (0, *_rewinds(config, steps_per_epoch, total_steps), total_steps)
    warmup = parse(config.warmup, "lr.warmup").steps(steps_per_epoch)
    if warmup >= bounds[1]:
        raise UserError(
            f"lr.warmup is {config.warmup!r}, {warmup} steps; allowed: less than the first cycle's {bounds[1]} steps"
        )
    return LrSchedule(config.peak, config.final, warmup, bounds)


def _rewinds(config: LrConfig, steps_per_epoch: int, total_steps: int) -> list[int]:
    """Return the optimizer steps of the rewinds; each time is rounded to a step by itself."""
    if config.rewind_every is None:
        return []
    every = parse(config.rewind_every, "lr.rewind_every").exact(steps_per_epoch)
    time = parse(config.rewind_first or config.rewind_every, "lr.rewind_first").exact(steps_per_epoch)
    if min(every, time) < 1:
        raise UserError(
            f"lr.rewind_every is {config.rewind_every!r} and lr.rewind_first {config.rewind_first!r}; "
            "allowed: at least one optimizer step each"
        )
    if whole(max(every, time)) > total_steps:
        raise UserError(
            f"lr.rewind_every is {config.rewind_every!r} and lr.rewind_first {config.rewind_first!r}; "
            f"allowed: at most the run's {total_steps} steps each"
        )
    steps = []
    while whole(time) < total_steps:
        steps.append(whole(time))
        time += every
    return steps
