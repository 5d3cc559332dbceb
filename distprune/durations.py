"""Points and lengths in training time, exact: ``2``, ``"0.1 epochs"`` or ``"500 steps"``."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from distprune.errors import UserError

_PATTERN = re.compile(r"(?P<amount>\d+(\.\d*)?(e[+-]?\d{1,2})?)\s*(?P<unit>epochs?|steps?)?")


@dataclass(frozen=True)
class Duration:
    """A point or a length in training time, as the decimal it was written as."""

    amount: Fraction
    in_epochs: bool

    def exact(self, steps_per_epoch: int) -> Fraction:
        """Return the optimizer steps it takes, before rounding."""
        return self.amount * steps_per_epoch if self.in_epochs else self.amount

    def steps(self, steps_per_epoch: int) -> int:
        """Return the whole optimizer steps it takes, half a step rounded up."""
        return whole(self.exact(steps_per_epoch))


def parse(text: str, key: str) -> Duration:
    """Read a duration; a number without a unit counts epochs.

    Args:
        text: such as ``"2"``, ``"0.1 epochs"`` or ``"500 steps"``.
        key: the configuration key it belongs to, for the message.

    Raises:
        UserError: where it is something else, or a part of a step.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{key} is {text!r}; allowed: a time such as '2 epochs', '0.1 epochs' or '500 steps'")
    duration = Duration(Fraction(match["amount"]), not (match["unit"] or "").startswith("step"))
    if not duration.in_epochs and duration.amount.denominator != 1:
        raise UserError(f"{key} is {text!r}; allowed: a whole number of steps, or a time in epochs")
    return duration


def whole(steps: Fraction) -> int:
    """Return the nearest whole step, half a step rounded up."""
    return math.floor(steps + Fraction(1, 2))


def multiples(every: Fraction, last: int) -> list[int]:
    """Return the whole steps from 1 to ``last`` that are nearest to the multiples of a length."""
    every = max(every, Fraction(1))
    numbers = range(1, whole(last / every) + 1)
    return sorted({step for number in numbers if 0 < (step := whole(every * number)) <= last})
