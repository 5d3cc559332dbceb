"""What runs and commands leave in files: metrics read back, the environment, JSON that is whole, CSV."""

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from distprune import __version__, dist
from distprune.disk import write_text
from distprune.errors import UserError, written
from distprune.monitor.jsonl import finite

RESERVED = frozenset({"epoch", "loss", "lr", "sparsity", "split", "step"})
"""What a run's records and its progress have beside the metrics."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl.

    Where a run was continued from a checkpoint, records of steps that were done again are left out, and so is
    a line that a kill cut short.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist; a run writes it as metrics.jsonl in its directory")
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"] + 0, record["split"] + ""
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    return list({(record["step"], record["split"]): record for record in records}.values())


def environment() -> dict[str, str | None]:
    """Return the versions, the device's name and the git revision that a run was made with.

    The revision is that of the working directory's repository, with ``-dirty`` where tracked files were
    changed, and null outside of one.
    """
    return {
        "distprune": __version__,
        **{name: version(name) for name in ("torch", "deepspeed", "transformers", "datasets")},
        "python": platform.python_version(),
        "device": _device_name(),
        "git": _git_revision(),
    }


def _device_name() -> str:
    if dist.on_gpu():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    return cpu_name(info.read_text() if info.exists() else "")


def cpu_name(info: str) -> str:
    """Return this machine's CPU, its cores, and what torch and bf16 may use of it, given /proc/cpuinfo's text."""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    abilities = [torch.backends.cpu.get_cpu_capability(), *sorted(set(re.findall(r"\b\w*bf16\b", info)))]
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores ({', '.join(abilities)})"


def _git_revision() -> str | None:
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records for a spreadsheet, a column for every key that any of them has."""
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for each in records for key in each)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_json(path: Path, data: object) -> None:
    """Write a file by `write_text`; NaN and infinities become null."""
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def check_places(*paths: str | None) -> None:
    """Refuse files whose folders are not there, before what they are to hold is measured.

    Raises:
        UserError: as said.
    """
    for path in paths:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path!r} cannot be written; allowed: in a folder that is there")


def save_json(path: str, results: Mapping[str, Any]) -> None:
    """Write what a command measured, and its environment, where a user says.

    Raises:
        UserError: it cannot be written.
    """
    with written(path):
        write_json(Path(path), {"environment": environment(), **results})
