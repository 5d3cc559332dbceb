"""What is not a bug: an input that the user can mend, and ranks that are lost."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError

STOPPED, LOST = 75, 76
"""Exit statuses of a run that can go on: it was asked to stop (sysexits' EX_TEMPFAIL), or ranks are gone."""


class UserError(Exception):
    """What was given, and what is allowed, in one sentence.

    Raised for bad input only; broken invariants are assertions. The command line prints it without a
    traceback on one rank and exits with status 2 on every rank.
    """


@contextmanager
def written(path: Path | str) -> Iterator[None]:
    """Refuse a file that cannot be written within a ``with``.

    Raises:
        UserError: in place of the OSError or SafetensorError, or of the ValueError for a suffix that is not known.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from error


def unknown(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is none of those allowed, with the nearest of them."""
    names = list(allowed)
    nearest = get_close_matches(given, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return UserError(f"{what} {given!r} is unknown{hint}; allowed: {', '.join(names)}")


class LostRanks(Exception):
    """Other ranks do not answer any more.

    Args:
        ranks: which.
        speaks: whether this is the rank that is to say so.
        error: that this rank met with.
    """

    def __init__(self, ranks: list[int], speaks: bool, error: BaseException):
        who = f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} do"
        super().__init__(
            f"{who} not answer any more; the run ends, and the same command goes on from its newest checkpoint "
            f"({type(error).__name__} here: {' '.join(str(error).split()):.200})"
        )
        self.speaks = speaks


class Fault(LostRanks):
    """A rank's device, or its connection to others, has failed: nothing that the user or the code could mend.

    Args:
        rank: that it was seen on.
        error: of torch.
    """

    def __init__(self, rank: int, error: BaseException):
        Exception.__init__(
            self, f"rank {rank}: {error}; the run ends, and the same command goes on from its newest checkpoint"
        )
        self.speaks = True
