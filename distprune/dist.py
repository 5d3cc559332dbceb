"""Which launcher started this process, the process group, and the few collectives that training needs.

One code path serves 1..N ranks: a process started by no launcher becomes a group of one.
"""

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as torch_dist

from distprune.errors import UserError

T = TypeVar("T")
_SHOWN = 80

LAUNCHER, _LOCAL_RANK = "DISTPRUNE_LAUNCHER", "DISTPRUNE_LOCAL_RANK"
"""What `init` found, for `detect` to find again: DeepSpeed wants every launcher's variables named as its own.

A sweep, which is its runs' launcher, sets the first itself.
"""


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    """Ranks of this node; None where the launcher does not tell."""

    @property
    def device(self) -> torch.device:
        """The device of this rank: its GPU where there is one, else the CPU."""
        if on_gpu():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


def on_gpu() -> bool:
    """Return whether ranks use GPUs: where there are any, unless DeepSpeed's DS_ACCELERATOR says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def detect() -> World:
    """Read the launcher's environment: deepspeed or torchrun, srun, or none of them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = env.get(LAUNCHER, "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed")
        size = int(env["WORLD_SIZE"])
        told = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE"))
        local_size = None if told is None else int(told)
        local_rank = int(env.get(_LOCAL_RANK, env.get("LOCAL_RANK", 0)))
        return World(launcher, int(env["RANK"]), size, local_rank, local_size)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        size = int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"]))
        counts = env.get("SLURM_STEP_TASKS_PER_NODE", str(size))
        local_size = _tasks_on_node(counts, int(env.get("SLURM_NODEID", 0)))
        return World("srun", int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size)
    return World("none", 0, 1, 0, 1)


def init() -> World:
    """Join the process group of the launcher that started this process. Collective: every rank calls it.

    Raises:
        UserError: a launcher that is not known, or more ranks than GPUs on a node.
    """
    _refuse_unknown_launchers()
    world = detect()
    if on_gpu():
        _refuse_crowded_gpus(world)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ |= _rendezvous(world)
    os.environ |= {
        LAUNCHER: world.launcher,
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        _LOCAL_RANK: str(world.local_rank),
        # DeepSpeed takes the device from it; SLURM may show each task one GPU only, number 0.
        "LOCAL_RANK": str(world.local_rank if world.device.index is None else world.device.index),
        "LOCAL_SIZE": str(world.local_size or world.size),
    }
    # DeepSpeed calls torch by names that torch means to retire; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    timeout = _timeout()
    # Gradients and weights go through groups of DeepSpeed's own, which get no timeout of it but torch's default.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch_dist.distributed_c10d, name, timeout)
    if on_gpu():
        torch.cuda.set_device(world.device)
        _keep_from_nvml()
    else:
        # Its shared-memory collective is for inference alone. Compiling it costs 20 to 90 s at the first start on a
        # machine, and a start that was killed meanwhile leaves a lock on which every later one waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu() else "gloo", auto_mpi_discovery=False, verbose=False, timeout=timeout
        )
    except torch_dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        shared = "ranks of a node share a GPU; allowed: a GPU for each rank"
        if world.rank > 0:  # rank 0, which speaks for all, may be on another node, and not know
            print(f"distprune: error: {shared}", file=sys.stderr)
        raise UserError(shared) from error
    return world


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def is_main() -> bool:
    """Return whether this is global rank 0."""
    return detect().rank == 0


