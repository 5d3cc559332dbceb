"""Ranks in one process: their exchanges are advanced in lockstep, and what they ask for is combined here."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from distprune.pruning.exchange import Exchange, Request

T = TypeVar("T")


class _End(NamedTuple):
    result: object


def answer(exchanges: Sequence[Exchange[T]]) -> tuple[list[T], int]:
    """Carry out the exchanges of all ranks, which must ask for the same at every round, and end in the same one.

    Args:
        exchanges: one of each rank.

    Returns:
        What each came to, and the bytes that each rank handed over.
    """
    replies: list[Tensor | None] = [None] * len(exchanges)
    sent = 0
    while True:
        steps = [_advance(each, reply) for each, reply in zip(exchanges, replies, strict=True)]
        ends = [step.result for step in steps if isinstance(step, _End)]
        if ends:
            assert len(ends) == len(exchanges), f"{len(ends)} of {len(exchanges)} ranks ended before the others"
            return ends, sent  # type: ignore[return-value]
        combined = _combine([step for step in steps if isinstance(step, Request)])
        sent += 8 * combined.numel()
        replies = [combined.clone() for _ in exchanges]


def _advance(exchange: Exchange[T], reply: Tensor | None) -> Request | _End:
    try:
        return next(exchange) if reply is None else exchange.send(reply)
    except StopIteration as end:
        return _End(end.value)


def _combine(requests: list[Request]) -> Tensor:
    kinds = {(each.operation, each.values.dtype, tuple(each.values.shape)) for each in requests}
    assert len(kinds) == 1, f"the ranks ask for different things: {kinds}"
    ((operation, dtype, _),) = kinds
    assert dtype == torch.int64
    values = torch.stack([each.values for each in requests])
    return values.sum(0) if operation == "sum" else values.amax(0)
