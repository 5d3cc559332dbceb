"""metrics.jsonl: one JSON object a line, complete on disk after each line."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self


class Jsonl:
    """Appends records to a file; what an earlier process wrote stays."""

    def __init__(self, path: Path):
        self._path, self._pending = path, b""

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)
        if self._path.read_bytes()[-1:] not in (b"", b"\n"):
            self._pending = b"\n"  # the last process was killed within a line
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._write()
        self._file.close()

    def log(self, record: Mapping[str, object]) -> None:
        """Write one line, and those before it that a full disk did not take.

        Raises:
            OSError: it does not take them yet; they are kept for the next call.
        """
        self._pending += json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def finite(value: object) -> object:
    """Return ``value`` with null for every NaN and infinity in it, for which JSON has no number."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
