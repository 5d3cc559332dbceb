"""Kills a run again and again, at random moments, and compares what it ends with to a run that nothing happened to.

``python -m tests.soak --kills 50 --seed 1 --log soak.jsonl``: two ranks, fp32, killed with SIGKILL in turn at any time,
in the middle of a save, and around a pruning step. Exits with 1 where a run is lost or ends with other weights.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.processes import BIN, REPOSITORY, environment, srun_variables, steps
from tests.distributed.runs import write_task

PRUNINGS = range(4, 400, 4)
OPTIONS = (
    "train.epochs=60",
    "pruning.end=400 steps",
    "checkpoint.steps=1",
    "train.log_every=1",
    "train.eval_every=10 epochs",
    "deepspeed.student.zero_optimization.stage=3",
    "model.dropout=0.1",
)
"""480 steps: dense to step 4, pruned every fourth step up to step 400, and a frozen mask from there on."""


def begin(task: Path, output: Path, scratch: Path) -> list[subprocess.Popen[bytes]]:
    """Start two ranks, each a process of its own."""
    command = [str(BIN / "distprune"), "train", str(task / "run.yaml"), f"train.output={output}", *OPTIONS]
    with (scratch / "log").open("a") as log:
        return [
            subprocess.Popen(command, cwd=REPOSITORY, env=environment(**each), stdout=log, stderr=log)
            for each in srun_variables(2, scratch)
        ]


def saving(output: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any((output / "checkpoints").glob("saving-*/*"))


def wait_for_the_moment(kind: str, output: Path, done: int, rng: random.Random, rank: subprocess.Popen[bytes]) -> bool:
    """Wait for a moment of a kind, some steps on; return whether it came before the run had ended."""
    target = done + rng.randrange(3, 40)
    if kind == "pruning":
        target = next((step for step in PRUNINGS if step >= target), target)
    while steps(output) < target:
        if rank.poll() is not None:
            return False
        time.sleep(0.001)
    if kind == "any":
        time.sleep(rng.random() * 0.05)
    while kind == "saving" and not saving(output):
        if rank.poll() is not None:
            return False
    return True


def same(first: Path, second: Path) -> bool:
    """Return whether two runs ended with the same bits."""
    weights, others = (load_file(path / "final" / "model.safetensors") for path in (first, second))
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def main() -> int:
    """Kill as often as asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    scratch = Path(tempfile.mkdtemp(prefix="soak-"))
    task = write_task(scratch, hardness=0.5)
    whole = scratch / "whole"
    assert [each.wait() for each in begin(task, whole, scratch)] == [0, 0], (scratch / "log").read_text()[-2000:]
    kills, runs, lost = 0, 0, 0
    while kills < options.kills:
        runs += 1
        output = scratch / f"run-{runs}"
        while not (output / "summary.json").exists():
            ranks = begin(task, output, scratch)
            kind = ("any", "saving", "pruning")[kills % 3]
            done = steps(output)
            record: dict[str, Any] = {"kill": kills + 1, "run": runs, "kind": kind, "seed": options.seed}
            if kills < options.kills and wait_for_the_moment(kind, output, done, rng, ranks[0]):
                record |= {"saving": saving(output), "victim": rng.randrange(2)}
                ranks[record["victim"]].send_signal(signal.SIGKILL)
                kills += 1
                record["step"] = steps(output)
                with options.log.open("a") as log:
                    log.write(json.dumps(record) + "\n")
            ended = [each.wait(120) for each in ranks]
            if any(code not in (0, 76, -signal.SIGKILL) for code in ended):
                print(f"run {runs} ended with {ended}: {(scratch / 'log').read_text()[-2000:]}")
                lost += 1
                break
        if (output / "summary.json").exists() and not same(whole, output):
            print(f"run {runs} ended with other weights")
            lost += 1
    with options.log.open("a") as log:
        log.write(json.dumps({"kills": kills, "runs": runs, "lost": lost, "host_cores": os.cpu_count()}) + "\n")
    print(f"{kills} kills in {runs} runs, {lost} runs lost or different")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
