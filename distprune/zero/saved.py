"""What autograd keeps of the weights that ZeRO-3 gathers for a forward pass."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Kept(NamedTuple):
    """A tensor, and what its version has to be still: torch does not look where hooks have packed it."""

    tensor: Tensor
    version: int


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
    model.register_forward_pre_hook(lambda *_: hooks.__enter__(), prepend=True)
    model.register_forward_hook(lambda *_: hooks.__exit__(), always_call=True)


def _pack(saved: Tensor) -> Tensor | _Kept | _View:
    if hasattr(saved, "ds_id"):
        return saved
    whole = saved._base
    if whole is None or not hasattr(whole, "ds_id") or whole.numel() == 0:  # released, and the view outlived that
        return _Kept(saved.detach(), saved._version)  # an output that held itself would never be freed
    return _View(whole, saved.size(), saved.stride(), int(saved.storage_offset() - whole.storage_offset()))


def _unpack(packed: Tensor | _Kept | _View) -> Tensor:
    if isinstance(packed, _Kept):
        if packed.tensor._version != packed.version:
            what = f"a tensor of shape {list(packed.tensor.shape)} that the backward pass needs"
            raise RuntimeError(f"{what} was modified by an inplace operation")
        return packed.tensor
    if isinstance(packed, _View):
        weight = packed.parameter.detach()
        return weight.as_strided(packed.size, packed.stride, weight.storage_offset() + packed.offset)
    return packed
