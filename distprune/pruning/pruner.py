"""Pruning on the slices that each rank owns (paper, guideline 1; GMP with one global threshold).

Where an optimizer step falls on the sparsity ladder, each rank scores its slices of the fp32 weights, all ranks agree
on what goes (`structure`, `select`), and each marks its own slices. From then on, in every step, the marked weights'
gradients are zeroed before DeepSpeed takes the clipping norm, and weights and moments are zeroed right after the
optimizer stepped, before DeepSpeed copies the fp32 weights to the low-precision ones: no weight leaves its rank, and no
copy of a weight is ever unpruned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from distprune.errors import UserError
from distprune.pruning.exchange import over_ranks, summed_by_name
from distprune.pruning.masks import KEPT, PRUNED, apply_mask, count_pruned, is_masked
from distprune.pruning.regrowth import regrow
from distprune.pruning.scores import Score
from distprune.pruning.slices import Slice
from distprune.pruning.structures import Structure
from distprune.zero.shards import Shard, ShardedParameters


@dataclass(frozen=True)
class FlatMask:
    """The mask of the part of a tensor that the optimizer steps which holds the prunable weights, others kept."""

    base: Tensor
    start: int
    mask: Tensor

    @property
    def master(self) -> Tensor:
        """The fp32 weights under the mask."""
        return self.base.data.view(-1)[self.start : self.start + self.mask.numel()]

    def of(self, shard: Shard) -> Tensor:
        """Return a shard's piece of the mask."""
        first = shard.offset - self.start
        return self.mask[first : first + shard.end - shard.start]


