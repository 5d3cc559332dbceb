"""Ranks that wait for each other in the store, while one has work to do."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as torch_dist

from distprune import dist, store, turns
from distprune.errors import UserError
from tests.world import Worlds


def in_turn(rank_file: Path) -> bool:
    """Have local rank 0 take its time; return whether its work was done when this rank had its turn."""
    with patch("torch.distributed.barrier", side_effect=AssertionError("its time is limited")), turns.local_first():
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
        with turns.local_first():
            time.sleep(world.rank == 1)
            (folder / str(world.rank)).touch()
        return len(list(folder.iterdir()))


def test_nodes_wait_for_the_slowest_outside_of_collectives(world: Worlds, tmp_path: Path) -> None:
    assert world(3).run(done_when_a_node_goes_on, tmp_path) == [3] * 3


def met_once_main_was_done(rank_file: Path, fails: bool) -> tuple[str, bool]:
    """Have rank 0 take its time; return what comes of it, and whether it was done when this rank met the others."""
    done, gather = [], torch_dist.all_gather_object

    def slow() -> str:
        time.sleep(1)
        rank_file.touch()
        if fails:
            raise UserError("here")
        return "done"

    def noted(*arguments: Any) -> None:
        done.append(rank_file.exists())
        gather(*arguments)

    with patch("torch.distributed.all_gather_object", noted):
        try:
            said = turns.on_main(slow)
        except UserError as error:
            said = str(error)
    return said, done[0]


def test_others_wait_for_rank_0_outside_of_collectives(world: Worlds, tmp_path: Path) -> None:
    assert world(3).run(met_once_main_was_done, tmp_path / "done", False) == [("done", True)] * 3
    assert world(3).run(met_once_main_was_done, tmp_path / "failed", True) == [("here", True)] * 3


def waits_for_one_that_is_silent() -> str:
    """Wait for a rank whose heart stands still. Collective."""
    store.beat(store.connect_store(), dist.detect().rank, 1)
    short = patch.multiple(store, _LOOK_S=0.05, SILENCE_S=0.5)
    too_late = Timer(10, lambda: store.connect_store().set("too late", ""))
    too_late.start()
    with short, pytest.raises(RuntimeError) as caught:
        store.wait_for("too late", dist.detect().size)
    too_late.cancel()
    return str(caught.value)


def test_who_waits_in_the_store_notices_a_rank_that_falls_silent(world: Worlds) -> None:
    assert all("rank 0 has been silent" in said for said in world(2).run(waits_for_one_that_is_silent))


def given_up_on_main() -> float:
    """Wait for rank 0, whose heart stands still; return the seconds until that is given up. Collective."""
    store.beat(store.connect_store(), dist.detect().rank, 1)
    began = time.monotonic()
    with patch.multiple(store, _LOOK_S=0.05, SILENCE_S=0.5):
        if dist.is_main():
            turns.on_main(lambda: time.sleep(4))
        else:
            with pytest.raises(RuntimeError, match="rank 0 has been silent"):
                turns.on_main(lambda: None)
            began = time.monotonic() - began
            dist.gather([None])  # or this one would wait for it
            torch_dist.broadcast_object_list([None])
    return began


def test_who_waits_for_rank_0_gives_up_at_once(world: Worlds) -> None:
    assert world(2).run(given_up_on_main)[1] < 3


def fails_in_turn() -> str:
    """Fail on the last rank, in its turn. Collective."""

    def action() -> None:
        with turns.local_first():
            if dist.detect().rank == dist.detect().size - 1:
                raise UserError("here")

    with pytest.raises(UserError) as caught:
        dist.agree(action)
    return str(caught.value)


def test_a_mistake_in_a_turn_is_known_to_all(world: Worlds) -> None:
    assert world(2).run(fails_in_turn) == ["here"] * 2
