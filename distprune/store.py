"""What ranks tell each other through the rendezvous store, where a collective would wait too short a time."""

import os
import time
from datetime import timedelta
from functools import lru_cache

from torch.distributed import TCPStore  # type: ignore[attr-defined]

SILENCE_S = 300.0
"""How long a rank's heart may stand still, where it beats, before those who wait for it give up."""
_LOOK_S = 10.0
"""Time between looks at the hearts of those who are waited for."""
_PAUSE_S = 0.25


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


def tell(key: str) -> None:
    """Let those go on who wait for a key."""
    _connected(_place()).set(key, "done")


def meet(key: str, size: int) -> None:
    """Wait until every one of ``size`` ranks is here. Collective: every rank calls it."""
    if _connected(_place()).add(f"{key}/ranks", 1) == size:
        tell(key)
    wait_for(key, size)


def wait_for(key: str, size: int) -> None:
    """Wait for a key under no time limit, as long as no rank falls silent; signals are handled in between.

    Args:
        key: that another rank will `tell`.
        size: ranks in the world.

    Raises:
        RuntimeError: a rank has been silent for too long.
    """
    store, hearts = _connected(_place()), [_heart(rank) for rank in range(size)]
    seen = dict[int, tuple[bytes, float]]()
    pause, looked = 0.001, time.monotonic()
    while not store.check([key]):  # store.wait would have torch print two lines at the end of each of its times
        time.sleep(pause)
        pause, now = min(2 * pause, _PAUSE_S), time.monotonic()
        if now - looked < _LOOK_S:
            continue
        looked = now
        # Two requests for all ranks, as all ranks make them; hearts beat while a run trains, and all of them.
        for rank, number in enumerate(store.multi_get(hearts) if store.check(hearts) else ()):
            if rank not in seen or seen[rank][0] != number:
                seen[rank] = number, now
            elif now - seen[rank][1] > SILENCE_S:
                raise RuntimeError(f"rank {rank} has been silent for {SILENCE_S:.0f} s")
