"""What autograd keeps of the weights that ZeRO-3 gathers for a forward pass."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _View(NamedTuple):
    """Where a view lies in a parameter that is there whenever DeepSpeed has gathered it."""

    parameter: Tensor
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def look_up_gathered_weights(model: nn.Module) -> None:
    """Have a ZeRO-3 model's backward pass read each weight where DeepSpeed gathers it for that pass.

    A linear layer saves a view of its weight, whose storage would outlive DeepSpeed's release of the weight: behind the
    forward pass, all of the model would be in the memory of every rank. DeepSpeed's own remedy,
    ``memory_efficient_linear``, replaces torch's function in the whole process.

    Args:
        model: of an engine, without that option.
    """
    hooks = saved_tensors_hooks(_pack, _unpack)
    model.register_forward_pre_hook(lambda *_: hooks.__enter__())
    model.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True)


def _pack(saved: Tensor) -> Tensor | _View:
    whole = saved._base if saved._base is not None else saved
    if not hasattr(whole, "ds_id"):
        return saved.detach()  # an output that held itself would never be freed
    if whole is saved:
        return saved
    return _View(whole, saved.size(), saved.stride(), int(saved.storage_offset() - whole.storage_offset()))


def _unpack(packed: Tensor | _View) -> Tensor:
    if isinstance(packed, _View):
        weight = packed.parameter.detach()
        return weight.as_strided(packed.size, packed.stride, weight.storage_offset() + packed.offset)
    return packed
