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
    assert found.tolist() == [pytest.approx([entropy, 0.75, 2 * math.hypot(0.25, 0.25)])]


@settings(max_examples=30)
@given(st.integers(2, 6), st.floats(0.3, 20), st.integers(0, 10**6))
def test_the_gradient_is_that_of_the_distillation_loss(classes: int, temperature: float, seed: int):
    teacher = 3 * torch.randn(1, classes, generator=torch.Generator().manual_seed(seed))
    student = torch.zeros(1, classes, requires_grad=True)
    distillation_loss(student, teacher, temperature).backward()
    ((entropy, _, gradient),) = softness(teacher, temperature).tolist()
    assert gradient == pytest.approx(float(student.grad.norm()), rel=1e-3, abs=1e-5)
    assert 0 <= entropy <= 1 + 1e-9


def test_softer_is_softer_and_ends_at_matching_logits():
    logits = torch.tensor([[4.0, -1.0, 0.5], [0.0, 6.0, 1.0]])
    means = [Softness(t, *softness(logits, t).mean(0).tolist()) for t in (0.5, 1.0, 2.0, 5.5, 100.0, 1e4)]
    for name, rising in (("entropy", True), ("top", False)):
        values = [getattr(each, name) for each in means]
        assert values == sorted(values, reverse=not rising)
    matching = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1).mean() / 3
    assert means[-1].gradient == pytest.approx(float(matching), rel=1e-3)
    assert means[0].gradient == pytest.approx(0.5 * math.sqrt(2 / 3), rel=1e-2), "T times one-hot less 1 / C"


def test_a_certain_teacher_has_no_entropy():
    assert softness(torch.tensor([[1000.0, 0.0]]), 1.0).tolist() == [pytest.approx([0, 1, math.sqrt(0.5)])]


def test_each_distribution_counts_by_itself():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    alone = [softness(each, 3.0)[0].tolist() for row in logits for each in row.unsqueeze(1)]
    assert softness(logits, 3.0).tolist() == [pytest.approx(each) for each in alone]


def test_the_lowest_soft_temperature_is_recommended():
    means = [Softness(t, entropy, 0, 0) for t, entropy in ((1, 0.1), (2, 0.5), (4, 0.75), (8, 0.9))]
    assert recommended(means) == 4
    assert recommended(means[:2]) is None
