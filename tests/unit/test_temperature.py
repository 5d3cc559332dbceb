"""What a teacher says over the temperature, against closed forms and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.analysis.temperature import Softness, recommended, softness
from distprune.training.distill import distillation_loss


def test_two_classes_by_hand():
    # A margin of T log 3 is a probability of 3/4.
    found = softness(torch.tensor([[2 * math.log(3.0), 0.0]]), 2.0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found.sums() == pytest.approx([1, entropy, 0.75, 2 * math.hypot(0.25, 0.25)])


@settings(max_examples=30)
@given(st.integers(2, 6), st.floats(0.3, 20), st.integers(0, 10**6))
def test_the_gradient_is_that_of_the_distillation_loss(classes: int, temperature: float, seed: int):
    teacher = 3 * torch.randn(1, classes, generator=torch.Generator().manual_seed(seed))
    student = torch.zeros(1, classes, requires_grad=True)
    distillation_loss(student, teacher, temperature).backward()
    found = softness(teacher, temperature)
    assert found.gradient == pytest.approx(float(student.grad.norm()), rel=1e-3, abs=1e-5)
    assert 0 <= found.entropy <= 1 + 1e-9


def test_softer_is_softer_and_ends_at_matching_logits():
    logits = torch.tensor([[4.0, -1.0, 0.5], [0.0, 6.0, 1.0]])
    means = [softness(logits, t).mean() for t in (0.5, 1.0, 2.0, 5.5, 100.0, 1e4)]
    for name, rising in (("entropy", True), ("top", False)):
        values = [getattr(each, name) for each in means]
        assert values == sorted(values, reverse=not rising)
    matching = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1).mean() / 3
    assert means[-1].gradient == pytest.approx(float(matching), rel=1e-3)
    assert means[0].gradient == pytest.approx(0.5 * math.sqrt(2 / 3), rel=1e-2), "T times one-hot less 1 / C"


def test_a_certain_teacher_has_no_entropy():
    assert softness(torch.tensor([[1000.0, 0.0]]), 1.0).sums() == pytest.approx([1, 0, 1, math.sqrt(0.5)])


def test_sums_add_up():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    parts = softness(logits[:2], 3.0) + softness(logits[2:], 3.0)
    assert parts.sums() == pytest.approx(softness(logits, 3.0).sums())


def test_the_lowest_soft_temperature_is_recommended():
    means = [Softness(t, 1, entropy, 0, 0) for t, entropy in ((1, 0.1), (2, 0.5), (4, 0.75), (8, 0.9))]
    assert recommended(means) == 4
    assert recommended(means[:2]) is None
