"""How much a teacher says beyond its most likely class, over the temperature (the paper's third guideline).

Pure functions of logits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.5, 7.0, 8.5, 12.0, 16.0)
ENOUGH = 0.75
"""Part of the most that a distribution's entropy can be at which the softened teacher counts as soft."""


class Softness(NamedTuple):
    """Means over distributions at one temperature.

    Attributes:
        temperature: T.
        entropy: each one's entropy over its largest possible value, log C.
        top: probability of the most likely class.
        gradient: Euclidean norm of the distillation gradient for a student that knows nothing, T (1/C - p_T).
    """

    temperature: float
    entropy: float
    top: float
    gradient: float


def softness(logits: Tensor, temperature: float) -> Tensor:
    """Return what `Softness` has of each distribution, without the temperature: float64, shape [N, 3].

    The gradient is that of ``T^2 * KL(teacher || student)`` by the student's logits where those are all equal: what
    the teacher has to say at first. With T it grows to that of matching the logits themselves.

    Args:
        logits: of the teacher, shape [..., C], C > 1; N distributions.
        temperature: T > 0.
    """
    classes = logits.shape[-1]
    logarithms = torch.log_softmax(logits.double().flatten(0, -2) / temperature, dim=-1)
    probabilities = logarithms.exp()
    entropy = -(probabilities * logarithms).nan_to_num().sum(-1) / math.log(classes)
    gradient = temperature * (probabilities - 1 / classes).norm(dim=-1)
    return torch.stack([entropy, probabilities.max(dim=-1).values, gradient], dim=-1)


def recommended(means: list[Softness]) -> float | None:
    """Return the lowest temperature at which the teacher is soft; None where it is so at none.

    Args:
        means: of each temperature, ascending.
    """
    return next((each.temperature for each in means if each.entropy >= ENOUGH), None)
