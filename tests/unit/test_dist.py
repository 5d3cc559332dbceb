"""Launchers by their environments; the collectives need ranks and are tested in tests/distributed."""

import os
import re

import deepspeed
import pytest
import torch.distributed as torch_dist
from deepspeed.accelerator import cuda_accelerator
from hypothesis import given
from hypothesis import strategies as st

from distprune import dist
from distprune.dist import World, detect
from distprune.errors import UserError

LAUNCHED = re.compile("RANK|WORLD_SIZE|LOCAL_|TORCHELASTIC_|SLURM_|MASTER_|OMPI_|PMI_|MPI_")

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_NODELIST": "n[1-4]",
    "SLURM_STEP_NODELIST": "n[2-4]",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """Set the launcher's variables, and no other's."""
    for name in [name for name in os.environ if LAUNCHED.match(name)]:
        monkeypatch.delenv(name)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_no_launcher_is_a_world_of_one() -> None:
    assert detect() == World("none", rank=0, size=1, local_rank=0, local_size=1)
    assert dist.is_main()


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        (TORCHRUN, World("torchrun", rank=3, size=4, local_rank=1, local_size=2)),
        (DEEPSPEED, World("deepspeed", rank=3, size=4, local_rank=1, local_size=2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World("deepspeed", rank=1, size=2, local_rank=0, local_size=None)),
        (SRUN, World("srun", rank=3, size=5, local_rank=1, local_size=2)),
        (SRUN | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, World("srun", 3, 5, local_rank=0, local_size=1)),
    ],
)
def test_each_launcher_is_known_by_its_environment(environment, variables: dict[str, str], world: World) -> None:
    environment(variables)
    assert detect() == world


def test_a_step_without_its_own_counts_has_those_of_the_job(environment) -> None:
    environment({name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP_")})
    environment({"SLURM_STEP_ID": "0", "SLURM_NODEID": "0"})
    assert detect() == World("srun", rank=3, size=8, local_rank=1, local_size=8)


@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED])
def test_a_launcher_inside_of_an_allocation_wins(environment, launcher: dict[str, str]) -> None:
    environment(SRUN | launcher)
    assert detect().rank == 3
    assert detect().size == 4


