"""One pruning of weights in memory: time, memory and wire, beside one read of the weights and torch's own ways."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import cycle
from math import floor, prod
from typing import Any

import torch
from torch import Tensor

from distprune import dist
from distprune.pruning.exchange import Exchange, Request, T, over_ranks, summed_by_name
from distprune.pruning.masks import KEPT, apply_mask, count_pruned
from distprune.pruning.scores import Magnitude
from distprune.pruning.slices import Slice
from distprune.pruning.structures.unstructured import Unstructured
from distprune.timing import fastest, peak_bytes, seconds

FIRST, SECOND = Fraction(4, 5), Fraction(17, 20)
_MATRICES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]


@dataclass(frozen=True)
class Selection:
    """What prunings of so many weights took, on the slowest rank; times in seconds, the fastest of several."""

    weights: int
    dtype: str
    device: str
    ranks: int
    threads: int
    read: float
    """One streaming sum of a rank's weights."""
    first: float
    """From dense to 80 %: selection, mask and weights."""
    next: float
    """From 80 % to 85 %."""
    kthvalue: float | None
    """torch.kthvalue of the magnitudes, without a mask."""
    topk: float | None
    """torch.topk of the magnitudes, without a mask."""
    passes: int
    """Reads of the weights in a pruning; two of them read a sample."""
    collectives: int
    wire_bytes: int
    """Handed to collectives by one rank in a pruning."""
    extra_bytes: int | None
    """Peak memory of a pruning beyond weights and mask."""

    @property
    def ratios(self) -> dict[str, float]:
        """Times over one read of the weights."""
        times = {"first": self.first, "next": self.next, "kthvalue": self.kthvalue, "topk": self.topk}
        return {name: time / self.read for name, time in times.items() if time is not None}

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self) | {"ratios": self.ratios}


class Weights:
    """This rank's part of random matrices of BERT-base's shapes, with their mask, and what pruning them asks for."""

    def __init__(self, total: int, dtype: torch.dtype, device: torch.device):
        world = dist.detect()
        self.device, self.sizes = device, _sizes(total)
        self.first, last = total * world.rank // world.size, total * (world.rank + 1) // world.size
        generator = torch.Generator(device).manual_seed(world.rank)
        drawn = torch.randn(last - self.first, device=device, generator=generator).mul_(0.02)
        self.dense = drawn.to(dtype).float()
        self.weights = self.dense.clone()
        self.mask = torch.full((last - self.first,), KEPT, dtype=torch.int8, device=device)
        self.slices = list(self._slices())
        self.structure = Unstructured([self.sizes])
        self.reads = self.collectives = self.wire_bytes = 0

    def _slices(self) -> Iterator[Slice]:
        start = 0
        for name, size in self.sizes.items():
            begin, end = max(start, self.first), min(start + size, self.first + self.mask.numel())
            if begin < end:
                bounds = (begin - start, end - start)
                piece = slice(begin - self.first, end - self.first)
                yield Slice(name, *bounds, *bounds, start, self.mask[piece], self._reader(piece))
            start += size

    def _reader(self, piece: slice) -> Callable[[], Tensor]:
        def read() -> Tensor:
            self.reads += 1
            return self.weights[piece]

        return read

    def reset(self) -> None:
        """Make the weights dense, and forget what was counted."""
        self.weights.copy_(self.dense)
        self.mask.fill_(KEPT)
        self.reads = self.collectives = self.wire_bytes = 0

    def prune(self, sparsity: Fraction, masked: dict[str, int]) -> dict[str, int]:
        """Prune as a run does; return how much of each matrix is masked. Collective: every rank calls it."""
        choosing = self.structure.choose(self.slices, Magnitude(), sparsity, masked)
        choice = over_ranks(self._counted(choosing), self.device)
        for each in self.slices:
            assert choice.mark(each) == 0, "no weight is NaN"
            apply_mask(each.weights(), each.mask)
        mine = ((each.name, count_pruned(each.mask)) for each in self.slices)
        return over_ranks(self._counted(summed_by_name(self.sizes, mine)), self.device)

    def _counted(self, exchange: Exchange[T]) -> Exchange[T]:
        """Count the requests of an exchange, and their bytes."""

        def count(request: Request) -> Request:
            self.collectives += 1
            self.wire_bytes += request.values.numel() * request.values.element_size()
            return request

        try:
            request = next(exchange)
            while True:
                request = exchange.send((yield count(request)))
        except StopIteration as end:
            result: T = end.value
            return result


def measure(total: int, dtype: torch.dtype, device: torch.device, repeat: int, against_torch: bool) -> Selection:
    """Measure a pruning to 80 %, and one from there to 85 %. Collective: every rank calls it.

    Args:
        total: weights over all ranks.
        dtype: that the weights are rounded to; bf16 makes many of them equal.
        device: of this rank.
        repeat: how often; the fastest counts.
        against_torch: whether to time ``kthvalue`` and ``topk`` on this rank's weights too.
    """
    data = Weights(total, dtype, device)
    dense = dict.fromkeys(data.sizes, 0)
    extra = peak_bytes(lambda: data.prune(FIRST, dense), device)
    firsts: list[float] = []
    nexts: list[float] = []
    for _ in range(repeat):
        data.reset()
        firsts.append(seconds(lambda: data.prune(FIRST, dense), device))
        counted = data.reads // max(1, len(data.slices)), data.collectives, data.wire_bytes
        masked = data.prune(FIRST, dense)
        assert sum(masked.values()) == floor(FIRST * total), "the mask is not exact"
        nexts.append(seconds(partial(data.prune, SECOND, masked), device))
    read, first, further = _slowest([fastest(data.weights.sum, device, 2 * repeat), min(firsts), min(nexts)])
    scores, k = data.dense.abs(), floor(FIRST * data.mask.numel())
    return Selection(
        weights=total,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        ranks=dist.detect().size,
        threads=torch.get_num_threads(),
        read=read,
        first=first,
        next=further,
        kthvalue=fastest(lambda: torch.kthvalue(scores, k), device, 1) if against_torch else None,
        topk=seconds(lambda: torch.topk(scores, k, largest=False), device) if against_torch else None,
        passes=counted[0],
        collectives=counted[1],
        wire_bytes=counted[2],
        extra_bytes=extra,
    )


def _slowest(times: list[float]) -> list[float]:
    """Return the longest time of any rank, each. Collective: every rank calls it."""
    return [max(each) for each in zip(*dist.gather([times]), strict=True)]


def _sizes(total: int) -> dict[str, int]:
    """Return sizes of matrices that come to a total, the last cut short."""
    sizes: dict[str, int] = {}
    left = total
    for number, shape in enumerate(cycle(_MATRICES)):
        if left == 0:
            return sizes
        sizes[f"matrix.{number}"] = min(left, prod(shape))
        left -= sizes[f"matrix.{number}"]
    raise AssertionError("a cycle does not end")
