"""The one exception that means: the user can mend this."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What was given, and what is allowed, in one sentence.

    Raised for bad input only; broken invariants are assertions. The command line prints it without a
    traceback on one rank and exits with status 2 on every rank.
    """


def unknown(what: str, given: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is none of those allowed, with the nearest of them."""
    names = list(allowed)
    nearest = get_close_matches(given, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return UserError(f"{what} {given!r} is unknown{hint}; allowed: {', '.join(names)}")
