"""What a check is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distprune.config import Config


@dataclass(frozen=True)
class Check:
    """A key, what is allowed there in words, and whether that is so."""

    key: str
    allowed: str
    holds: Callable[[Config], bool]


def value_of(config: Config, key: str, default: Any = None) -> Any:
    """Return the value at a dotted key; ``default`` for an option of DeepSpeed that is not set."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part, default) if isinstance(value, dict) else getattr(value, part, default)
    return value
