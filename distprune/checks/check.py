"""What a check is."""

from collections.abc import Callable
from dataclasses import dataclass

from distprune.config import Config


@dataclass(frozen=True)
class Check:
    """A key, what is allowed there in words, and whether that is so."""

    key: str
    allowed: str
    holds: Callable[[Config], bool]
