import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distprune.training import distill
from distprune.training.distill import distillation_loss

logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3), min_size=2, max_size=2).map(
    torch.tensor
)
temperatures = st.floats(0.5, 50)


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 * KL(teacher || student), the mean over examples, in float64."""
    total = 0.0
    for s, t in zip(student.double() / temperature, teacher.double() / temperature, strict=True):
        p, q = (values.exp() / values.exp().sum() for values in (t, s))
        total += sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True) if a > 0)
    return temperature**2 * total / len(student)


@given(logits, logits, temperatures)
def test_is_the_formula(student: Tensor, teacher: Tensor, temperature: float) -> None:
    loss = distillation_loss(student, teacher, temperature)
    assert loss.shape == (2,)
    loss = loss.mean()
    assert float(loss) == pytest.approx(by_hand(student, teacher, temperature), rel=1e-3, abs=2e-6 * temperature**2)


@given(logits, temperatures, st.floats(-5, 5, width=32))
def test_is_zero_for_the_teachers_own_distribution(teacher: Tensor, temperature: float, shift: float) -> None:
    loss = distillation_loss(teacher + shift, teacher, temperature).mean()
    assert float(loss) == pytest.approx(0.0, abs=2e-6 * temperature**2)


def test_the_teacher_is_the_reference() -> None:
    """KL is not symmetric: a student that misses a class of the teacher's pays, one that adds a class pays less."""
    sharp, even = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert distillation_loss(sharp, even, 1.0) > 5 * distillation_loss(even, sharp, 1.0)


def test_temperature_squared_keeps_the_gradients_size() -> None:
    """For high T the gradient tends to (student - teacher) / C, whatever T is (Hinton et al., 2015)."""
    teacher = torch.tensor([[1.0, -1.0, 0.0]])
    for temperature in (100.0, 1000.0):
        student = torch.zeros(1, 3, requires_grad=True)
        distillation_loss(student, teacher, temperature).mean().backward()
        assert torch.allclose(student.grad, -teacher / 3, atol=0.01)


def test_each_distribution_is_compared_by_itself_and_padding_counts_for_nothing() -> None:
    student, teacher = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    sides = [distillation_loss(student[:, side], teacher[:, side], 2.0) for side in (0, 1)]
    padded = [torch.nn.functional.pad(each, (0, 2), value=-1e4) for each in (student, teacher)]
    assert torch.allclose(distillation_loss(padded[0], padded[1], 2.0), torch.stack(sides, dim=1))


def test_low_precision_logits_are_compared_in_fp32() -> None:
    student, teacher = torch.tensor([[3.0, -2.0]]), torch.tensor([[1.0, 0.5]])
    loss = distillation_loss(student.bfloat16(), teacher.bfloat16(), 5.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student, teacher, 5.5))


def test_sharp_teachers_stay_finite() -> None:
    student = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[1e4, -1e4]]), 1.0)
    loss.mean().backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 5.5])
def test_regression_is_the_squared_error_at_any_temperature(temperature: float) -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.5]])
    assert distillation_loss(student, teacher, temperature).tolist() == [4.0, 0.25]


def test_a_large_vocabulary_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd keeps the logits alone, and neither their roundings to fp32 nor their logarithms."""
    logits = [torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    found = []
    for piece in (1 << 23, 7 * 40 + 1):
        monkeypatch.setattr(distill, "PIECE", piece)
        student, teacher = logits[0].bfloat16().requires_grad_(), logits[1].bfloat16()
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = distillation_loss(student, teacher, 2.0)
        loss.mean().backward()
        found.append((loss.detach(), student.grad, sum(kept.values())))
    (whole, gradient, most), (pieces, same_gradient, least) = found
    assert pieces.shape == whole.shape == (3, 5)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(same_gradient, gradient)
    assert least <= 2 * 3 * 5 * 40 * 2 <= most / 2
