"""What a rank holds from step to step: weights, fp32 master, moments and masks, exactly."""

from collections.abc import Iterator
from itertools import accumulate

import torch

from distprune.planning.shapes import Layout, Shapes

MASTER, MOMENTS, STEP_COUNT = 4, 8, 4
"""Bytes of a weight's fp32 copy and of its two moments, and of AdamW's count of steps for each tensor."""


def weight_bytes(shapes: Shapes, layout: Layout) -> int:
    """Return the bytes of the weights that the forward pass reads, before ZeRO-3 gathers any."""
    sizes = map(layout.piece, shapes.sizes) if layout.stage == 3 else shapes.sizes
    return sum(sizes) * layout.width


def state_bytes(shapes: Shapes, layout: Layout) -> dict[str, int]:
    """Return the bytes of the ``master`` where it is apart from the weights, and of the ``moments``."""
    sizes = stepped(shapes, layout)
    is_weight = layout.stage == 0 and layout.dtype == torch.float32
    return {
        "master": 0 if is_weight else sum(sizes) * MASTER,
        "moments": sum(sizes) * MOMENTS + len(sizes) * STEP_COUNT,
    }


def stepped(shapes: Shapes, layout: Layout) -> list[int]:
    """Return the elements of each tensor that the optimizer steps on a rank, padding included."""
    if layout.stage == 0:
        return shapes.trained
    if layout.stage < 3:
        return [layout.partition(group) for group in shapes.groups]
    return [sum(map(layout.piece, group.values())) for group in sub_groups(shapes, layout)]


def sub_groups(shapes: Shapes, layout: Layout) -> Iterator[dict[str, int]]:
    """Yield the parameters that ZeRO-3 updates at once: cut after the one that fills a sub-group."""
    for group in shapes.groups:
        part: dict[str, int] = {}
        for name, size in group.items():
            part[name] = size
            if sum(map(layout.piece, part.values())) >= layout.sub_group:
                yield part
                part = {}
        if part:
            yield part


def mask_bytes(shapes: Shapes, layout: Layout) -> int:
    """Return the bytes of the masks on the rank that holds most: a byte from the first prunable weight to the last."""
    if layout.stage == 0:
        return sum(size for group in shapes.groups for name, size in group.items() if name in shapes.prunable)
    ranks = range(layout.world)
    if layout.stage < 3:
        return max(sum(_span(_overlaps(group, shapes, layout, rank)) for group in shapes.groups) for rank in ranks)
    groups = list(sub_groups(shapes, layout))
    return max(sum(_span(_pieces(group, shapes, layout, rank)) for group in groups) for rank in ranks)


def reduced(shapes: Shapes, layout: Layout) -> int:
    """Return the gradients that a rank keeps at stages 1 and 2: of parameters whole, also where it owns a part."""
    ranks = range(layout.world)
    return max(
        sum(
            size
            for group in shapes.groups
            for size, _, _ in _places(group, layout.partition(group) * rank, layout.partition(group))
        )
        for rank in ranks
    )


def _places(group: dict[str, int], start: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield size, begin and end, within a partition, of the parameters that overlap it."""
    for size, end in zip(group.values(), accumulate(group.values()), strict=True):
        if end > start and end - size < start + length:
            yield size, max(end - size - start, 0), min(end - start, length)


def _overlaps(group: dict[str, int], shapes: Shapes, layout: Layout, rank: int) -> list[tuple[int, int]]:
    length = layout.partition(group)
    begins = zip(group, accumulate(group.values(), initial=0), strict=False)
    found = [
        (begin - rank * length, begin + group[name] - rank * length)
        for name, begin in begins
        if name in shapes.prunable
    ]
    return [(max(begin, 0), min(end, length)) for begin, end in found if end > 0 and begin < length]


def _pieces(group: dict[str, int], shapes: Shapes, layout: Layout, rank: int) -> list[tuple[int, int]]:
    begins = zip(group, accumulate(map(layout.piece, group.values()), initial=0), strict=False)
    found = []
    for name, begin in begins:
        held = min(layout.piece(group[name]), group[name] - layout.piece(group[name]) * rank)
        if name in shapes.prunable and held > 0:
            found.append((begin, begin + held))
    return found


def _span(places: list[tuple[int, int]]) -> int:
    return max(end for _, end in places) - min(begin for begin, _ in places) if places else 0
