"""Every way in which a person starts a run, as processes of their own."""

import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.distributed.engines import write_model
from tests.distributed.runs import run_command
from tests.world import Worlds

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
Command = list[str | Path]


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, and with some others."""
    launchers = ("SLURM_", "RANK", "WORLD_")
    kept = {name: each for name, each in os.environ.items() if name == "SLURM_CONF" or not name.startswith(launchers)}
    return kept | {"VENV": sys.prefix, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | variables


def start(command: Command, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=200,
    )


def srun_variables(tasks: int, tmp_path: Path) -> list[dict[str, str]]:
    """Return what srun sets for each task on one node, and a PATH with a scontrol."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text("#!/bin/sh\necho localhost\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    slurm = {
        "SLURM_JOB_ID": str(random.randrange(10000)),
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
        "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost",
        "PATH": f"{scontrol.parent}{os.pathsep}{environment()['PATH']}",
    }
    return [slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(tasks)]


def srun(arguments: Command, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Start two tasks as srun does: with SLURM's variables, and scontrol in the path."""
    command = [sys.executable, "-m", "distprune", *map(str, arguments)]
    tasks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in srun_variables(2, tmp_path)
    ]
    ended = [each.communicate(timeout=200) for each in tasks]
    codes = [each.returncode for each in tasks]
    assert len(set(codes)) == 1, f"tasks ended differently: {codes}"
    return subprocess.CompletedProcess(command, codes[0], *("".join(texts) for texts in zip(*ended, strict=True)))


Starter = Callable[[Command, Path], subprocess.CompletedProcess[str]]
STARTERS: dict[str, tuple[Starter, int]] = {
    "none": (lambda arguments, _: start([BIN / "distprune", *arguments]), 1),
    "deepspeed": (lambda arguments, _: start(["launch/local.sh", "-n", "2", *arguments[1:]]), 2),
    "torchrun": (
        lambda arguments, _: start(
            [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "distprune", *arguments]
        ),
        2,
    ),
    "srun": (srun, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["none", "deepspeed", "torchrun", "srun"])
def test_a_run_finds_out_who_started_it(task: Path, tmp_path: Path, launcher: str) -> None:
    starter, size = STARTERS[launcher]
    done = starter(["train", task / "run.yaml", f"train.output={tmp_path / 'run'}", "train.epochs=2.5"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["launcher"], summary["world_size"], summary["steps"]) == (launcher, size, 20)
    assert "step 20/20" in done.stdout
    assert done.stdout.count("plot.png") == 1, "one rank reports"


@pytest.mark.parametrize(
    "launcher", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed", "srun"))]
)
def test_a_mistake_is_said_once_and_every_rank_fails(task: Path, tmp_path: Path, launcher: str) -> None:
    starter, _ = STARTERS[launcher]
    done = starter(["train", task / "run.yaml", f"train.output={tmp_path / 'run'}", "task.label=labl"], tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("distprune: error:")]
    assert len(said) == 1, done.stderr
    assert "did you mean 'label'?" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_debug_shows_where_a_mistake_was_found(task: Path, tmp_path: Path) -> None:
    arguments: Command = [BIN / "distprune", "train", task / "run.yaml", f"train.output={tmp_path / 'run'}"]
    done = start([*arguments, "task.label=labl"], DISTPRUNE_DEBUG="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_eval_gives_the_same_number_alone_and_under_a_launcher(world: Worlds, task: Path) -> None:
    arguments: Command = ["eval", task / "model", task / "run.yaml"]
    ((_, alone),) = world(1).run(run_command, *arguments)
    several = start([BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "distprune", *arguments])
    first, second = (json.loads(said.strip().splitlines()[-1]) for said in (alone, several.stdout))
    assert first == second
    assert first["encoder_zeros"] == 0


@pytest.mark.slow
def test_oneshot_is_the_same_alone_and_under_a_launcher(world: Worlds, tmp_path: Path) -> None:
    """The files of a sharded model are dealt out to the ranks; heads lie in several of them."""
    model = write_model(tmp_path / "model", hidden_size=16, intermediate_size=24, num_attention_heads=4)
    sharded = AutoModelForSequenceClassification.from_pretrained(model)
    sharded.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    arguments: Command = ["oneshot", tmp_path / "sharded", "--sparsity", "0.4", "--structure", "heads"]
    ((status, said),) = world(1).run(run_command, *arguments, tmp_path / "alone")
    two = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "distprune"]
    several = start([*two, *arguments, tmp_path / "several"])
    assert (status, several.returncode) == (0, 0), said + several.stderr
    files = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    for name in files:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


OF_A_WHOLE_RUN = """
recipe: {name: gmp, epochs: 1}
pruning: {sparsity: 0}
train: {select: best, patience: 2}
checkpoint: {steps: 1}
regrowth: {part: 0.5, every: 1 steps}
distillation: {hidden: 1}
"""


@pytest.mark.slow
@pytest.mark.parametrize("score", ["taylor", "movement", "obs"])
def test_oneshot_takes_gradients_from_data(world: Worlds, task: Path, tmp_path: Path, score: str) -> None:
    oneshot = ("oneshot", task / "model", tmp_path / "pruned", "--sparsity", "0.4", "--score", score)
    ((refused, said),) = world(1).run(run_command, *oneshot)
    assert refused == 2
    assert f"--score {score} needs gradients; allowed: with --config FILE" in said
    run = tmp_path / "run.yaml"  # what only a whole run can do does not matter
    run.write_text(f"base: {task / 'run.yaml'}\n{OF_A_WHOLE_RUN}")
    ((status, said),) = world(1).run(run_command, *oneshot, "--config", run)
    assert status == 0, said
    dense = AutoModelForSequenceClassification.from_pretrained(task / "model").state_dict()
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").state_dict()
    gone = {name: (pruned[name] == 0) & (dense[name] != 0) for name in dense}
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert sum(int(each.sum()) for each in gone.values()) == record["masked"] == int(0.4 * record["prunable"])
    moved = any(bool((pruned[name] != dense[name])[~each].any()) for name, each in gone.items())
    assert moved == (score == "obs"), "what is not pruned is as it was, but for what obs makes up for"


def test_deepspeeds_own_groups_wait_as_long_as_was_asked() -> None:
    """DeepSpeed hands no timeout on to them."""
    script = """
import torch
from deepspeed.utils import groups
from distprune import dist
dist.init()
print(groups._clone_world_group()._get_backend(torch.device("cpu")).options._timeout)
dist.shutdown()
"""
    done = start([sys.executable, "-c", script], DISTPRUNE_TIMEOUT="77")
    assert done.stdout.splitlines()[-1] == "0:01:17", done.stderr