def test_a_batch_script_that_no_srun_started_is_no_rank(environment) -> None:
    environment({name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP_")})
    assert detect().launcher == "none"


@pytest.mark.parametrize(("variables", "main"), [(TORCHRUN, False), (SRUN | {"SLURM_PROCID": "0"}, True)])
def test_rank_0_is_the_main_one(environment, variables: dict[str, str], main: bool) -> None:
    environment(variables)
    assert dist.is_main() is main


@pytest.mark.parametrize(
    ("counts", "per_node"),
    [("4", [4]), ("2(x3)", [2, 2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("8,4(x2),16", [8, 4, 4, 16]), ("1(x12)", [1] * 12)],
)
def test_tasks_on_a_node(counts: str, per_node: list[int]) -> None:
    assert [dist._tasks_on_node(counts, node) for node in range(len(per_node))] == per_node
    with pytest.raises(IndexError):
        dist._tasks_on_node(counts, len(per_node))


@given(st.lists(st.tuples(st.integers(1, 128), st.integers(1, 5)), min_size=1, max_size=6))
def test_run_length_lists_are_read_back(runs: list[tuple[int, int]]) -> None:
    counts = ",".join(f"{tasks}(x{times})" if times > 1 else str(tasks) for tasks, times in runs)
    per_node = [tasks for tasks, times in runs for _ in range(times)]
    assert [dist._tasks_on_node(counts, node) for node in range(len(per_node))] == per_node


def test_the_meeting_point_of_a_launcher_is_kept(environment) -> None:
    environment(TORCHRUN | {"MASTER_ADDR": "host", "MASTER_PORT": "1"})
    assert dist._rendezvous(detect()) == {}


def test_ranks_of_a_step_meet_on_its_first_node_at_a_port_of_their_own(
    environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def scontrol(command: list[str], **_: object):
        asked.append(command)
        return dist.subprocess.CompletedProcess(command, 0, stdout="n2\nn3\nn4\n")

    monkeypatch.setattr(dist.subprocess, "run", scontrol)
    environment(SRUN)
    first = dist._rendezvous(detect())
    assert first["MASTER_ADDR"] == "n2"
    assert asked == [["scontrol", "show", "hostnames", "n[2-4]"]]
    environment({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert dist._rendezvous(detect()) == first, "every rank finds the same"
    environment({"MASTER_PORT": "29511"})
    assert dist._rendezvous(detect()) == first | {"MASTER_PORT": "29511"}, "what was set is kept"
    monkeypatch.delenv("MASTER_PORT")
    environment({"SLURM_STEP_ID": "1"})
    assert dist._rendezvous(detect())["MASTER_PORT"] != first["MASTER_PORT"], "another step has another port"


def test_a_process_alone_meets_itself() -> None:
    meeting = dist._rendezvous(detect())
    assert meeting["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(meeting["MASTER_PORT"]) < 2**16


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"])
def test_a_launcher_that_is_not_known_is_refused(environment, name: str) -> None:
    environment({name: "1"})
    dist._refuse_unknown_launchers()
    environment({name: "4"})
    with pytest.raises(UserError, match=f"{name} is 4: mpirun is not known"):
        dist._refuse_unknown_launchers()
    environment(SRUN)  # srun may set PMI's variables beside its own
    dist._refuse_unknown_launchers()


@pytest.mark.parametrize(
    ("gpus", "local_size", "crowded"),
    [(4, 4, False), (4, 8, True), (1, 8, False), (8, 2, False), (8, None, False)],
)
def test_ranks_that_would_share_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_size: int | None, crowded: bool
) -> None:
    """One GPU in sight may be another one for each rank, as SLURM can show them."""
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "0")
    world = World("srun", 0, 16, 0, local_size)
    if not crowded:
        dist._refuse_crowded_gpus(world)
        return
    with pytest.raises(UserError, match="8 ranks on a node with 4 GPUs"):
        dist._refuse_crowded_gpus(world)


def test_ranks_on_gpus_must_know_their_own(monkeypatch: pytest.MonkeyPatch, environment) -> None:
    environment({"RANK": "1", "WORLD_SIZE": "8"})
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK is not set"):
        dist._refuse_crowded_gpus(dist.detect())
    environment({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    dist._refuse_crowded_gpus(dist.detect())


@pytest.mark.parametrize(
    ("said", "expected", "message"),
    [
        (
            "ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 0 and rank 1",
            UserError,
            "ranks of a node share",
        ),
        ("ncclSystemError", torch_dist.DistBackendError, "ncclSystemError"),
    ],
)
def test_ranks_that_nccl_finds_on_one_gpu_are_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, said: str, expected: type[Exception], message: str
) -> None:
    """Those that share one say so, as rank 0 may be elsewhere."""

    def refuse(**_: object) -> None:
        raise torch_dist.DistBackendError(said)

    monkeypatch.setattr(deepspeed, "init_distributed", refuse)
    monkeypatch.setattr(os, "environ", os.environ | TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(torch_dist.distributed_c10d, name, None)
    with pytest.raises(expected, match=message):
        dist.init()
    assert (message in capsys.readouterr().err) == (expected is UserError)


@pytest.mark.parametrize(("shown", "asked"), [("0,1", True), ("GPU-8a56,GPU-77c1", False)])
def test_gpus_by_name_are_kept_from_nvml(monkeypatch: pytest.MonkeyPatch, shown: str, asked: bool) -> None:
    monkeypatch.setattr(cuda_accelerator, "pynvml", "as imported")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    dist._keep_from_nvml()
    assert (cuda_accelerator.pynvml is not None) == asked
