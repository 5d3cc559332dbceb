"""What a run tells the world, from global rank 0: a metrics file, Weights & Biases and its progress."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from distprune import dist
from distprune.config import Config
from distprune.monitor.jsonl import Jsonl
from distprune.monitor.progress import for_stdout
from distprune.monitor.wandb import Wandb

__all__ = ["Monitor"]

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, record: Mapping[str, object]) -> None:
        """Take a record."""


class Monitor:
    """Sends the records of a run to its sinks; there are none on the ranks where it is not enabled.

    Args:
        run_dir: directory of the run; made if missing.
        config: the resolved configuration.
        total_steps: optimizer steps of the run.
        enabled: true on global rank 0 only.
    """

    def __init__(self, run_dir: Path, config: Config, total_steps: int, enabled: bool):
        self._stack, self._warned = ExitStack(), False
        self._progress = [for_stdout(total_steps)] if enabled else []
        self._sinks: list[Sink] = [*self._progress]
        if enabled:
            self._sinks.append(Jsonl(run_dir / "metrics.jsonl"))
        if enabled and config.wandb.mode != "disabled":
            facts = {"world_size": dist.detect().size, "total_steps": total_steps}
            self._sinks.append(Wandb(run_dir, config.wandb, asdict(config) | facts))

    def __enter__(self) -> Self:
        for sink in self._sinks:
            self._stack.enter_context(sink)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def log(self, record: Mapping[str, object]) -> None:
        """Send a flat record to every sink.

        Args:
            record: ``step``, ``epoch``, ``split`` ("train", "validation", "teacher") and numbers; a name with a slash,
                as in ``sparsity/<weight>``, belongs to no split.
        """
        for sink in self._sinks:
            with self._forgiving():
                sink.log(record)

    def progress(self, step: int, **shown: object) -> None:
        """Move the progress bar to ``step`` finished steps and show the values, e.g. ``loss=0.31``."""
        for bar in self._progress:
            with self._forgiving():
                bar.move(step, shown)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Go on where a disk is full: a warning, once."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning("what the run tells cannot be written: %s; the run goes on", error)
            self._warned = True
