"""``distprune doctor``: what a job stands on, checked on every rank before the queue is paid for."""

import fcntl
import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
import torch.distributed as torch_dist
from huggingface_hub.constants import ENDPOINT

from distprune import dist, settings, turns
from distprune.config import Config
from distprune.errors import UserError
from distprune.models.files import open_source
from distprune.paths import expanded
from distprune.plugins import hashes_of_modules
from distprune.pruning import native
from distprune.pruning.scores import build_score
from distprune.tasks import task_kind

_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "safetensors")
_MESSAGE_MIB = 64
_CONNECT_S = 5
_OFFLINE = "run distprune prepare on a node with a network, and set HF_HUB_OFFLINE=1"


class Finding(NamedTuple):
    """The outcome of one check, on one rank."""

    good: bool
    text: str
    advice: str = ""


def run(config_path: str | None, overrides: list[str]) -> None:
    """Print a line for each check, with what to do where it fails. Collective: every rank calls it.

    Raises:
        UserError: where a check fails, after all of them.
    """
    world = dist.init()
    config = dist.agree(lambda: settings.load(config_path, overrides))
    folder = expanded(config.train.output).absolute().parent
    checks: dict[str, Callable[[], Finding]] = {
        "versions": _versions,
        "classes": lambda: _classes(config),
        "devices": _devices,
        "network": _network,
        "shared disk": lambda: _shared(folder),
        "free disk": lambda: _free(folder, config),
        "locks": lambda: _locks(folder),
        "compiler": _compiler,
        "hub": lambda: _hub(config),
        "wandb": lambda: _wandb(config),
    }
    failed = [name for name, check in checks.items() if not _report(name, check())]
    dist.barrier()
    if failed:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; see the lines above")
    if world.rank == 0:
        print(f"all {len(checks)} checks passed on {world.size} ranks")
    dist.shutdown()


def _report(name: str, finding: Finding) -> bool:
    """Print what rank 0 found, or the first rank where it is bad; return whether it is good on all. Collective."""
    every = dist.gather([finding])
    bad = [(rank, each) for rank, each in enumerate(every) if not each.good]
    if dist.is_main():
        if bad:
            rank, worst = bad[0]
            print(f"FAIL  {name}: rank {rank} ({len(bad)} of {len(every)}): {worst.text}; {worst.advice}", flush=True)
        else:
            print(f"ok    {name}: {every[0].text}", flush=True)
    return not bad


def _versions() -> Finding:
    """Collective: every rank calls it."""
    mine = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    first, *_ = dist.gather([mine])
    others = [f"{name} {mine[name]} and not {first[name]}" for name in mine if mine[name] != first[name]]
    if others:
        return Finding(False, f"{', '.join(others)} as on rank 0", "use one environment on all nodes")
    return Finding(True, ", ".join(f"{name} {number}" for name, number in mine.items()))


def _classes(config: Config) -> Finding:
    """Find the kind of task and the score, which may be of another package. Collective: every rank calls it."""
    names, problem = (config.task.name, config.pruning.score), ""
    try:
        task_kind(config.task.name)
        build_score(config.pruning.score, config.train.seed, config.fisher)
    except UserError as error:
        problem = str(error)
    hashes = hashes_of_modules(*names)
    first, *_ = dist.gather([hashes])
    if problem:
        return Finding(False, problem, "give PYTHONPATH on all nodes")
    if hashes != first:
        return Finding(False, f"the modules of {' and '.join(names)} are not those of rank 0", "copy them to all nodes")
    return Finding(True, ", ".join(names))


def _devices() -> Finding:
    """Collective: every rank calls it."""
    cores = len(os.sched_getaffinity(0))
    if dist.on_gpu():
        device = torch.cuda.get_device_properties(dist.detect().device)
        what = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        what = f"CPU, {cores} cores, {torch.get_num_threads()} threads a rank"
    kinds = sorted(set(dist.gather([what])))
    hosts = dict.fromkeys(dist.gather([socket.gethostname()]))
    if len(kinds) > 1:
        return Finding(False, f"ranks differ: {'; '.join(kinds)}", "ask for nodes of one kind")
    if dist.on_gpu() and cores == 1:
        return Finding(
            False, "a rank has 1 core, and NCCL and autograd threads of their own", "ask for --cpus-per-task=8"
        )
    return Finding(True, f"{dist.detect().size} ranks on {len(hosts)} nodes ({', '.join(hosts)}), each {what}")


