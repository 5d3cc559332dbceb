"""Knowledge distillation: the student follows the frozen dense teacher's whole output distribution.

At the usual temperatures of 1 or 2 a fine-tuned teacher's output is nearly one-hot, and says little more than the
label; a higher temperature is what makes distillation worth its cost (paper, guideline 3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 * KL(teacher || student)`` of the softened distributions, the mean over all distributions.

    T^2 keeps the gradient's size the same at any temperature.

    Args:
        student: logits, shape [..., C]; C = 1 is a regression, where the squared error to the teacher is returned.
        teacher: logits, shape [..., C].
        temperature: T > 0.

    Returns:
        A scalar, fp32.
    """
    student, teacher = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def mix(task_loss: Tensor, distillation: Tensor | None, hardness: float) -> Tensor:
    """Return ``(1 - hardness) * task + hardness * distillation``; the task loss where there is no teacher."""
    if distillation is None:
        return task_loss
    return torch.lerp(task_loss, distillation, hardness)
