"""How much a teacher says beyond its most likely class, over the temperature (the paper's third guideline).

Pure functions of logits, in sums that add up over batches and ranks.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.0, 8.5, 12.0, 16.0)
ENOUGH = 0.75
"""Part of the most that a distribution's entropy can be at which the softened teacher counts as soft."""


@dataclass(frozen=True)
class Softness:
    """Sums over distributions at one temperature; `+` adds those of other examples.

    Attributes:
        temperature: T.
        count: how many distributions.
        entropy: each one's entropy over its largest possible value, log C.
        top: probability of the most likely class.
        gradient: Euclidean norm of the distillation gradient for a student that knows nothing, T (1/C - p_T).
    """

    temperature: float
    count: float = 0.0
    entropy: float = 0.0
    top: float = 0.0
    gradient: float = 0.0

    def __add__(self, other: "Softness") -> "Softness":
        assert self.temperature == other.temperature
        ours, theirs = self.sums(), other.sums()
        return Softness(self.temperature, *(a + b for a, b in zip(ours, theirs, strict=True)))

    def sums(self) -> list[float]:
        """Return all but the temperature."""
        return [self.count, self.entropy, self.top, self.gradient]

    def mean(self) -> Self:
        """Return the means over the distributions, with a count of 1."""
        return type(self)(self.temperature, *(each / self.count for each in self.sums()))


def softness(logits: Tensor, temperature: float) -> Softness:
    """Return the sums over some distributions.

    The gradient is that of ``T^2 * KL(teacher || student)`` by the student's logits where those are all equal: what
    the teacher has to say at first. With T it grows to that of matching the logits themselves.

    Args:
        logits: of the teacher, shape [..., C], C > 1.
        temperature: T > 0.
    """
    classes = logits.shape[-1]
    logarithms = torch.log_softmax(logits.double().flatten(0, -2) / temperature, dim=-1)
    probabilities = logarithms.exp()
    entropy = -(probabilities * logarithms).nan_to_num().sum(-1) / math.log(classes)
    gradient = temperature * (probabilities - 1 / classes).norm(dim=-1)
    top = probabilities.max(dim=-1).values
    return Softness(temperature, float(len(top)), float(entropy.sum()), float(top.sum()), float(gradient.sum()))


def recommended(means: list[Softness]) -> float | None:
    """Return the lowest temperature at which the teacher is soft; None where it is so at none.

    Args:
        means: of each temperature, ascending.
    """
    return next((each.temperature for each in means if each.entropy >= ENOUGH), None)