def agree(action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; where it fails on any, fail on all. A process without a group is the only rank.

    Collective: every rank calls it. ``action`` may hold no collective that a failure would skip.

    Raises:
        UserError: on every rank, with the message of the lowest rank that failed.
        Exception: anything else that ``action`` raised, on the rank where it did.
    """
    if not torch_dist.is_initialized():
        return action()
    message, result, unexpected = None, None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except Exception as error:
        message, unexpected = f"rank {torch_dist.get_rank()} failed: {error!r}", error
    failed = [text for text in gather([message]) if text is not None]
    if unexpected is not None:
        raise unexpected
    if failed:
        raise UserError(failed[0])
    return result  # type: ignore[return-value]


def agree_equal(value: T, what: str) -> None:
    """Refuse where the ranks do not hold the same value. Collective: every rank calls it.

    Args:
        value: to be compared.
        what: its name for the message.

    Raises:
        UserError: on every rank, with the values of rank 0 and of the first that differs, shortened.
    """
    values = gather([value])
    for rank, other in enumerate(values):
        if other != values[0]:
            first, second = _differing_parts(str(values[0]), str(other))
            raise UserError(f"{what} on rank 0 are {first}, and on rank {rank} {second}; allowed: the same on all")


def _differing_parts(first: str, second: str) -> tuple[str, str]:
    """Return two texts whole where they are short, else from a little before they begin to differ."""
    if max(len(first), len(second)) <= _SHOWN:
        return first, second
    differing = next(place for place, (a, b) in enumerate(zip_longest(first, second)) if a != b)
    start = max(0, differing - _SHOWN // 2)
    return f"...{first[start : start + _SHOWN]}...", f"...{second[start : start + _SHOWN]}..."


def barrier() -> None:
    """Wait for all ranks, where there are others. Collective: every rank calls it."""
    if torch_dist.is_initialized():
        torch_dist.barrier()


def all_sum(values: list[float]) -> list[float]:
    """Return the sums over all ranks, in float64. Collective: every rank calls it with as many values."""
    tensor = torch.tensor(values, dtype=torch.float64, device=detect().device)
    torch_dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def gather(items: list[T]) -> list[T]:
    """Return the small items of all ranks, rank after rank. Collective: every rank calls it."""
    every: list[list[T]] = [items] * torch_dist.get_world_size()
    torch_dist.all_gather_object(every, items)
    return [item for rank in every for item in rank]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return every rank's rows, on the CPU, rank after rank.

    Collective: every rank calls it.

    Args:
        rows: shape [n, ...]; the same shape and type on every rank.

    Returns:
        Shape [world size * n, ...].
    """
    device = detect().device
    mine = rows.contiguous().to(device)
    every = torch.empty((torch_dist.get_world_size() * mine.shape[0], *mine.shape[1:]), dtype=mine.dtype, device=device)
    torch_dist.all_gather_into_tensor(every, mine)
    return every.cpu()


def _timeout() -> timedelta:
    """Return how long a rank waits for the others in a collective: seconds in DISTPRUNE_TIMEOUT, else 30 minutes.

    A rank that dies is noticed at once; this is for one whose node is cut off the network, and says nothing.
    """
    given = os.environ.get("DISTPRUNE_TIMEOUT", "1800")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"DISTPRUNE_TIMEOUT is {given!r}; allowed: a whole number of seconds from 1")
    return timedelta(seconds=int(given))


def _keep_from_nvml() -> None:
    """Have DeepSpeed ask torch for free memory where GPUs are named: for NVML it reads every name as a number."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    if not all(gpu.strip().isdecimal() for gpu in shown):
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None


def _tasks_on_node(counts: str, node: int) -> int:
    """Read SLURM's run-length list of tasks per node, e.g. ``2(x3),1``."""
    per_node: list[int] = []
    for part in counts.split(","):
        tasks, _, repeat = part.partition("(x")
        per_node += [int(tasks)] * int(repeat.rstrip(")") or 1)
    return per_node[node]


def _rendezvous(world: World) -> dict[str, str]:
    """Return the address and port where the ranks meet, as far as the launcher has not set them."""
    env = os.environ
    set_already = {name: env[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in env}
    if len(set_already) == 2:
        return {}
    if world.launcher == "srun":
        names = ["scontrol", "show", "hostnames", env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])]
        try:
            hosts = subprocess.run(names, check=True, capture_output=True, text=True).stdout.split()
        except FileNotFoundError as error:
            raise UserError(
                "there is no scontrol here, as in a container; allowed: slurm/train.sbatch, or MASTER_ADDR and "
                "MASTER_PORT set"
            ) from error
        port = 20000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 10000
        return {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(port)} | set_already
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | set_already


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refuse_unknown_launchers() -> None:
    """Refuse to be one of several processes that each take themselves for the only one."""
    env = os.environ
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"):
        if int(env.get(name, 1)) > 1 and detect().launcher == "none":
            raise UserError(
                f"{name} is {env[name]}: mpirun is not known to distprune; allowed: the deepspeed launcher, torchrun, "
                "srun, or RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set for each process"
            )


def _refuse_crowded_gpus(world: World) -> None:
    """Refuse several ranks on one GPU, which NCCL does not do. SLURM may show each task but one of several."""
    gpus = torch.cuda.device_count()
    if world.size > 1 and not {_LOCAL_RANK, "LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys():
        raise UserError("LOCAL_RANK is not set; allowed: the number of the GPU for each rank")
    if world.local_size is not None and 1 < gpus < world.local_size:
        raise UserError(f"there are {world.local_size} ranks on a node with {gpus} GPUs; allowed: a GPU for each rank")
