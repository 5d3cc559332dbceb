from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.engines.batches import POOL, check_batch_size, eval_batches, in_order, rank_part, train_batches
from distprune.errors import UserError

worlds = st.integers(1, 8)
seeds = st.integers(0, 2**31)


def random_lengths(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 129, count).tolist()


@given(count=st.integers(1, 700), batch_size=st.integers(1, 9), seed=seeds, epoch=st.integers(0, 99))
@settings(max_examples=60)
def test_an_epoch_holds_each_example_at_most_once_in_full_batches(count, batch_size, seed, epoch):
    batch_size = min(batch_size, count)
    lengths = random_lengths(count, seed)
    batches = train_batches(lengths, batch_size, seed, epoch).tolist()
    members = [index for batch in batches for index in batch]
    assert len(batches) == count // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    assert len(set(members)) == len(members)
    assert set(members) <= set(range(count))
    assert all(lengths[a] <= lengths[b] for batch in batches for a, b in pairwise(batch))


def test_epochs_and_seeds_differ_and_repeat():
    lengths = random_lengths(103, 0)
    first = train_batches(lengths, 10, seed=1, epoch=0).tolist()
    assert first == train_batches(lengths, 10, seed=1, epoch=0).tolist()
    assert first != train_batches(lengths, 10, seed=1, epoch=1).tolist()
    assert first != train_batches(lengths, 10, seed=2, epoch=0).tolist()
    dropped = {
        frozenset(range(103)) - {index for batch in train_batches(lengths, 10, 1, epoch).tolist() for index in batch}
        for epoch in range(10)
    }
    assert len(dropped) > 5


def test_batches_hold_examples_of_similar_length_in_random_order():
    lengths = random_lengths(4000, 0)
    batches = train_batches(lengths, 20, seed=3, epoch=0).tolist()
    padding = sum(max(lengths[i] for i in batch) * 20 - sum(lengths[i] for i in batch) for batch in batches)
    assert padding < 0.05 * sum(lengths)
    longest = np.array([max(lengths[i] for i in batch) for batch in batches])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.3


def test_equal_lengths_are_shuffled_over_the_whole_epoch():
    first = train_batches([7] * (4 * POOL * 3), 4, seed=0, epoch=0).tolist()
    assert max(first[0]) - min(first[0]) > 4
    assert np.mean([np.ptp(batch) for batch in first]) > POOL


@given(world=worlds, accumulation=st.integers(1, 4), size=st.integers(1, 4))
@settings(max_examples=60)
def test_ranks_and_micro_batches_partition_the_batch_evenly(world, accumulation, size):
    batch = [3 * i for i in range(world * accumulation * size)]
    check_batch_size(len(batch), world, accumulation)
    parts = [rank_part(batch, rank, world, accumulation) for rank in range(world)]
    assert all(len(part) == accumulation for part in parts)
    assert all(len(micro) == size for part in parts for micro in part)
    assert sorted(index for part in parts for micro in part for index in micro) == batch


def test_ranks_hold_similar_lengths_in_each_micro_step():
    lengths = random_lengths(6400, 5)
    batch = sorted(range(64), key=lambda index: lengths[index])
    parts = [rank_part(batch, rank, 4, 2) for rank in range(4)]
    for step in range(2):
        totals = [sum(lengths[i] for i in part[step]) for part in parts]
        assert max(totals) < 1.25 * min(totals)
    assert max(lengths[i] for i in parts[0][0]) <= min(lengths[i] for i in parts[0][1])


@pytest.mark.parametrize(
    ("size", "world", "accumulation", "message"),
    [
        (32, 3, 1, "30 or 33"),
        (4, 8, 1, "e.g. 8"),
        (32, 4, 3, r"4 ranks times train\.accumulation 3, e\.g\. 24 or 36"),
    ],
)
def test_batch_sizes_that_cannot_be_dealt_are_refused(size, world, accumulation, message):
    with pytest.raises(UserError, match=message):
        check_batch_size(size, world, accumulation)


@given(count=st.integers(1, 60), batch_size=st.integers(1, 9), world=worlds, seed=seeds)
@settings(max_examples=150)
def test_evaluation_counts_each_example_once_in_equal_shapes(count, batch_size, world, seed):
    lengths = random_lengths(count, seed)
    ranks = [eval_batches(lengths, batch_size, rank, world) for rank in range(world)]
    shapes = [[len(batch.indices) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    assert all(len(batch.valid) == len(batch.indices) <= batch_size for batches in ranks for batch in batches)
    assert len(shapes[0]) == -(-count // (min(count, batch_size) * world)), "no more batches than it takes"

    flat = [batch for batches in ranks for batch in batches]
    indices = torch.tensor([index for batch in flat for index in batch.indices])
    valid = torch.tensor([flag for batch in flat for flag in batch.valid])
    assert sorted(indices[valid].tolist()) == list(range(count))

    values = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(in_order(values[indices], indices, valid), values)
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(indices)))
    assert torch.equal(in_order(values[indices][shuffled], indices[shuffled], valid[shuffled]), values)


@given(count=st.integers(1, 60), batch_size=st.integers(1, 9), world=worlds, seed=seeds)
@settings(max_examples=100)
def test_an_evaluation_batch_holds_the_same_rows_at_every_world_size(count, batch_size, world, seed):
    lengths = random_lengths(count, seed)
    ranks = [eval_batches(lengths, batch_size, rank, world) for rank in range(world)]
    dealt = [batch for round_of_batches in zip(*ranks, strict=True) for batch in round_of_batches]
    alone = eval_batches(lengths, batch_size, rank=0, world=1)
    assert dealt[: len(alone)] == alone
    assert not any(flag for batch in dealt[len(alone) :] for flag in batch.valid)


def test_evaluation_starts_with_the_longest_examples():
    lengths = random_lengths(50, 0)
    batches = eval_batches(lengths, 8, rank=1, world=2)
    seen = [lengths[index] for batch in batches for index in batch.indices]
    assert seen == sorted(seen, reverse=True)


def test_a_lost_or_doubled_row_is_noticed():
    rows = torch.zeros(3, 2)
    with pytest.raises(AssertionError):
        in_order(rows, torch.tensor([0, 2, 2]), torch.ones(3, dtype=torch.bool))
