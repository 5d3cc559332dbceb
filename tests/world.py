"""Real process groups of gloo ranks on the CPU, each started once and kept for many checks."""

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

TIMEOUT_S = 240

_context = multiprocessing.get_context("forkserver")
# The ranks are forked from a process that has imported these: a world starts in a second, not in ten. The last is what
# DeepSpeed imports when it builds an engine: torch's compiler, three seconds for each rank.
_context.set_forkserver_preload(
    ["deepspeed", "transformers", "distprune.commands.train", "deepspeed.runtime.zero.muon.muon_optimizer"]
)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the imports left: every engine that is built has all garbage collected
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from distprune import dist

    dist.init()
    while True:
        function, arguments, keywords = pipe.recv()
        try:
            pipe.send((True, function(*arguments, **keywords)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class World:
    """``size`` ranks that run a module-level function together."""

    def __init__(self, size: int):
        self.size = size
        self.processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        """Call the function on every rank and return what each returned.

        A rank that raises or takes too long fails the test; the world is then started anew for the next one.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments, keywords))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S if not failures else 1):
                failures.append(f"rank {rank} of {self.size} did not answer")
                continue
            try:
                succeeded, result = pipe.recv()
            except EOFError:
                succeeded, result = False, "the process died"
            (results if succeeded else failures).append(result if succeeded else f"rank {rank}:\n{result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes = []
        for rank in range(self.size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


Worlds = Callable[[int], World]
"""The fixture ``world``: the group of so many ranks."""


def _by_world(slow_from: int) -> pytest.MarkDecorator:
    sizes = [pytest.param(size, marks=[pytest.mark.slow] * (size >= slow_from)) for size in (1, 2, 3, 4)]
    return pytest.mark.parametrize("size", sizes)


by_world = _by_world(slow_from=3)
by_world_slow_from_2 = _by_world(slow_from=2)
