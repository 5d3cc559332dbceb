"""Packing what autograd saves, with weights that are gathered and released by hand."""

import pytest
import torch
from torch import Tensor, nn

from distprune.zero.saved import look_up_gathered_weights


class Layer(nn.Module):
    """A linear layer as ZeRO-3 holds it."""

    def __init__(self, at: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))
        self.weight.ds_id = 0
        self.gather(at)
        look_up_gathered_weights(self)

    def gather(self, at: int) -> None:
        """Put the weight into a larger buffer, from one place on."""
        buffer = torch.zeros(at + 12)
        buffer[at:] = torch.arange(12.0)
        self.weight.data = buffer[at:].view(3, 4)

    def release(self) -> None:
        self.weight.data = torch.empty(0)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight).exp()


def test_a_weight_is_found_wherever_it_is_gathered_again() -> None:
    layer, inputs = Layer(at=5), torch.full((2, 4), 0.01, requires_grad=True)
    loss = layer(inputs).sum()
    layer.release()
    layer.gather(at=3)
    loss.backward()
    found, inputs.grad = inputs.grad, None
    nn.functional.linear(inputs, torch.arange(12.0).view(3, 4)).exp().sum().backward()
    assert torch.equal(found, inputs.grad)


def test_a_tensor_that_is_changed_before_it_is_needed_is_refused() -> None:
    """As torch does, which does not look at what hooks have packed."""
    outputs = Layer()(torch.ones(2, 4))
    outputs.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \[2, 3\] that the backward pass needs was modified by an inplace"):
        outputs.sum().backward()


def test_a_view_that_outlives_the_release_of_its_weight_is_kept() -> None:
    class Late(Layer):
        def forward(self, inputs: Tensor) -> Tensor:
            view = self.weight.t()
            self.release()
            return inputs @ view

    layer, inputs = Late().requires_grad_(False), torch.ones(2, 4, requires_grad=True)
    layer(inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.arange(12.0).view(3, 4).sum(0).expand(2, 4))


def test_a_model_that_fails_leaves_nothing_behind() -> None:
    layer = Layer()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, 3))
    layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(torch.ones(2, 4))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda packed: packed):
        torch.ones(2, requires_grad=True).exp()
    assert seen
