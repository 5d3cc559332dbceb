"""Which examples form a batch: pure functions of lengths, seed, epoch, rank and world size.

A global batch is the same for any world size and any number of accumulation steps, so that a run can be
continued on another number of ranks and still sees the same data. Batches hold examples of about the same
length, which saves most of the padding; which examples meet, and in which order the batches come, is random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distprune.errors import UserError

# Batches that are grouped by length together: enough to save padding, few enough to mix the data.
POOL = 50


@dataclass(frozen=True)
class EvalBatch:
    """The rows of a forward pass of an evaluation.

    Attributes:
        indices: which example each row holds.
        valid: False for a row that only fills the batch up and does not count.
    """

    indices: list[int]
    valid: list[bool]


def train_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the global batches of one epoch, the same on every rank and for any world size.

    The examples that are too few for another batch are left out, other ones in each epoch.

    Args:
        lengths: tokens of each training example.
        batch_size: examples in a batch over all ranks.
        seed: of the run.
        epoch: counted from 0; each has its own order.

    Returns:
        Batches of indices into ``lengths``, in random order, shape [batches, batch_size]; within a batch from short to
        long.
    """
    assert len(lengths) >= batch_size, "make_plan lets no such run begin"
    size = np.asarray(lengths[:])  # [:] reads a column of a data set at once
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(size))[: len(size) // batch_size * batch_size]
    pools = [order[start : start + POOL * batch_size] for start in range(0, len(order), POOL * batch_size)]
    by_length = np.concatenate([pool[np.argsort(size[pool], kind="stable")] for pool in pools])
    return rng.permutation(by_length.reshape(-1, batch_size))


def check_batch_size(batch_size: int, world: int, accumulation: int) -> None:
    """Check that a global batch can be dealt to the ranks in equal micro batches.

    Raises:
        UserError: ``batch_size`` is not a multiple of ``world * accumulation``.
    """
    parts = world * accumulation
    if batch_size % parts:
        above = -(-batch_size // parts) * parts
        nearest = f"{above - parts} or {above}" if above > parts else f"{above}"
        each, rest = divmod(batch_size, accumulation)
        worlds = [str(size) for size in range(1, min(each, 64) + 1) if each % size == 0 and not rest]
        start = f", or start {', '.join(worlds)} ranks" if worlds else ""
        raise UserError(
            f"train.batch_size is {batch_size}; it must be a multiple of the {world} ranks times "
            f"train.accumulation {accumulation}, e.g. {nearest}{start}"
        )


def rank_part(batch: list[int], rank: int, world: int, accumulation: int) -> list[list[int]]:
    """Return one rank's micro batches of a global batch that :func:`check_batch_size` allows.

    A micro step takes neighbours of the batch, which is ordered by length, and deals them out in turn: in
    each micro step all ranks hold equally many examples of about the same lengths.

    Args:
        batch: a global batch of :func:`train_batches`.
        rank: this rank.
        world: number of ranks.
        accumulation: forward passes that an optimizer step is made of.

    Returns:
        ``accumulation`` lists of indices; over all ranks they are a partition of the batch.
    """
    size, rest = divmod(len(batch), accumulation)
    assert rest == 0
    assert size % world == 0
    return [batch[start + rank : start + size : world] for start in range(0, len(batch), size)]


def stream_seed(seed: int, step: int, examples: list[int]) -> int:
    """Return the seed of a forward pass's random numbers (dropout): of the run, the step and what is in the batch.

    No state goes from one step to the next, so that a run that is resumed draws what it would have drawn.
    """
    (state,) = np.random.SeedSequence([seed, step, *examples]).generate_state(1, np.uint64)
    return int(state) >> 1


def eval_batches(lengths: Sequence[int], batch_size: int, rank: int, world: int) -> list[EvalBatch]:
    """Return one rank's share of an evaluation; :func:`in_order` undoes the dealing.

    A batch holds the same rows at every world size, so that its numbers round alike; whole batches are dealt out.
    Every rank gets as many, with as many rows in each, which collectives need. Over all ranks each example is valid
    in exactly one row. The longest examples come first, so that what does not fit into memory fails at once.

    Args:
        lengths: tokens of each example.
        batch_size: rows of a batch; fewer where there are fewer examples.
        rank: this rank.
        world: number of ranks; more than there are batches is fine.
    """
    order = np.argsort(-np.asarray(lengths[:]), kind="stable").tolist()
    size = min(batch_size, len(order))
    fill = -len(order) % (size * world)
    valid = [True] * len(order) + [False] * fill
    order += order[-1:] * fill
    starts = range(rank * size, len(order), world * size)
    return [EvalBatch(order[at : at + size], valid[at : at + size]) for at in starts]


def in_order(rows: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Put rows that were gathered from all ranks back into the order of the data, without the fillers.

    Args:
        rows: shape [M, ...], in any order.
        indices: the example that each row belongs to, shape [M], integer.
        valid: whether the row counts, shape [M], bool.

    Returns:
        Shape [N, ...] with N = the number of valid rows; row i belongs to example i.
    """
    place, order = indices[valid].sort()
    assert torch.equal(place, torch.arange(len(place), dtype=place.dtype, device=place.device))
    return rows[valid][order]