def _network() -> Finding:
    """Collective: every rank calls it."""
    tensor = torch.ones(_MESSAGE_MIB << 18, device=dist.detect().device)
    torch_dist.all_reduce(tensor)
    float(tensor[0])  # waits for the device
    began = time.perf_counter()
    torch_dist.all_reduce(tensor)
    total = float(tensor[0])
    took = time.perf_counter() - began
    world = dist.detect().size
    if world == 1:
        return Finding(True, "there is one rank alone")
    if total != world**2:
        return Finding(False, f"an all-reduce gave {total} and not {world**2}", "check the network's drivers")
    return Finding(
        True, f"an all-reduce of {_MESSAGE_MIB} MiB in {took * 1e3:.0f} ms, {_MESSAGE_MIB / took:,.0f} MiB/s"
    )


def _shared(folder: Path) -> Finding:
    """Collective: every rank calls it."""
    name = dist.gather([f".distprune-doctor-{secrets.token_hex(8)}"])[0]
    path = folder / name

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("here")

    try:
        turns.write_on_main(write, folder)
    except UserError as error:
        return Finding(False, str(error), "set train.output to a folder that can be written")
    seen = path.exists()
    dist.barrier()
    if dist.is_main():
        path.unlink()
    advice = "set train.output to a file system that all nodes share"
    return Finding(seen, f"{folder} {'is the same' if seen else 'is another one'} on all nodes", advice)


def _free(folder: Path, config: Config) -> Finding:
    if not folder.exists():
        return Finding(False, f"{folder} does not exist", "make it")
    try:
        free, needed = shutil.disk_usage(folder).free / 2**30, _needed_gib(config)
    except UserError as error:
        return Finding(False, str(error), "bring a model that a run can read")
    advice = (
        f"free {needed:,.0f} GiB: a checkpoint takes 12 bytes a weight, of which checkpoint.keep + 2 may be there, and "
        "a model takes 4"
    )
    return Finding(free >= needed, f"{free:,.0f} GiB in {folder}", advice)


def _needed_gib(config: Config) -> float:
    """Return what a run may need, of a model that is here; else what one of 400 million weights may."""
    directory, weights = expanded(config.model.path), 4e8
    if (directory / "config.json").exists():
        source = open_source(directory)
        weights = sum(prod(source.shape(name)) for name in source.file_of)
    checkpoints, models = config.checkpoint.keep + 2, 1 + 2 * (config.train.select == "best")
    return weights * (12 * checkpoints + 4 * models) / 2**30


def _locks(folder: Path) -> Finding:
    """Two runs in one directory are kept apart by a lock, where the file system has any."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Finding(False, f"{folder} has none: {error}", "make sure yourself that no two runs share a train.output")
    return Finding(True, f"{folder} has them")


def _compiler() -> Finding:
    if why := native.why_none():
        advice = "install gcc, or run distprune prepare where there is one and the home directory is the same"
        return Finding(False, f"nothing compiled before, and {why}", advice)
    return Finding(True, "the passes over the weights are compiled")


def _hub(config: Config) -> Finding:
    models = (config.model.path, config.model.tokenizer, config.teacher.path, config.pruning.weights_of)
    if config.task.hub is None and all(expanded(path).is_dir() for path in models if path):
        return Finding(True, "not needed: models and data are local")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return Finding(True, "HF_HUB_OFFLINE is set; distprune prepare must have run before")
    reached = _reaches(ENDPOINT)
    return Finding(reached, f"{ENDPOINT} is {'' if reached else 'not '}reached", _OFFLINE)


def _wandb(config: Config) -> Finding:
    if config.wandb.mode != "online":
        return Finding(True, f"wandb.mode is {config.wandb.mode}")
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    reached = not dist.is_main() or _reaches(server)
    return Finding(reached, f"{server} is {'' if reached else 'not '}reached", "set wandb.mode=offline, and sync later")


def _reaches(url: str) -> bool:
    """Return whether a server answers, over a proxy where the environment names one."""
    try:
        urlopen(url, timeout=_CONNECT_S).close()
    except HTTPError:
        return True  # which is an answer
    except (OSError, HTTPException, ValueError):
        return False
    return True
