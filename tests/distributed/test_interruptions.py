"""Real processes that are told to stop, or killed: what they say, how they end, and that nothing is lost."""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as torch_dist

from distprune import dist
from distprune.checkpoints import files
from distprune.checkpoints.files import Manifest
from distprune.engines.batches import eval_batches
from distprune.training.heartbeat import Heartbeat, is_fault
from distprune.training.interrupts import Interrupted
from tests.distributed.processes import BIN, SLOW_TASK, Started, srun_variables, steps
from tests.distributed.runs import DENSE, RATE, OnLastRank, cut_off, run, run_command, run_patched, same_weights, told
from tests.world import Worlds

# Long enough that a signal on a fast machine comes before the end.
LONG = ("train.epochs=12", "checkpoint.steps=20", "train.log_every=1", "train.eval_every=3 epochs")


def local(task: Path, output: Path, ranks: int = 2) -> list[str]:
    arguments = [str(task / "run.yaml"), f"train.output={output}", *LONG]
    return ["launch/local.sh", "-n", str(ranks), *arguments]


def alone(task: Path, output: Path) -> list[str]:
    return [str(BIN / "distprune"), "train", str(task / "run.yaml"), f"train.output={output}", *LONG]


def checkpoints(output: Path) -> list[str]:
    folder = output / "checkpoints"
    return sorted(path.name for path in folder.glob("step-*")) if folder.exists() else []


