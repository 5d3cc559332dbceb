"""One run in Weights & Biases.

One thread makes every call into wandb, so that a wandb that is slow, down or broken neither delays nor ends
the training: at its first error the thread says so in one line and ends.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self

import psutil

from distprune.config import WandbConfig

INIT_TIMEOUT = 30  # seconds
FINISH_TIMEOUT = 120  # seconds for what is not uploaded yet
KILL_TIMEOUT = 10  # seconds
SHARED = ("step", "epoch")
_ID = "wandb_id"

logger = logging.getLogger(__name__)


class Wandb:
    """Sends records to the run whose id is kept in the run directory.

    Args:
        run_dir: run directory; holds ``wandb_id`` and wandb's own folder.
        options: mode (online or offline), project, entity, name, group and tags.
        config: the resolved configuration, shown with the run.
    """

    def __init__(self, run_dir: Path, options: WandbConfig, config: Mapping[str, object]):
        self._run_dir = run_dir
        self._options = options
        self._config = config
        self._queue: SimpleQueue[Mapping[str, object] | int] = SimpleQueue()
        self._thread = Thread(target=self._work, name="wandb", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(0 if kind is None else 1)
        self._thread.join(INIT_TIMEOUT + FINISH_TIMEOUT)
        if self._thread.is_alive():
            _kill_service()
            self._thread.join(KILL_TIMEOUT)
        if self._thread.is_alive():
            logger.warning("wandb does not answer, the run ends without it")

    def log(self, record: Mapping[str, object]) -> None:
        """Hand a record over; returns at once."""
        if self._thread.is_alive():
            self._queue.put(record)

    def _work(self) -> None:
        """Serve the queue until the exit code of the run arrives or wandb fails."""
        try:
            run = self._open()
            while not isinstance(item := self._queue.get(), int):
                run.log(named(item))
            run.finish(exit_code=item)
        except Exception as error:
            logger.warning("wandb failed, the run goes on without it: %s", reason(error))
        finally:
            with suppress(Exception):
                _teardown()

    def _open(self) -> Any:
        """Open the run, offline where the server cannot be had."""
        try:
            return self._start(self._options.mode)
        except Exception as error:
            if self._options.mode != "online":
                raise
            logger.warning("wandb is not to be had online, the run is kept offline: %s", reason(error))
            _teardown()  # its service takes the run for open
            return self._start("offline")

    def _start(self, mode: str) -> Any:
        os.environ["WANDB_SILENT"] = "true"  # wandb neither prints nor asks for a key: without one, init raises
        import wandb

        options = self._options
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]  # checked with the configuration
            id=self._run_id(),
            resume="allow",
            reinit="create_new",
            dir=str(self._run_dir),
            project=options.project,
            entity=options.entity,
            name=options.name or self._run_dir.resolve().name,
            group=options.group,
            tags=options.tags,
            config=dict(self._config),
            settings=wandb.Settings(
                console="off",
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        print(f"wandb: {run.url or f'upload with `wandb sync {Path(run.dir).parent}`'}", flush=True)
        return run

    def _run_id(self) -> str:
        """Return the id that an earlier process left in the run directory, or leave one there."""
        found = stored_id(self._run_dir)
        if found is None:
            found = secrets.token_hex(4)
            store_id(self._run_dir, found)
        return found


def stored_id(run_dir: Path) -> str | None:
    """Return the id of a run directory's run in wandb, None where there is none."""
    path = run_dir / _ID
    return path.read_text() if path.exists() else None


def store_id(run_dir: Path, run_id: str) -> None:
    """Have later processes continue this run in wandb."""
    (run_dir / _ID).write_text(run_id)


def _teardown() -> None:
    """Stop wandb's service now, and not while Python exits, where its errors would be printed."""
    import wandb

    wandb.teardown()


def _kill_service() -> None:
    """Kill a service that has stopped answering; the thread that waits for it gets an error."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("wandb"):
                process.kill()


def named(record: Mapping[str, object]) -> dict[str, object]:
    """Return a record with wandb's names: ``<split>/<key>``, save for shared axes and names with a slash."""
    prefix = f"{record['split']}/" if "split" in record else ""
    return {
        key if key in SHARED or "/" in key else prefix + key: value for key, value in record.items() if key != "split"
    }


def reason(error: Exception) -> str:
    """Return an error in one line without the API key."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text
