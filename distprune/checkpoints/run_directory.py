"""Whose a run directory is: a new run's, that of one which goes on, or a finished one's. On rank 0, no collectives."""

import fcntl
import json
import logging
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distprune import dist, settings, turns
from distprune.config import Config, dotted
from distprune.disk import write_text
from distprune.errors import UserError

CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", ".lock"

_FIXED = ("model.", "teacher.", "task.", "pruning.", "regrowth.", "fisher.")
_FIXED_KEYS = ("train.batch_size", "train.seed", "train.select")
_FREE = (
    *("model.path", "model.revision", "model.tokenizer", "model.activation_checkpointing"),
    *("task.train", "task.validation", "task.more_validation", "teacher.cache", "teacher.rebuild_cache"),
)
"""The checkpoint holds the model itself and fingerprints of the data: where they came from matters no more."""
_OF_TEACHER = ("teacher.path", "teacher.revision")

logger = logging.getLogger(__name__)
_locks: dict[Path, int] = {}


def is_unfinished(run_dir: Path) -> bool:
    """Return whether a directory holds a run that can go on; a new or empty one does not.

    Raises:
        UserError: where it holds a finished run, or something else than a run.
    """
    allowed = "allowed: a new or empty directory, or that of a run to go on with"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"train.output {str(run_dir)!r} is a file; {allowed}")
    held = {path.name for path in run_dir.iterdir()} - {LOCK, f"{CONFIG}.partial"} if run_dir.exists() else set()
    if SUMMARY in held:
        raise UserError(f"train.output {str(run_dir)!r} holds a finished run; {allowed}")
    if held and CONFIG not in held:
        raise UserError(f"train.output {str(run_dir)!r} is not empty, and holds no run; {allowed}")
    return bool(held)


def claim(run_dir: Path, config: Config) -> None:
    """Make the directory of a new run; of two runs that want the same one, the second is refused.

    Raises:
        UserError: where another has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock(run_dir)
    if is_unfinished(run_dir):
        raise UserError(f"train.output {str(run_dir)!r} is another run's by now; allowed: a new or empty directory")
    write_config(run_dir, config)


def write_config(run_dir: Path, config: Config) -> None:
    """Write the configuration of the run as it is now."""
    note = "# The keys in recipe.derived are derived anew where this is a configuration again; to set one, unlist it.\n"
    write_text(run_dir / CONFIG, (note if config.recipe.derived else "") + settings.to_yaml(config))


def refuse_unshared(run_dir: Path) -> None:
    """Refuse a directory that is not the one that rank 0 has locked: no checkpoint there would ever be complete.

    Collective: every rank calls it.

    Raises:
        UserError: on every rank, with what to do.
    """
    holder = turns.on_main((run_dir / LOCK).read_text)

    def check() -> None:
        if not (run_dir / LOCK).exists() or (run_dir / LOCK).read_text() != holder:
            raise UserError(f"train.output {str(run_dir)!r} is not one folder for all nodes; allowed: on a shared disk")

    dist.agree(check)


def lock(run_dir: Path) -> None:
    """Keep every other run out of a directory, until `unlock` or the end of the process, however that comes.

    Raises:
        UserError: where another run is in it.
    """
    path = run_dir / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise UserError(f"{str(run_dir)!r} is in use by {holder}; allowed: one run or sweep at a time") from error
    except OSError as error:  # some network file systems know no locks
        logger.warning("%s cannot be locked (%s): make sure that no other run uses it", run_dir, error)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    os.fsync(descriptor)  # for those of other nodes who read it
    _locks[run_dir] = descriptor


def holder_of(run_dir: Path) -> str | None:
    """Return which process is in a run's directory, where one is."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDWR)
    except OSError:  # none is there, or it is another user's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    except OSError:
        return None  # a file system without locks
    finally:
        os.close(descriptor)
    return None


def _holder(descriptor: int) -> str:
    """Read who has locked a file, who may not have said so yet."""
    return os.read(descriptor, 200).decode(errors="replace").strip() or "another process"


def unlock(run_dir: Path) -> None:
    """Let others into a directory."""
    descriptor = _locks.pop(run_dir, None)
    if descriptor is not None:
        os.close(descriptor)


def changes(old: dict[str, Any], config: Config, knows_teacher: bool = False) -> list[str]:
    """Return in words which keys have another value than in a checkpoint.

    Args:
        old: the configuration as the checkpoint has it, section by section.
        config: the one to go on with.
        knows_teacher: the checkpoint has a hash of the teacher's weights, so that they may be elsewhere by now.

    Raises:
        UserError: where the rest of the run would have another model, target or data than its beginning.
    """
    free = (*_FREE, *_OF_TEACHER * knows_teacher)
    found, then = [], dotted(old)
    for key, value in dotted(asdict(config)).items():
        before = then.get(key, value)
        if value == before or key in ("recipe.derived", "recipe.derived_by"):
            continue
        if (key.startswith(_FIXED) or key in _FIXED_KEYS) and key not in free:
            raise UserError(
                f"{key} is {value!r}{' by its recipe' * (key in config.recipe.derived)}, and was {before!r} when the "
                "run began; allowed: the same, or another train.output for another run"
            )
        found.append(f"{key} {before!r} -> {value!r}")
    return found


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        UserError: where it cannot be read, as one that was cut off.
    """
    path = run_dir / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; allowed: the file that the run has written") from error
    if not isinstance(summary, dict):
        raise UserError(f"{path} is no summary of a run; allowed: the file that the run has written")
    return summary


def started_with(run_dir: Path) -> dict[str, Any]:
    """Return the configuration that a run without a checkpoint was started with, section by section.

    Raises:
        UserError: where it cannot be read.
    """
    return asdict(settings.load_written(run_dir / CONFIG))


def cut_metrics(run_dir: Path, step: int) -> None:
    """Take the lines behind a step out of metrics.jsonl: they come again."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the process was killed within the line
    write_text(path, "".join(line + "\n" for line in kept))
