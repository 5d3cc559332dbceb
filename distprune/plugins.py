"""Classes by name: those that distprune has, and those of other packages."""

import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from inspect import getmembers, isabstract
from pathlib import Path
from typing import TypeVar

from distprune.errors import UserError, unknown

T = TypeVar("T")


def hashes_of_modules(*names: str) -> dict[str, str]:
    """Return the hashes of the files of those names that are ``module:Class`` and imported: nodes may have others."""
    files = {name: getattr(sys.modules.get(name.partition(":")[0]), "__file__", None) for name in names if ":" in name}
    return {name: sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file is not None}


def find_class(key: str, name: str, known: Mapping[str, type[T]], base: type[T]) -> type[T]:
    """Return a class by its name, or by ``module:Class`` where it is of another package.

    Args:
        key: what is named so, for the message.
        name: as given.
        known: those that need no module.
        base: what a class of another package has to derive from, and make concrete.

    Raises:
        UserError: where there is none of this name.
    """
    if name in known:
        return known[name]
    others = f"module:Class of a subclass of {base.__module__.removesuffix('.base')}.{base.__qualname__}"
    module, colon, attribute = name.partition(":")
    if not colon or module[:1] in ("", "."):
        raise unknown(key, name, [*known, others])
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        hint = "; allowed: a module in the Python path, as with PYTHONPATH=FOLDER" * isinstance(error, ImportError)
        raise UserError(f"{key} {name!r} cannot be imported: {error}{hint}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UserError(f"{key} is {name!r}; allowed: {', '.join(known)}, or {others}")
    if isabstract(kind):
        lacking = ", ".join(name for name, each in getmembers(kind) if getattr(each, "__isabstractmethod__", False))
        raise UserError(f"{key} is {name!r}, which lacks {lacking}; allowed: {others}")
    return kind
