"""What is not a bug: an input that the user can mend, and ranks or devices that are lost."""

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
        UserError: in place of the OSError or SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be written: {error}") from error


def unknown(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is none of those allowed, with the nearest of them."""
    names = list(allowed)
    nearest = get_close_matches(given, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return UserError(f"{what} {given!r} is unknown{hint}; allowed: {', '.join(names)}")


class CannotGoOn(Exception):
    """This rank cannot go on, and the same command can: other ranks are lost, or its device or a connection failed.

    Args:
        what: happened, without a full stop.
        speaks: whether this is the rank that is to say so.
    """

    def __init__(self, what: str, speaks: bool):
        super().__init__(f"{what}; the run ends, and the same command goes on from its newest checkpoint")
        self.speaks = speaks
