"""Paths as users write them."""

from pathlib import Path

from distprune.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return a path with the home in place of ``~`` or ``~user``.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} begins with a home that is not known; allowed: ~ or ~USER of a user") from error
