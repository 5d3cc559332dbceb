"""Global magnitude pruning on the slices that each rank owns (paper, guideline 1; GMP with one global threshold).

Where an optimizer step falls on the sparsity ladder, each rank scores its slices of the fp32 weights, all ranks agree
on one exact cut (`select`), and each marks its own slices. From then on, in every step, the marked weights' gradients
are zeroed before DeepSpeed takes the clipping norm, and weights and moments are zeroed right after the optimizer
stepped, before DeepSpeed copies the fp32 weights to the low-precision ones: no weight leaves its rank, and no copy of
a weight is ever unpruned.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate
from math import floor
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.masks import KEPT, PRUNED, apply_mask
from distprune.pruning.select import CHUNK, Cut, magnitude_keys, select_smallest
from distprune.shards import Shard, ShardedParameters


class Pruner:
    """The masks of this rank's slices, a byte a weight, and what keeps the masked weights zero."""

    def __init__(self, parameters: ShardedParameters, optimizer: torch.optim.Optimizer):
        self.parameters = parameters
        self.optimizer = optimizer
        self.masks = [torch.full_like(shard.master, KEPT, dtype=torch.int8) for shard in self.shards]
        ends = list(accumulate(parameters.numel.values(), initial=0))
        self.first_index = dict(zip(parameters.names, ends, strict=False))
        self.total = ends[-1]
        self.masked = 0
        self.threshold = 0.0
        self.carried = True
        """Whether a step has carried the newest masks into the low-precision weights: DeepSpeed may skip one."""
        self._moments_to_zero: set[int] = set()
        optimizer.register_step_post_hook(self._after_optimizer_step)

    @property
    def shards(self) -> list[Shard]:
        """This rank's slices of the prunable weights."""
        return self.parameters.shards

    @property
    def sparsity(self) -> float:
        """Masked over prunable weights, of the whole model."""
        return self.masked / self.total

    @torch.no_grad()
    def prune(self, sparsity: Fraction) -> None:
        """Mask exactly ``floor(sparsity * prunable)`` weights: those masked before, then the smallest.

        Collective: every rank calls it, with the same sparsity. To be called before ``mask_gradients`` and the
        optimizer step that carries the zeros into the low-precision weights.

        Raises:
            UserError: on every rank, where a weight is NaN.
        """
        self._refuse_nan()
        wanted = floor(sparsity * self.total)
        assert wanted >= self.masked, f"the mask may only grow: {wanted} < {self.masked}"
        cut = select_smallest(self._chunks, wanted, self._sum)
        for shard, mask in zip(self.shards, self.masks, strict=True):
            self._extend(mask, shard, cut)
            apply_mask(shard.master, mask)
        self._moments_to_zero = set(range(len(self.shards)))
        self.carried = False
        if wanted > self.masked:
            self.threshold = cut.threshold
        self.masked = wanted
        assert sum(self.count().values()) == wanted, "the mask's count is not the exact one"

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of masked weights, so that they do not count in the clipping norm.

        To be called between the backward pass of an accumulation boundary and ``engine.step()``.
        """
        if self.masked == 0:
            return
        for shard, mask in zip(self.shards, self.masks, strict=True):
            gradient = self.parameters.gradient(shard)
            if gradient is not None:
                apply_mask(gradient, mask)
        self.parameters.gradients_changed(self.shards)

    def count(self) -> dict[str, int]:
        """Return the masked weights of each parameter, over all ranks. Collective: every rank calls it."""
        return self._per_parameter(lambda shard, mask: (mask[shard.owned] == PRUNED).sum())

    def layer_sparsity(self) -> dict[str, float]:
        """Return masked over all weights of each parameter. Collective: every rank calls it."""
        return {name: masked / self.parameters.numel[name] for name, masked in self.count().items()}

    def verify(self) -> None:
        """Assert that every masked weight is +0.0 in the fp32 master, in the low-precision copy and in the moments.

        Collective: every rank calls it, and all of them stop.
        """

        def not_plus_zero(shard: Shard, mask: Tensor) -> Tensor:
            every = (shard.master, shard.low_precision, *shard.moments(self.optimizer))
            pruned = [held[(mask == PRUNED).to(held.device)] for held in every]
            return torch.stack([((values != 0) | torch.signbit(values)).sum().cpu() for values in pruned]).sum()

        back = [name for name, number in self._per_parameter(not_plus_zero).items() if number]
        assert not back, f"pruned weights came back, or are -0.0, in {', '.join(back)}"

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Zero masked weights and moments of the tensors just stepped (DeepSpeed steps them group by group).

        Masked gradients are zero, so moments that were zeroed once after a pruning stay so.
        """
        self.carried = True
        if self.masked == 0:
            return
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for index, (shard, mask) in enumerate(zip(self.shards, self.masks, strict=True)):
            if id(shard.base) not in stepped:
                continue
            apply_mask(shard.master, mask)
            if index in self._moments_to_zero:
                for moment in shard.moments(optimizer):
                    apply_mask(moment, mask)
                self._moments_to_zero.remove(index)

    def _per_parameter(self, count: Callable[[Shard, Tensor], Tensor]) -> dict[str, int]:
        """Return a number of each parameter, summed over its slices. Collective: every rank calls it."""
        place = {name: index for index, name in enumerate(self.parameters.names)}
        counts = torch.zeros(len(place), dtype=torch.int64)
        for shard, mask in zip(self.shards, self.masks, strict=True):
            counts[place[shard.name]] += count(shard, mask).cpu()
        return dict(zip(place, self._sum(counts).tolist(), strict=True))

    def _sum(self, counts: Tensor) -> Tensor:
        """Collective: every rank calls it."""
        summed = counts.to(self.parameters.engine.device)
        torch_dist.all_reduce(summed)
        return summed.to(counts.device)

    def _chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the keys of the weights that this rank owns: 0 where masked before, else by magnitude."""
        for shard, mask in zip(self.shards, self.masks, strict=True):
            weights, kept = shard.master[shard.owned], mask[shard.owned]
            first = self.first_index[shard.name] + shard.own_start
            for start in range(0, weights.numel(), CHUNK):
                piece = slice(start, start + CHUNK)
                keys = magnitude_keys(weights[piece]) & kept[piece]
                yield keys, first + start

    def _extend(self, mask: Tensor, shard: Shard, cut: Cut) -> None:
        first = self.first_index[shard.name] + shard.start
        for start in range(0, mask.numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            keys = magnitude_keys(shard.master[piece]) & mask[piece]
            mask[piece] = torch.where(cut.selects(keys, first + start), PRUNED, KEPT)

    def _refuse_nan(self) -> None:
        """Collective: every rank calls it."""
        nans = self._per_parameter(lambda shard, _: shard.master.isnan().sum())
        name = next((name for name, number in nans.items() if number), None)
        if name is not None:
            raise UserError(f"{name} holds NaN, which has no magnitude to prune by; the learning rate may be too high")
