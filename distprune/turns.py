"""One rank at work while the others wait for it: in the store, not in a collective, whose time is limited.

Data may take hours to tokenise, and a model of hundreds of gigabytes as long to be read back.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch.distributed as torch_dist

from distprune import dist
from distprune.errors import written
from distprune.store import meet, tell, wait_for

T = TypeVar("T")
_turns = count()


@contextmanager
def local_first() -> Iterator[None]:
    """Let local rank 0 of each node go first, so that the others find its cache. Collective: every rank calls it.

    In the end all wait for the slowest node.

    Raises:
        RuntimeError: where a rank that is waited for is silent.
    """
    if not torch_dist.is_initialized():
        yield
        return
    world, number = dist.detect(), next(_turns)
    turn, met = f"local_first/{number}/{socket.gethostname()}", f"local_first/{number}/met"
    if world.local_rank != 0:
        wait_for(turn, world.size)
    failed = None
    try:
        yield
    except Exception as error:  # not an interrupt: the others may be gone, and not come to meet this rank
        failed = error
    if world.local_rank == 0:
        tell(turn)
    meet(met, world.size)
    if failed is not None:
        raise failed


def on_main(action: Callable[[], T]) -> T:
    """Return on every rank what ``action`` returns on rank 0, something small. Collective: every rank calls it.

    Raises:
        UserError: on every rank, where ``action`` does.
        RuntimeError: on the others, where rank 0 is silent.
    """
    box = [_main_alone(action)]
    if torch_dist.is_initialized():
        torch_dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def write_on_main(action: Callable[[], object], target: Path) -> None:
    """Let rank 0 write something; where it cannot, fail on all. Collective: every rank calls it.

    Raises:
        UserError: on every rank, where the target cannot be written (a full disk, missing rights).
        RuntimeError: on the others, where rank 0 is silent.
    """

    def write() -> None:
        with written(target):
            action()

    _main_alone(write)


def _main_alone(action: Callable[[], T]) -> T | None:
    """Return what ``action`` returns on rank 0; the others wait until it has ended, and return None."""
    world = dist.detect()
    turn = f"main_alone/{next(_turns)}"
    others_wait = torch_dist.is_initialized() and world.size > 1
    if others_wait and world.rank != 0:
        wait_for(turn, world.size)

    def act() -> T | None:
        if world.rank != 0:
            return None
        try:
            return action()
        finally:
            if others_wait:
                tell(turn)

    return dist.agree(act)
