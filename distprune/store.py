"""What ranks tell each other through the rendezvous store, where a collective would wait too short a time."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from itertools import count

import torch.distributed as torch_dist
from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]

from distprune import dist

SILENCE_S = 300.0
"""How long a rank's heart may stand still, where it beats, before those who wait for it give up."""
_SLICE = timedelta(seconds=10)
_turns = count()


def connect_store() -> TCPStore:
    """Return a connection of this rank's own to the store of all: one that waits there keeps nobody else waiting."""
    return TCPStore(*_place(), is_master=False, timeout=timedelta(seconds=10))


def _place() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@lru_cache(maxsize=1)
def _connected(place: tuple[str, int]) -> TCPStore:
    """Return the connection for turns: where names are looked up slowly, a new one takes seconds now and then."""
    return connect_store()


def beat(store: TCPStore, rank: int, beats: int) -> None:
    """Tell the others that a rank is alive, by a number that it counts up."""
    store.set(_heart(rank), str(beats))


def _heart(rank: int) -> str:
    return f"heartbeat/{rank}"


def beats_of(store: TCPStore, size: int) -> dict[int, bytes]:
    """Return the numbers of those ranks that have one."""
    return {rank: store.get(_heart(rank)) for rank in range(size) if store.check([_heart(rank)])}


@contextmanager
def local_first() -> Iterator[None]:
    """Let local rank 0 of each node go first, so that the others find its cache. Collective: every rank calls it.

    They wait in the store, and so do all for the slowest node in the end, not in a collective, whose time is limited:
    data may take hours to tokenise.

    Raises:
        RuntimeError: where a rank that is waited for is silent.
    """
    if not torch_dist.is_initialized():
        yield
        return
    number, first = next(_turns), dist.detect().local_rank == 0
    turn, met = f"local_first/{number}/{socket.gethostname()}", f"local_first/{number}/met"
    if not first:
        _wait_for(turn)
    failed = None
    try:
        yield
    except Exception as error:  # not an interrupt: the others may be gone, and not come to meet this rank
        failed = error
    if first:
        _connected(_place()).set(turn, "done")
    _meet(met)
    if failed is not None:
        raise failed


def _meet(key: str) -> None:
    """Wait until every rank is here. Collective: every rank calls it."""
    store = _connected(_place())
    if store.add(f"{key}/ranks", 1) == dist.detect().size:
        store.set(key, "all")
    _wait_for(key)


def _wait_for(key: str) -> None:
    """Wait for a key under no time limit, as long as no rank falls silent; signals are handled in between."""
    store, seen = _connected(_place()), dict[int, tuple[bytes, float]]()
    hearts = [_heart(rank) for rank in range(dist.detect().size)]
    while True:
        try:
            store.wait([key], _SLICE)
        except DistStoreError:
            now = time.monotonic()
            # Two requests for all ranks, as all ranks make them; hearts beat while a run trains, and all of them.
            for rank, number in enumerate(store.multi_get(hearts) if store.check(hearts) else ()):
                if rank not in seen or seen[rank][0] != number:
                    seen[rank] = number, now
                elif now - seen[rank][1] > SILENCE_S:
                    raise RuntimeError(f"rank {rank} has been silent for {SILENCE_S:.0f} s") from None
        else:
            return