@pytest.fixture(scope="module")
def whole(world: Worlds, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that nothing happened to, on two ranks."""
    output = tmp_path_factory.mktemp("whole") / "run"
    world(2).run(run, task, output, *LONG)
    return output


@pytest.mark.slow
def test_a_signal_saves_and_stops_all_ranks_and_the_same_command_goes_on(
    begin: Callable[..., Started], world: Worlds, task: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    step = 0
    for number in (signal.SIGINT, signal.SIGUSR1):
        started = begin(local(task, output))
        started.wait_for(lambda step=step: steps(output) >= step + 4)
        started.process.send_signal(number)
        assert started.end() == 75
        assert (f"from step {step} (" in started.said) == (step > 0)
        stopped = re.search(r"stopped after step (\d+), as asked; the same command goes on from there", started.said)
        assert stopped, started.said
        step = int(stopped[1])
        assert checkpoints(output)[-1] == f"step-{step:08d}"
        assert not list((output / "checkpoints").glob("saving-*"))
    assert world(2).run(run, task, output, *LONG)[0]["steps"] == told(whole)[-1]["step"]
    assert same_weights(whole, output)
    assert told(output) == told(whole)


def ask_to_stop(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(task: Path, output: Path, *overrides: str) -> str:
    try:
        return str(run_patched(RATE, OnLastRank(ask_to_stop), task, output, *overrides))
    except Interrupted as error:
        return str(error)


def test_all_ranks_stop_after_the_step_in_which_one_is_asked(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(stopped, task, tmp_path / "run")
    assert said == ["stopped after step 6, as asked; the same command goes on from there"] * 2
    assert checkpoints(tmp_path / "run") == ["step-00000006"]


def stopped_on_a_full_disk(task: Path, output: Path) -> str:
    complete = files.complete

    def refuse(folder: Path, manifest: Manifest) -> None:
        if manifest.step == 6:
            raise OSError(28, "No space left on device")
        complete(folder, manifest)

    with patch.object(files, "complete", refuse):
        return stopped(task, output, "checkpoint.steps=4")


def test_it_is_said_where_a_run_goes_on_whose_last_save_failed(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(1).run(stopped_on_a_full_disk, task, tmp_path / "run")
    assert said == ["stopped after step 6, as asked; the same command goes on from step 4"]


def fail(_: Any) -> None:
    raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


def command_with_a_fault(task: Path, output: Path, note: Path) -> tuple[int, str]:
    with patch(RATE, OnLastRank(fail)), patch.dict(os.environ, {"DISTPRUNE_ENDED": str(note)}):
        return run_command("train", task / "run.yaml", f"train.output={output}")


def test_a_device_that_fails_is_no_end_of_the_run(world: Worlds, task: Path, tmp_path: Path) -> None:
    ((status, said),) = world(1).run(command_with_a_fault, task, tmp_path / "run", tmp_path / "ended")
    assert status == 76
    assert "distprune: error: rank 0: CUDA error: uncorrectable ECC error encountered; the run ends, and" in said
    assert not (tmp_path / "ended").exists(), "slurm/train.sbatch takes it for a mistake or a bug"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch_dist.DistBackendError("NCCL error: Failed to CUDA calloc 6291456 bytes"), False),
        (torch_dist.DistBackendError("NCCL error"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("gloo/transport"), False),
    ],
    ids=str,
)
def test_a_fault_is_of_a_device_or_a_connection(error: Exception, expected: bool) -> None:
    assert is_fault(error) == expected


def told_to_stop(task: Path, output: Path, *overrides: str) -> tuple[str, bool]:
    """Run, with SLURM's signal for the last rank within its sixth step. Collective."""
    signals = OnLastRank(lambda engine: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        return str(run_patched(RATE, signals, task, output, *overrides)), False
    except Interrupted as interrupted:
        return str(interrupted), interrupted.requeue


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "done"),
    [
        (("train.eval_every=6 steps",), 6),
        (("pruning.score=obs", "fisher.samples=3", "pruning.start=5 steps", "pruning.end=17 steps"), 5),
    ],
    ids=["an evaluation is due", "gradients are taken for a score"],
)
def test_a_run_that_is_told_to_stop_saves_before_what_takes_long(
    world: Worlds, task: Path, tmp_path: Path, options: tuple[str, ...], done: int
) -> None:
    world(2).run(run, task, tmp_path / "whole", *options)
    said = world(2).run(told_to_stop, task, tmp_path / "run", *options)
    assert said == [(f"stopped after step {done}, as asked; the same command goes on from there", True)] * 2
    assert all(record["step"] < done for record in told(tmp_path / "run") if record["split"] == "validation")
    world(2).run(run, task, tmp_path / "run", *options)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def told_to_stop_on_a_full_disk(task: Path, output: Path, *overrides: str) -> tuple[str, bool]:
    """Collective."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("distprune.disk.write_tensors", side_effect=full):
        return told_to_stop(task, output, *overrides)


def test_a_job_that_goes_on_and_can_save_nothing_more_is_not_queued_again(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    options = ("checkpoint.steps=2", *DENSE)
    cut_off(world, 2, task, tmp_path / "run", 5, *options)
    began = int(checkpoints(tmp_path / "run")[-1].removeprefix("step-"))
    said = world(2).run(told_to_stop_on_a_full_disk, task, tmp_path / "run", *options)
    why = f"the same command goes on from step {began}; the job is not queued again, as nothing of it could be saved"
    assert said == [(f"stopped after step {began + 6}, as asked; {why}", False)] * 2


class InEvaluation:
    """Stands in for `eval_batches`: before its second batch the last rank gets SLURM's signal, once."""

    told = False

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(eval_batches(*arguments)):
            if number == 1 and not self.told and torch_dist.get_rank() == torch_dist.get_world_size() - 1:
                self.told = True
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batch


def told_in_evaluation(task: Path, output: Path, *overrides: str) -> tuple[str, bool]:
    """Collective."""
    try:
        return str(
            run_patched("distprune.engines.evaluate.eval_batches", InEvaluation(), task, output, *overrides)
        ), False
    except Interrupted as interrupted:
        return str(interrupted), interrupted.requeue