class Pruner:
    """The masks of this rank's slices, a byte a weight, and what keeps the masked weights zero."""

    def __init__(
        self,
        parameters: ShardedParameters,
        optimizer: torch.optim.Optimizer,
        structure: Structure,
        score: Score,
        other_weights: Callable[[str], Tensor] | None = None,
        regrows: bool = False,
    ):
        """Take charge of the weights to prune.

        Args:
            parameters: the weights to prune, as this rank holds them.
            optimizer: steps them.
            structure: what goes together.
            score: what goes first.
            other_weights: gives the fp32 weights, flat, whole and anew each time, that are scored in place of the
                parameter of that name.
            regrows: whether a regrowth will be asked for, which reads gradients.
        """
        self.parameters, self.optimizer = parameters, optimizer
        self.structure, self.score, self.other_weights = structure, score, other_weights
        self._reads_gradients = score.needs_gradient or regrows
        self.flat_masks = _flat_masks(parameters.shards)
        self.slices = self._slices()
        self.total = sum(parameters.numel.values())
        self.masked_of = dict.fromkeys(parameters.names, 0)
        """How many weights of each parameter are masked, over all ranks."""
        self.sparsity_asked = Fraction(0)
        self.threshold = 0.0
        self.carried = True
        """Whether a step has carried the newest masks into the low-precision weights: DeepSpeed may skip one."""
        self._started_sparse = False
        self._moments_to_zero: set[int] = set()
        self._hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    @property
    def shards(self) -> list[Shard]:
        """This rank's slices of the prunable weights."""
        return self.parameters.shards

    @property
    def masked(self) -> int:
        """Masked weights of the whole model."""
        return sum(self.masked_of.values())

    @property
    def sparsity(self) -> float:
        """Masked over prunable weights, of the whole model."""
        return self.masked / self.total

    @property
    def layer_sparsity(self) -> dict[str, float]:
        """Masked over all weights of each parameter."""
        return {name: masked / self.parameters.numel[name] for name, masked in self.masked_of.items()}

    @torch.no_grad()
    def adopt_zeros(self) -> None:
        """Take the weights that are zero for pruned: a model that is sparse already stays so.

        Collective: every rank calls it, before the first step.
        """
        for each in self.slices:
            each.mask.copy_(torch.where(each.weights() == 0, PRUNED, KEPT))
            if each.removed is not None:
                each.removed.copy_(torch.where(each.mask == PRUNED, torch.nan, 0.0))
        self._mask_weights()
        self._count()
        self._started_sparse = self.masked > 0
        self.carried = not self.masked  # the copies may hold -0.0

    @torch.no_grad()
    def after_backward(self, sparsity: Fraction | None = None, regrown: float | None = None) -> None:
        """Score, prune where a sparsity is due, and keep masked gradients out of the step and of its clipping norm.

        Where ``regrown``, a part of the kept weights, is due, so many change places with pruned ones (`regrowth`).
        Collective: every rank calls it, with the same numbers, between the backward pass of an accumulation boundary
        and ``engine.step()``, which carries new zeros into the low-precision weights.

        Raises:
            UserError: on every rank, where a score is NaN.
        """
        if self.score.accumulates:
            for part in (part for each in self.slices for part in each.held()):
                self.score.observe(part)
        if sparsity is not None:
            self.prune(sparsity)
        if regrown is not None and self.masked:
            over_ranks(regrow(self.slices, self.parameters.numel, self.masked_of, regrown), self._device)
            before = self.masked_of
            self._mask_weights()
            self._masks_changed()
            assert self.masked_of == before, "a regrowth changed how many are masked"
        if self.masked:
            self._mask_gradients()

    @torch.no_grad()
    def learn(self) -> None:
        """Let the score know the gradients of a batch that were taken for it alone, and drop them.

        Collective: every rank calls it after a backward pass, and neither after_backward nor a step follows.
        """
        if self.masked:
            self._mask_gradients()
        gradients = [self.parameters.gradient(shard) for shard in self.shards]
        over_ranks(self.score.learn(self.slices, gradients), self._device)
        self.parameters.drop_gradients()

    @torch.no_grad()
    def prune(self, sparsity: Fraction) -> None:
        """Mask what the structure has at a sparsity: unstructured exactly ``floor(sparsity * prunable)`` weights.

        Those masked before stay so, unless the score lets them come back: then it chooses among all. Collective:
        every rank calls it, with the same sparsity.

        Raises:
            UserError: on every rank, where a score is NaN.
        """
        assert sparsity >= self.sparsity_asked, f"the mask may only grow: {sparsity} < {self.sparsity_asked}"
        before = self.masked
        if self.score.comes_back:
            for each in self.slices:
                each.bring_back()
            self._count()
        over_ranks(self.score.prepare(self.slices, self.parameters.numel), self._device)
        choosing = self.structure.choose(self.slices, self.score, sparsity, self.masked_of)
        choice = over_ranks(choosing, self._device)
        nans = self._per_parameter([choice.mark(each) for each in self.slices])
        for name in (name for name, number in nans.items() if number):
            raise UserError(
                f"{name} has scores of {type(self.score).__name__} that are NaN, which have no place in an order; "
                "where the weights are too, the learning rate may be too high"
            )
        over_ranks(self.score.compensate(self.slices), self._device)
        for each in self.slices:
            each.forget_kept()
        self._mask_weights()
        self._masks_changed()
        wanted = self.structure.masked_at(sparsity)
        assert self.masked == wanted or (self._started_sparse and self.masked > wanted), (
            "not the exact number is masked"
        )
        self.sparsity_asked = sparsity
        if self.masked > before or self.score.comes_back:
            self.threshold = choice.threshold

    def detach(self) -> None:
        """Let go of the optimizer: later steps are those of a dense model."""
        self._hook.remove()

    def verify(self) -> None:
        """Assert that every masked weight is +0.0 in the fp32 master, in the low-precision copy and in the moments.

        Collective: every rank calls it, and all of them stop.
        """
        mine = set(self.unmasked())
        numbers = [int(shard.name in mine) for shard in self.shards]
        back = [name for name, number in self._per_parameter(numbers).items() if number]
        assert not back, came_back(back)

    def unmasked(self) -> list[str]:
        """Return the parameters of which this rank holds a masked weight that is not +0.0, wherever it holds it.

        Nothing is missing only once a step has carried the newest masks (``carried``).
        """

        def holds(shard: Shard, mask: Tensor) -> bool:
            every = (shard.master, shard.low_precision, *shard.moments(self.optimizer).values())
            return all(is_masked(held, mask.to(held.device)) for held in every)

        return [shard.name for shard, each in zip(self.shards, self.slices, strict=True) if not holds(shard, each.mask)]

    def state(self) -> dict[str, Any]:
        """Return what is to be saved beside masks and scores, for JSON."""
        return {
            "sparsity_asked": str(self.sparsity_asked),
            "threshold": self.threshold,
            "carried": self.carried,
            "started_sparse": self._started_sparse,
            "masked_of": self.masked_of,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, with masks and scores in place. Collective: every rank calls it."""
        self._count()
        assert self.masked_of == state["masked_of"], "the masks are not those that were saved"
        self.sparsity_asked = Fraction(state["sparsity_asked"])
        self.threshold, self.carried = state["threshold"], state["carried"]
        self._started_sparse = state["started_sparse"]
        self._moments_to_zero = set(range(len(self.flat_masks)))

    def _mask_weights(self) -> None:
        for flat in self.flat_masks:
            apply_mask(flat.master, flat.mask)

    def _mask_gradients(self) -> None:
        for shard, each in zip(self.shards, self.slices, strict=True):
            gradient = self.parameters.gradient(shard)
            if gradient is not None:
                apply_mask(gradient, each.mask)
        self.parameters.gradients_changed(self.shards)

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Zero masked weights and moments of the tensors just stepped (DeepSpeed steps them group by group).

        Masked gradients are zero, so moments that were zeroed once after a pruning stay so.
        """
        self.carried = True
        if not self.masked:
            return
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for index, flat in enumerate(self.flat_masks):
            if id(flat.base) not in stepped:
                continue
            apply_mask(flat.master, flat.mask)
            if index in self._moments_to_zero:
                for shard, each in zip(self.shards, self.slices, strict=True):
                    for moment in shard.moments(optimizer).values() if shard.base is flat.base else ():
                        apply_mask(moment, each.mask)
                self._moments_to_zero.remove(index)

    def _masks_changed(self) -> None:
        """Count the masked weights, whose copies the next step has to carry. Collective: every rank calls it."""
        self._count()
        self._moments_to_zero = set(range(len(self.flat_masks)))
        self.carried = False

    def _count(self) -> None:
        """Count the masked weights. Collective: every rank calls it."""
        owned = [each.mask[shard.owned] for shard, each in zip(self.shards, self.slices, strict=True)]
        self.masked_of = self._per_parameter([count_pruned(mask) for mask in owned])

    def _per_parameter(self, numbers: list[int]) -> dict[str, int]:
        """Return the sums, over all ranks, of a number of each slice. Collective: every rank calls it."""
        of_shards = zip((shard.name for shard in self.shards), numbers, strict=True)
        return over_ranks(summed_by_name(self.parameters.names, of_shards), self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.parameters.engine.device
        return device

    def _slices(self) -> list[Slice]:
        names, numel = self.parameters.names, self.parameters.numel
        first_index = dict(zip(names, accumulate((numel[name] for name in names), initial=0), strict=False))

        def weights(shard: Shard) -> Tensor:
            if self.other_weights is None:
                return shard.master
            return self.other_weights(shard.name)[shard.start : shard.end].to(shard.master.device)

        def of(shard: Shard, mask: Tensor) -> Slice:
            return Slice(
                shard.name,
                shard.start,
                shard.end,
                shard.own_start,
                shard.own_end,
                first_index=first_index[shard.name],
                mask=mask,
                weights=lambda: weights(shard),
                gradient=lambda: self.parameters.gradient(shard) if self._reads_gradients else None,
                state=torch.zeros_like(shard.master) if self.score.accumulates else None,
                removed=torch.zeros_like(shard.master) if self.score.comes_back else None,
            )

        by_base = {id(flat.base): flat for flat in self.flat_masks}
        return [of(shard, by_base[id(shard.base)].of(shard)) for shard in self.shards]


def came_back(names: list[str]) -> str:
    """Return the sentence for masked weights that are not +0.0."""
    return f"pruned weights came back, or are -0.0, in {', '.join(names)}"


def _flat_masks(shards: list[Shard]) -> list[FlatMask]:
    """Return masks that keep everything, one for each tensor that the optimizer steps."""
    of_base: dict[int, list[Shard]] = {}
    for shard in shards:
        of_base.setdefault(id(shard.base), []).append(shard)
    flat = []
    for each in of_base.values():
        start = min(shard.offset for shard in each)
        length = max(shard.offset + shard.end - shard.start for shard in each) - start
        base = each[0].base
        flat.append(FlatMask(base, start, torch.full((length,), KEPT, dtype=torch.int8, device=base.device)))
    return flat
