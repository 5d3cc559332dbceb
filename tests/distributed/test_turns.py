"""Ranks that wait for each other in the store, while data are tokenised."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Timer
from unittest.mock import patch

import pytest

from distprune import dist, store
from distprune.errors import UserError
from tests.world import Worlds


def in_turn(rank_file: Path) -> bool:
    """Have local rank 0 take its time; return whether its work was done when this rank had its turn."""
    with patch("torch.distributed.barrier", side_effect=AssertionError("its time is limited")), store.local_first():
        if dist.is_main():
            time.sleep(1)
            rank_file.touch()
        return rank_file.exists()


def test_others_wait_for_the_first_of_their_node_outside_of_collectives(world: Worlds, tmp_path: Path) -> None:
    for turn in range(2):
        assert world(3).run(in_turn, tmp_path / str(turn)) == [True] * 3


def done_when_a_node_goes_on(folder: Path) -> int:
    """Work on a node of one rank, of which that of rank 1 is slow; return how many have when this one goes on."""
    world = dist.detect()
    node = replace(world, local_rank=0)
    barrier = patch("torch.distributed.barrier", side_effect=AssertionError("its time is limited"))
    with patch("socket.gethostname", lambda: f"node-{world.rank}"), patch.object(dist, "detect", lambda: node), barrier:
        with store.local_first():
            time.sleep(world.rank == 1)
            (folder / str(world.rank)).touch()
        return len(list(folder.iterdir()))


def test_nodes_wait_for_the_slowest_outside_of_collectives(world: Worlds, tmp_path: Path) -> None:
    assert world(3).run(done_when_a_node_goes_on, tmp_path) == [3] * 3


def waits_for_one_that_is_silent() -> str:
    """Wait for a rank whose heart stands still. Collective."""
    store.beat(store.connect_store(), dist.detect().rank, 1)
    short = patch.multiple(store, _SLICE=timedelta(milliseconds=50), SILENCE_S=0.5)
    too_late = Timer(10, lambda: store.connect_store().set("too late", ""))
    too_late.start()
    with short, pytest.raises(RuntimeError) as caught:
        store._wait_for("too late")
    too_late.cancel()
    return str(caught.value)


def test_who_waits_in_the_store_notices_a_rank_that_falls_silent(world: Worlds) -> None:
    assert all("rank 0 has been silent" in said for said in world(2).run(waits_for_one_that_is_silent))


def fails_in_turn() -> str:
    """Fail on the last rank, in its turn. Collective."""

    def action() -> None:
        with store.local_first():
            if dist.detect().rank == dist.detect().size - 1:
                raise UserError("here")

    with pytest.raises(UserError) as caught:
        dist.agree(action)
    return str(caught.value)


def test_a_mistake_in_a_turn_is_known_to_all(world: Worlds) -> None:
    assert world(2).run(fails_in_turn) == ["here"] * 2
