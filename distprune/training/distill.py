"""Knowledge distillation: the student follows the frozen dense teacher's whole output distribution.

Its parameters matter (paper, guideline 3). At the usual temperatures of 1 or 2 the output of a sure teacher is nearly
one-hot, and says little more than the label: the reason that GMP* (arXiv 2210.06384) has for a higher one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distprune.errors import UserError

PIECE = 1 << 23
"""Logits whose divergences are computed at once, where there are more."""
SMALLEST = 1e-6
"""A probability below this one counts as this one."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 * KL(teacher || student)`` of each two softened distributions.

    T^2 keeps the gradient's size the same at any temperature. Of a large vocabulary a piece at a time is computed, and
    again in the backward pass: whole, it would hold several times what the logits take.

    Args:
        student: logits, shape [..., C]; C = 1 is a regression, where the squared error to the teacher is returned.
        teacher: logits, shape [..., C].
        temperature: T > 0.

    Returns:
        Shape [...], fp32.
    """
    if student.shape[-1] == 1:
        return (student.float() - teacher.float()).square().squeeze(-1)
    rows = max(1, PIECE // student.shape[-1])
    if student.numel() <= PIECE:
        return _divergence(student, teacher, temperature)
    pieces = zip(*(torch.split(each.flatten(0, -2), rows) for each in (student, teacher)), strict=True)
    divergences = [
        checkpoint(_divergence, *each, temperature, use_reentrant=False, preserve_rng_state=False) for each in pieces
    ]
    return torch.cat(divergences).view(student.shape[:-1])


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(-1) * temperature**2


def layer_pairs(layers: list[int], student: int, teacher: int) -> list[tuple[int, int]]:
    """Return which of the teacher's layers each of the student's follows, both counted from 0.

    Args:
        layers: the teacher's layer for each of the student's, counted from 1; empty: spread evenly, last to last.
        student: layers of the student.
        teacher: layers of the teacher.

    Raises:
        UserError: another number of them than the student has layers, or one that the teacher does not have.
    """
    chosen = layers or [-(-teacher * layer // student) for layer in range(1, student + 1)]
    if len(chosen) != student or not all(1 <= layer <= teacher for layer in chosen):
        raise UserError(
            f"distillation.layers is {layers}; allowed: one of the teacher's layers 1 to {teacher} for each of the "
            f"student's {student}"
        )
    return [(number, layer - 1) for number, layer in enumerate(chosen)]


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of hidden states over each row's tokens that count, then rows; a scalar, fp32.

    Args:
        student: shape [B, T, H].
        teacher: shape [B, T, H].
        mask: 1 where a token counts, shape [B, T].
    """
    errors = (student.float() - teacher.float()).square().mean(-1)
    return _mean_over_rows(errors, mask)


def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return ``KL(teacher || student)`` of attention, a mean over heads, a row's tokens that attend, and rows; fp32.

    Args:
        student: probabilities, shape [B, heads, T, T]; those who attend in the third dimension.
        teacher: as the student's.
        mask: 1 where a token counts, shape [B, T].
    """
    ours, theirs = student.float().clamp_min(SMALLEST).log(), teacher.float().clamp_min(SMALLEST).log()
    divergences = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
    return _mean_over_rows(divergences, mask)


def _mean_over_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over rows of their means over tokens: the same for any way to cut a batch into equal parts."""
    return ((values * mask).sum(-1) / mask.sum(-1)).mean()
