"""metrics.jsonl: one JSON object a line, complete on disk after each line."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class Jsonl:
    """Appends records to a file; what an earlier process wrote stays."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if self._path.read_bytes()[-1:] not in (b"", b"\n"):
            self._file.write("\n")  # the last process was killed within a line
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def log(self, record: Mapping[str, object]) -> None:
        """Write one line."""
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()


def finite(value: object) -> object:
    """Return ``value`` with null for every NaN and infinity in it, for which JSON has no number."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