def test_an_evaluation_ends_where_a_run_is_told_to_stop(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("train.eval_every=6 steps", "train.eval_batch_size=4")
    world(2).run(run, task, tmp_path / "whole", *options)
    said = world(2).run(told_in_evaluation, task, tmp_path / "run", *options)
    assert said == [("stopped after step 6, as asked; the same command goes on from there", True)] * 2
    assert not [record for record in told(tmp_path / "run") if record["split"] == "validation"]
    world(2).run(run, task, tmp_path / "run", *options)
    assert told(tmp_path / "run") == told(tmp_path / "whole")


class BusyStore:
    """Stands in for the ranks' store: its second request fails."""

    def __init__(self) -> None:
        self.set_to: list[str] = []

    def set(self, key: str, value: str) -> None:
        self.set_to.append(value)
        if len(self.set_to) == 2:
            raise torch_dist.DistNetworkError("timed out")


def test_a_heart_goes_on_beating_behind_a_request_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = BusyStore()
    monkeypatch.setattr("distprune.training.heartbeat.connect_store", lambda: store)
    monkeypatch.setattr("distprune.training.heartbeat.PERIOD_S", 0.01)
    with Heartbeat(replace(dist.detect(), size=2)):
        deadline = time.monotonic() + 20
        while len(store.set_to) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert store.set_to[:5] == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_ctrl_c_stops_a_process_that_no_launcher_started_and_a_second_one_kills_it(
    begin: Callable[..., Started], task: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    started = begin(alone(task, output))
    started.wait_for(lambda: steps(output) >= 3)
    started.process.send_signal(signal.SIGINT)
    assert started.end() == 75
    hurried = begin(alone(task, tmp_path / "other"))
    hurried.wait_for(lambda: steps(tmp_path / "other") >= 3)
    hurried.process.send_signal(signal.SIGINT)
    hurried.process.send_signal(signal.SIGINT)
    assert hurried.end(20) in (75, 1, 130, -signal.SIGINT), hurried.said


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_before_its_first_step_ends_and_no_rank_counts_as_lost(
    begin: Callable[..., Started], task: Path, tmp_path: Path
) -> None:
    """Rank 1 hears it in a slow import; rank 0 waits for it in a collective, and then as it is gone."""
    (tmp_path / "slow.py").write_text(SLOW_TASK)
    words = {"DISTPRUNE_ENDED": str(tmp_path / "ended"), "DISTPRUNE_REQUEUE": str(tmp_path / "requeue")}
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = [
        begin([*alone(task, tmp_path / "run"), "task.name=slow:Slow"], **each, **words, BEGUN=str(tmp_path / "begun"))
        for each in srun_variables(2, tmp_path, PYTHONPATH=path)
    ]
    for number, rank in enumerate(ranks):
        rank.wait_for((tmp_path / f"begun.{number}").exists)
    for rank in ranks:
        rank.process.send_signal(signal.SIGUSR1)
    assert [rank.end() for rank in ranks] == [75, 75], [rank.said for rank in ranks]
    assert "distprune: ended outside of training, as asked; the same command goes on" in ranks[0].said
    assert "Traceback" not in ranks[0].said + ranks[1].said
    assert (tmp_path / "ended").read_text() == "75\n"
    assert (tmp_path / "requeue").read_text() == "outside of training\n"


@pytest.mark.slow
def test_a_killed_rank_is_named_and_ends_the_others(
    begin: Callable[..., Started], world: Worlds, task: Path, tmp_path: Path, whole: Path
) -> None:
    output = tmp_path / "run"
    done = 0
    for rank in (0, 1):
        ranks = [begin(alone(task, output), **each) for each in srun_variables(2, tmp_path)]
        ranks[0].wait_for(lambda done=done: steps(output) >= done + 12)
        began = time.monotonic()
        ranks[rank].process.kill()
        assert ranks[1 - rank].end(60) == 76
        assert time.monotonic() - began < 60
        assert f"distprune: error: rank {rank} does not answer any more" in ranks[1 - rank].said
        done = steps(output)
    assert world(2).run(run, task, output, *LONG)[0]["steps"] == told(whole)[-1]["step"]
    assert same_weights(whole, output)
    assert told(output) == told(whole)
