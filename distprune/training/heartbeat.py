"""Which ranks are gone, when a collective fails: each rank counts up a number in the store that all can reach.

A backend's own message names an address at best, and only neighbours of a dead rank get it. Where none is gone, a
device or a connection may have failed: another start, perhaps on other nodes, mends that.
"""

import time
from threading import Event, Thread
from types import TracebackType
from typing import Self

import torch
from torch.distributed import DistError

from distprune.dist import World
from distprune.errors import CannotGoOn
from distprune.store import beat, beats_of, connect_store

PERIOD_S = 1.0
PATIENCE_S = 5.0


class Heartbeat:
    """Beats within a ``with``; a collective that fails there names the ranks that are lost.

    Raises:
        CannotGoOn: in place of the RuntimeError of a backend, where ranks do not beat any more, and of the error of a
            device or a connection, where they do.
    """

    def __init__(self, world: World):
        self._world = world
        self._ended = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._world.size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = self._lost() if isinstance(error, RuntimeError) and self._world.size > 1 else []
        self._ended.set()
        if lost:
            who = f"rank {lost[0]} does" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} do"
            here = f"{type(error).__name__} here: {' '.join(str(error).split()):.200}"
            speaker = min(set(range(self._world.size)) - set(lost))
            raise CannotGoOn(f"{who} not answer any more ({here})", speaker == self._world.rank) from error
        if error is not None and is_fault(error):
            raise CannotGoOn(f"rank {self._world.rank}: {error}", speaks=True) from error

    def _beat(self) -> None:
        store, beats = None, 0
        while not self._ended.wait(PERIOD_S):
            beats += 1
            try:
                store = store or connect_store()
                beat(store, self._world.rank, beats)
            except RuntimeError:  # rank 0 is busy, or gone, and the store with it
                store = None

    def _lost(self) -> list[int]:
        """Return the ranks whose number stays as it is."""
        try:
            store = connect_store()
            before = beats_of(store, self._world.size)
            time.sleep(PATIENCE_S)
            after = beats_of(store, self._world.size)
        except RuntimeError:
            return [0]
        return [rank for rank in before if rank != self._world.rank and before[rank] == after[rank]]


def is_fault(error: BaseException) -> bool:
    """Return whether an error is of a device or of a connection, and not of what was computed.

    Memory that NCCL or a pinned buffer does not get is missing at the next start as well.
    """
    if any(text in str(error) for text in ("out of memory", "Failed to CUDA")):
        return False
    if isinstance(error, torch.AcceleratorError):
        return "device-side assert" not in str(error)  # an index out of range
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
