"""Algorithms over all ranks, written without a rank in sight.

An `Exchange` is a generator: it yields a `Request`, this rank's int64 numbers and how to combine them over the ranks,
and is sent back what came of it. It branches only on its arguments that all ranks share and on what it was sent, so
every rank makes the same requests. `over_ranks` answers them by collectives; a test answers those of a thousand
exchanges in one process.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

T = TypeVar("T")


class Request(NamedTuple):
    """Numbers to be combined, element by element, over all ranks."""

    values: Tensor
    """int64, of the same shape on every rank."""
    operation: Literal["sum", "max"] = "sum"


Exchange = Generator[Request, Tensor, T]

_OPERATIONS = {"sum": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX}


def over_ranks(exchange: Exchange[T], device: torch.device) -> T:
    """Carry an exchange out over the default process group; a process without one is the only rank.

    Collective: every rank calls it.

    Args:
        exchange: of this rank.
        device: where the process group's tensors have to be.
    """
    try:
        request = next(exchange)
        while True:
            combined = request.values.to(device, copy=True)
            if torch_dist.is_initialized():
                torch_dist.all_reduce(combined, op=_OPERATIONS[request.operation])
            request = exchange.send(combined.to(request.values.device))
    except StopIteration as end:
        result: T = end.value
        return result


def summed(values: Tensor) -> Exchange[Tensor]:
    """Return the sums of int64 numbers over all ranks."""
    return (yield Request(values))


def summed_by_name(names: Iterable[str], numbers: Iterable[tuple[str, int]]) -> Exchange[dict[str, int]]:
    """Return the sums over all ranks of numbers of each name.

    Args:
        names: all that there are, the same on every rank.
        numbers: of this rank, some of them to one name and some to none.
    """
    totals = dict.fromkeys(names, 0)
    for name, number in numbers:
        totals[name] += number
    sums = yield from summed(torch.tensor(list(totals.values()), dtype=torch.int64))
    return dict(zip(totals, sums.tolist(), strict=True))


def together(exchanges: Sequence[Exchange[T]]) -> Exchange[list[T]]:
    """Carry several exchanges out in the rounds of the longest one: what they ask for at a time travels together."""
    results: dict[int, T] = {}
    requests: dict[int, Request] = {}

    def advance(number: int, reply: Tensor | None) -> None:
        try:
            requests[number] = next(exchanges[number]) if reply is None else exchanges[number].send(reply)
        except StopIteration as end:
            requests.pop(number, None)
            results[number] = end.value

    for number in range(len(exchanges)):
        advance(number, None)
    while requests:
        operation = next(iter(requests.values())).operation
        asked = {number: each for number, each in requests.items() if each.operation == operation}
        flat = torch.cat([each.values.flatten() for each in asked.values()])
        combined, start = (yield Request(flat, operation)), 0
        for number, each in asked.items():
            advance(number, combined[start : start + each.values.numel()].view(each.values.shape))
            start += each.values.numel()
    return [results[number] for number in range(len(exchanges))]
