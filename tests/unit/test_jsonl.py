"""metrics.jsonl: valid JSON, complete after each line, whatever happened to the process or the disk before."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.config import Config
from distprune.monitor import Monitor
from distprune.monitor.jsonl import Jsonl, finite


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.text() | st.none()))
def test_what_is_written_is_json_and_only_nonfinite_numbers_change(record: dict[str, Any]) -> None:
    read = json.loads(json.dumps(finite(record)), parse_constant=refuse)
    expected = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    assert read == expected


def test_finite_reaches_nested_values() -> None:
    assert finite({"a": [1.0, math.inf, (math.nan,)], "b": {"c": -math.inf}}) == {
        "a": [1.0, None, [None]],
        "b": {"c": None},
    }


def test_each_line_is_on_disk_before_the_run_goes_on(tmp_path: Path) -> None:
    with Jsonl(tmp_path / "run" / "metrics.jsonl") as sink:
        sink.log({"step": 1, "loss": math.nan})
        assert records(tmp_path / "run") == [{"step": 1, "loss": None}]


class FullDisk:
    """Stands in for a file on a disk that is full twice: takes a few bytes, then none."""

    def __init__(self, file: Any):
        self.file, self.room = file, [5, 0, 7, 0]

    def write(self, content: bytes) -> int:
        if self.room and not (room := self.room.pop(0)):
            raise OSError(28, "No space left on device")
        return int(self.file.write(content[:room] if self.room else content))

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_is_a_warning_and_its_lines_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Monitor(tmp_path, Config(), 4, enabled=True) as monitor:
        sink = next(each for each in monitor._sinks if isinstance(each, Jsonl))
        sink._file = FullDisk(sink._file)  # type: ignore[assignment]
        for step in range(1, 3):
            monitor.log({"step": step, "split": "train"})
    assert [line["step"] for line in records(tmp_path)] == [1, 2], "the last at the end"
    assert [each.message for each in caplog.records].count(caplog.records[0].message) == 1
    assert "No space left on device; the run goes on" in caplog.text


def test_a_later_process_appends_and_is_not_spoilt_by_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with Jsonl(path) as sink:
        sink.log({"step": 2})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2}']
