"""Every way in which a person starts a run, as processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from distprune.commands import export
from tests.distributed.engines import write_model
from tests.distributed.processes import BIN, REPOSITORY, Command, environment, srun_variables, start
from tests.distributed.runs import run_command
from tests.world import Worlds


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


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_a_mistake_is_said_once_and_every_rank_fails(task: Path, tmp_path: Path, launcher: str) -> None:
    starter, _ = STARTERS[launcher]
    done = starter(["train", task / "run.yaml", f"train.output={tmp_path / 'run'}", "task.label=labl"], tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("distprune: error:")]
    assert len(said) == 1, done.stderr
    assert "did you mean 'label'?" in said[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_eval_gives_the_same_number_alone_and_on_two_ranks(world: Worlds, task: Path) -> None:
    arguments: Command = ["eval", task / "model", task / "run.yaml"]
    ((_, alone),) = world(1).run(run_command, *arguments)
    (_, several), _ = world(2).run(run_command, *arguments)
    first, second = (json.loads(said.strip().splitlines()[-1]) for said in (alone, several))
    assert first == second
    assert (first["encoder_zeros"], first["dtype"]) == (0, "float32")


def test_eval_measures_a_shrunk_model(world: Worlds, task: Path, tmp_path: Path) -> None:
    ((status, _),) = world(1).run(
        run_command, "oneshot", task / "model", tmp_path / "whole", "pruning.sparsity=0.5", "pruning.structure=heads"
    )
    assert status == 0
    export.run(str(tmp_path / "whole"), str(tmp_path / "small"), shrinking=True)
    found = []
    for name, size, stage in (("whole", 1, 0), ("small", 1, 0), ("small", 2, 3)):
        place = f"deepspeed.teacher.zero_optimization.stage={stage}"
        (_, said), *_ = world(size).run(run_command, "eval", tmp_path / name, task / "run.yaml", place)
        found.append(json.loads(said.strip().splitlines()[-1]))
    whole, *small = found
    for each in small:
        assert each["accuracy"] == whole["accuracy"]
        assert each["encoder_weights"] - each["encoder_zeros"] == whole["encoder_weights"] - whole["encoder_zeros"]
        assert each["encoder_weights"] < whole["encoder_weights"], "an empty layer keeps a head, all zeros"


@pytest.mark.slow
def test_oneshot_is_the_same_alone_and_on_two_ranks(world: Worlds, tmp_path: Path) -> None:
    """The files of a sharded model are dealt out to the ranks; heads lie in several of them."""
    model = write_model(tmp_path / "model", hidden_size=16, intermediate_size=24, num_attention_heads=4)
    sharded = AutoModelForSequenceClassification.from_pretrained(model)
    sharded.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    arguments: Command = ["oneshot", tmp_path / "sharded"]
    heads = ("pruning.sparsity=0.4", "pruning.structure=heads")
    ((status, said),) = world(1).run(run_command, *arguments, tmp_path / "alone", *heads)
    several = world(2).run(run_command, *arguments, tmp_path / "several", *heads)
    assert [status, *(each for each, _ in several)] == [0, 0, 0], said + several[0][1]
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
    oneshot = ("oneshot", task / "model", tmp_path / "pruned")
    overrides = ("pruning.sparsity=0.4", f"pruning.score={score}")
    ((refused, said),) = world(1).run(run_command, *oneshot, *overrides)
    assert refused == 2
    assert f"pruning.score is {score!r}, which needs gradients; allowed: with a CONFIG" in said
    run = tmp_path / "run.yaml"  # what only a whole run can do does not matter
    run.write_text(f"base: {task / 'run.yaml'}\n{OF_A_WHOLE_RUN}")
    if score == "taylor":  # in a process of its own, which no launcher has started
        done = start([BIN / "distprune", *oneshot, run, *overrides])
        status, said = done.returncode, done.stderr
    else:
        ((status, said),) = world(1).run(run_command, *oneshot, run, *overrides)
    assert status == 0, said
    dense = AutoModelForSequenceClassification.from_pretrained(task / "model").state_dict()
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pruned").state_dict()
    gone = {name: (pruned[name] == 0) & (dense[name] != 0) for name in dense}
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert (
        sum(int(each.sum()) for each in gone.values())
        == record["masked_weights"]
        == int(0.4 * record["prunable_weights"])
    )
    moved = any(bool((pruned[name] != dense[name])[~each].any()) for name, each in gone.items())
    assert moved == (score == "obs"), "what is not pruned is as it was, but for what obs makes up for"


@pytest.mark.slow
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
