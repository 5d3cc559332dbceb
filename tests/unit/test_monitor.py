import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

import distprune.monitor.wandb as wandb_sink
from distprune.config import Config, WandbConfig
from distprune.monitor import Monitor

API_KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN = {"step": 1, "epoch": 0.5, "split": "train", "loss": 0.25, "lr": 1e-4, "sparsity": 0.5}
VALIDATION = {
    "step": 2,
    "epoch": 1.0,
    "split": "validation",
    "accuracy": 0.75,
    "sparsity": 0.5,
    "sparsity/layer.0.query.weight": 0.5,
}


def config(mode: str = "disabled") -> Config:
    return Config(wandb=WandbConfig(mode, "project", "entity", None, "group", ["tag"]))


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is printed; wandb keeps its own log to its files."""
    logged = [record for record in caplog.records if not record.name.startswith("wandb")]
    return [record.getMessage() for record in logged if record.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home directory of wandb's own, no key but what the test sets, and nothing left running."""
    home = tmp_path / "home"
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "false")
    yield home
    wandb.teardown()


def test_a_rank_that_is_not_enabled_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("a second rank opened a run"))
    with Monitor(tmp_path / "run", config("offline"), total_steps=2, enabled=False) as monitor:
        monitor.log(TRAIN)
        monitor.progress(1, loss=0.25)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_disabled_mode_does_not_import_wandb(tmp_path: Path) -> None:
    code = """
import sys
from contextlib import suppress
from pathlib import Path
from distprune.config import Config
from distprune.monitor import Monitor
with Monitor(Path(sys.argv[1]), Config(), total_steps=1, enabled=True) as monitor:
    monitor.log({"step": 1, "split": "train"})
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)
    assert records(tmp_path / "run")


def files_below(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def offline_run(run_dir: Path) -> None:
    with Monitor(run_dir, config("offline"), total_steps=2, enabled=True) as monitor:
        monitor.log(TRAIN)
        monitor.progress(1, loss=0.25)
        monitor.log(VALIDATION)


def test_offline_run_holds_everything_but_the_key(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    offline_run(tmp_path / "run")

    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    for name in (b"train/loss", b"validation/accuracy", b"sparsity/layer.0.query.weight", b"world_size"):
        assert name in written
    assert b"train/step" not in written, "the step is an axis of its own"
    assert b"validation/sparsity/" not in written, "layers belong to no split"

    printed = capfd.readouterr()
    assert f"wandb sync {log.parent}" in printed.out
    assert API_KEY not in printed.out + printed.err + caplog.text
    files = files_below(tmp_path)
    assert len(files) > 3
    assert not [path for path, content in files.items() if API_KEY.encode() in content]
    assert not warnings(caplog)


def test_a_later_process_continues_the_run_of_the_directory(tmp_path: Path) -> None:
    offline_run(tmp_path / "run")
    offline_run(tmp_path / "run")
    name = (tmp_path / "run" / "wandb_id").read_text()
    logs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [log.name for log in logs] == [f"run-{name}.wandb"] * 2


class FakeRun:
    """A run that logs ``good`` records and then fails, or fails as it ends."""

    url, dir = "https://example.org/run", "."

    def __init__(self, good: int) -> None:
        self.good = good
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str | None]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, record: dict[str, Any]) -> None:
        if len(self.logged) == self.good:
            raise ConnectionError(f"lost\nkey {API_KEY}")
        self.logged.append(record)

    def finish(self, exit_code: int) -> None:
        raise TimeoutError("too slow")


@pytest.mark.parametrize("broken_at", ["Settings", "init", "log", "finish"])
def test_a_broken_wandb_costs_one_warning(
    broken_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"down, key {API_KEY}")

    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(good=5 if broken_at == "log" else 1000))
    if broken_at in ("Settings", "init"):
        monkeypatch.setattr(wandb, broken_at, fail)
    with Monitor(tmp_path, config("offline"), total_steps=40, enabled=True) as monitor:
        for step in range(40):
            monitor.log(TRAIN | {"step": step})
            monitor.progress(step)
    assert [record["step"] for record in records(tmp_path)] == list(range(40))
    (warning,) = warnings(caplog)
    assert warning.startswith("wandb failed, the run goes on without it: ")
    assert "\n" not in warning
    assert API_KEY not in warning


def test_train_and_validation_share_the_step_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun(good=2)
    options: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: options.update(given) or run)
    offline_run(tmp_path / "run")
    given = {name: options[name] for name in ("mode", "project", "entity", "group", "tags")}
    assert given | {"name": None} == vars(config("offline").wandb)
    assert ("*", "step") in run.axes
    assert run.logged == [
        {"step": 1, "epoch": 0.5, "train/loss": 0.25, "train/lr": 1e-4, "train/sparsity": 0.5},
        {
            "step": 2,
            "epoch": 1.0,
            "validation/accuracy": 0.75,
            "validation/sparsity": 0.5,
            "sparsity/layer.0.query.weight": 0.5,
        },
    ]
    assert options["resume"] == "allow"
    assert options["name"] == "run"
    assert options["config"]["lr"] == {
        "peak": 1e-4,
        "final": 1e-6,
        "warmup": "0 epochs",
        "rewind_every": None,
        "rewind_first": None,
    }


def test_online_without_a_key_neither_asks_nor_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("wandb.errors.term._sys_stdin_isatty", lambda: True)
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True)
    monkeypatch.setattr("wandb.util.prompt_choices", lambda *_, **__: asked.append("choice"))
    with Monitor(tmp_path, config("online"), total_steps=2, enabled=True) as monitor:
        monitor.log(TRAIN)
    assert not asked
    (warning,) = warnings(caplog)
    assert "No API key configured" in warning
    assert len(records(tmp_path)) == 1
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_server_that_is_not_reached_leaves_complete_offline_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT", 5)
    with Monitor(tmp_path, config("online"), total_steps=2, enabled=True) as monitor:
        for step in range(3):
            monitor.log(TRAIN | {"step": step})
    (warning,) = warnings(caplog)
    assert warning.startswith("wandb is not to be had online, the run is kept offline: ")
    assert len(records(tmp_path)) == 3
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.read_bytes().count(b"train/loss") >= 3


def test_a_slow_wandb_holds_up_neither_the_run_nor_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT", "KILL_TIMEOUT"):
        monkeypatch.setattr(wandb_sink, name, 0.1)
    never = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: never.wait(60))
    started = time.monotonic()
    with Monitor(tmp_path, config("offline"), total_steps=2, enabled=True) as monitor:
        monitor.log(TRAIN)
    assert time.monotonic() - started < 10
    assert warnings(caplog) == ["wandb does not answer, the run ends without it"]
    assert len(records(tmp_path)) == 1
    never.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(10)


def test_a_service_that_cannot_start_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wandb.sdk.lib.service.service_process.get_core_path", lambda: "/nowhere/wandb-core")
    offline_run(tmp_path)
    (warning,) = warnings(caplog)
    assert "/nowhere/wandb-core" in warning
    assert len(records(tmp_path)) == 2


def test_a_service_that_hangs_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT"):
        monkeypatch.setattr(wandb_sink, name, 1)

    def services() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # a service's own children come and go
                if child.name().startswith("wandb") and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
        return found

    with Monitor(tmp_path, config("offline"), total_steps=2, enabled=True) as monitor:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert services()
        for process in services():
            process.suspend()
        monitor.log(TRAIN)
    assert len(warnings(caplog)) == 1
    assert not services()
    assert len(records(tmp_path)) == 1


def test_a_failed_run_is_marked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(FakeRun, "finish", lambda _, exit_code: codes.append(exit_code))
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(good=9))
    with (
        pytest.raises(ZeroDivisionError),
        Monitor(tmp_path, config("offline"), total_steps=2, enabled=True),
    ):
        raise ZeroDivisionError
    offline_run(tmp_path / "good")
    assert codes == [1, 0]
    assert os.environ.get("WANDB_SERVICE") is None
