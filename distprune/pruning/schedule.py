"""When to prune, and to which sparsity: a large first step, then a cubic that levels out. When to regrow, how much."""

from fractions import Fraction
from math import cos, pi

from distprune.config import PruningConfig, RegrowthConfig
from distprune.durations import multiples, parse, whole
from distprune.errors import UserError


def cubic(x: Fraction, initial: Fraction, final: Fraction) -> Fraction:
    """Return the sparsity at the part ``x``, in [0, 1], of the pruning time (arXiv 1710.01878, equation 1)."""
    return final + (initial - final) * (1 - x) ** 3


def sparsity_ladder(config: PruningConfig, steps_per_epoch: int, total_steps: int) -> dict[int, Fraction]:
    """Return the prunings of a run: optimizer step -> part of the prunable weights that is zero from it on.

    A step is the number of optimizer steps completed before it. The first pruning, at ``start``, has
    exactly the initial sparsity; the last, at ``end``, exactly the final one, also where ``every`` does not
    divide the time between; none comes less than a step behind another, but that one. Sparsities are the decimals as
    written. Of prunings on one step the last counts. One to a sparsity of 0 is left out.

    Raises:
        UserError: where the prunings are not in order, or leave no optimizer step with the last mask.
    """
    initial, final = Fraction(str(config.initial)), Fraction(str(config.sparsity))
    if final == 0:
        return {}
    start = parse(config.start, "pruning.start").exact(steps_per_epoch)
    end = parse(config.end, "pruning.end").exact(steps_per_epoch)
    every = parse(config.every, "pruning.every").exact(steps_per_epoch)
    if start > end:
        raise UserError(f"pruning.start is {config.start!r}; allowed: up to pruning.end, {config.end!r}")
    if every <= 0:
        raise UserError(f"pruning.every is {config.every!r}; allowed: more than 0")
    if whole(end) >= total_steps:
        raise UserError(
            f"pruning.end is {config.end!r}, step {whole(end)} of {total_steps}; "
            "allowed: at least one step before the end of the run (train.epochs)"
        )
    ladder: dict[int, Fraction] = {}
    time = start
    while time < end:
        ladder[whole(time)] = cubic((time - start) / (end - start), initial, final)
        time += max(every, Fraction(1))
    ladder[whole(end)] = final
    return {step: sparsity for step, sparsity in ladder.items() if sparsity > 0}


def regrowths(config: RegrowthConfig, steps_per_epoch: int, total_steps: int) -> dict[int, float]:
    """Return the regrowths of a run: optimizer step -> part of the kept weights that changes places.

    The part falls by half a cosine to a hundredth of the first at the end of the run (SMC-Bench's code: 0.5 to 0.005).
    It has nine decimals, so that all machines round alike.

    Raises:
        UserError: where the run ends before the first.
    """
    if config.part == 0:
        return {}
    every, last = parse(config.every, "regrowth.every").exact(steps_per_epoch), config.part / 100
    if whole(every) >= total_steps:
        raise UserError(
            f"regrowth.every is {config.every!r}, and the run has {total_steps} steps, so that nothing comes back; "
            "allowed: less, or regrowth.part=0"
        )
    return {
        step: round(last + (config.part - last) * (1 + cos(pi * step / total_steps)) / 2, 9)
        for step in multiples(every, total_steps)
        if step < total_steps
    }
