"""The benchmarks measure what they say, on one rank and on several; nothing is asserted of time."""

import json
from pathlib import Path

import pytest

from distprune.benchmarks import memory
from distprune.engines.options import bf16_is_slow
from distprune.errors import UserError
from tests.distributed.processes import BIN, Command, start
from tests.distributed.runs import run_command
from tests.world import Worlds

TORCHRUN: Command = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "distprune"]


def bench(world: Worlds, arguments: Command, size: int = 2) -> str:
    """Run it on ranks that are there already; return what the first says."""
    answers = world(size).run(run_command, "bench", *arguments)
    assert [status for status, _ in answers] == [0] * size, answers
    return str(answers[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_select_prints_a_table_and_writes_json(world: Worlds, tmp_path: Path, size: int) -> None:
    out = tmp_path / "select.json"
    said = bench(world, ["select", "--sizes", "2e5", "3e6", "--repeat", "1", "--json", out], size)
    assert "3,000,000" in said
    written = json.loads(out.read_text())
    small, large = written["results"]
    assert written["environment"]["torch"]
    assert [small["weights"], large["weights"]] == [200_000, 3_000_000]
    assert small["ranks"] == size
    assert large["passes"] < small["passes"], "an interval saves passes"
    for each in (small, large):
        assert 0 < each["wire_bytes"] <= 64 * 1024
        assert each["collectives"] <= 12
        assert {"first", "next", "kthvalue", "topk"} == each["ratios"].keys()
        assert all(each[name] > 0 for name in ("read", "first", "next", "kthvalue", "topk"))


@pytest.mark.slow
def test_step_compares_pairs(world: Worlds, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["--model", "tiny", "--stage", "3", "--batch-size", "4", "--length", "8", "--repeat", "3"]
    bench(world, ["step", *options, "--json", out])
    (each,) = json.loads(out.read_text())["results"]
    assert (each["ranks"], each["stage"], each["dtype"]) == (2, 3, "bfloat16")
    assert [len(each[name]) for name in ("dense", "masked", "taught")] == [3, 3, 3]
    for ratio in (each["masked_ratio"], each["taught_ratio"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert each["masking"] > 0


@pytest.mark.slow
def test_checkpoint_compares_saves_with_a_plain_write(world: Worlds, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    options = ["--model", "tiny", "--stage", "3", "--repeat", "2", "--folder", tmp_path]
    bench(world, ["checkpoint", *options, "--json", out])
    (each,) = json.loads(out.read_text())["results"]
    assert (each["ranks"], each["stage"]) == (2, 3)
    assert 12 * 2_000_000 < each["bytes"] < 13 * 2_100_000, "weights, two moments and a mask of 2 million weights"
    assert all(len(each[name]) == 2 and min(each[name]) > 0 for name in ("plain", "waiting", "beside", "step"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"], "nothing is left over"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("select --repeat 0", "--repeat is 0 and --threads 1; allowed: at least 1"),
        ("step --model tiny --length 513", "--length is 513; allowed: 1 to the models' 512 tokens"),
        ("memory --model tiny --length 0", "--length is 0; allowed: 1 to"),
        ("checkpoint --model tiny --folder no/such", "--folder is 'no/such'; allowed: a directory"),
        ("select --repeat 0 --json no/such/x.json", "'no/such/x.json' cannot be written"),  # before all else
    ],
)
def test_what_cannot_be_measured_is_refused_on_all_ranks(world: Worlds, arguments: str, part: str) -> None:
    (status, said), (other, _) = world(2).run(run_command, "bench", *arguments.split())
    assert (status, other) == (2, 2)
    assert part in said


def test_the_memory_of_a_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory.dist, "on_gpu", lambda: True)
    with pytest.raises(UserError, match="bench memory measures the CPU's memory; allowed: DS_ACCELERATOR=cpu"):
        memory.measure(tmp_path, "minilm", {}, 8, 16, 1, None)


@pytest.mark.slow
def test_train_compares_with_the_trainer_of_transformers(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    options = ["--model", "tiny", "--steps", "3", "--repeat", "1", "--batch-size", "8"]
    # Under a launcher, whose ranks the Trainer's process must not join.
    done = start([*TORCHRUN, "bench", "train", *options, "--json", out])
    assert done.returncode == 0, done.stderr
    (each,) = json.loads(out.read_text())["results"]
    assert all(min(each[name]) > 0 for name in ("dense", "pruned", "cached", "live", "trainer", "same_options"))
    assert each["ratios"]["dense over trainer"] == pytest.approx(each["dense"][0] / each["trainer"][0])
    assert "cached step over step without teacher" in done.stdout


@pytest.mark.slow
def test_memory_is_what_the_plan_says(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    dtype = "fp32" if bf16_is_slow() else "bf16"  # without AVX-512 it takes minutes where it is emulated
    done = start([*TORCHRUN, "bench", "memory", "--dtype", dtype, "--repeat", "2", "--json", out])
    assert done.returncode == 0, done.stderr
    (each,) = json.loads(out.read_text())["results"]
    assert each["estimated"] == sum(each["parts"].values())
    assert each["estimated"] == pytest.approx(each["measured"], rel=0.15)
