"""A small task on disk, and whole runs on it."""

import json
import logging
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from distprune import dist, settings
from distprune.__main__ import main
from distprune.commands.train import train
from distprune.engines.build import set_learning_rate
from distprune.errors import UserError
from distprune.synthetic import examples
from tests.distributed.engines import write_model
from tests.world import Worlds

TRAIN, VALIDATION = 96, 61  # no world size above 1 divides 61

DENSE = ("pruning.sparsity=0",)
TAUGHT = ("distillation.hardness=0.5",)
"""Overrides for a run with a teacher, which takes half as long again."""


def stage(student: int, teacher: int = 3) -> tuple[str, str]:
    """Return overrides that set the ZeRO stages."""
    return (
        f"deepspeed.student.zero_optimization.stage={student}",
        f"deepspeed.teacher.zero_optimization.stage={teacher}",
    )


def write_task(directory: Path, hardness: float = 0.0) -> Path:
    """Write sentences, a model, and the configuration of a run of 24 steps, in which the model may teach itself."""
    rows = examples(TRAIN + VALIDATION, seed=5)
    for name, part in (("train", rows[:TRAIN]), ("validation", rows[TRAIN:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = write_model(directory / "model", hidden_size=16, intermediate_size=24)
    (directory / "run.yaml").write_text(f"""
model: {{path: {model}}}
teacher: {{path: {model}, cache: null}}
task:
  train: {directory}/train.jsonl
  validation: {directory}/validation.jsonl
  metrics: [accuracy, macro_f1]
  max_length: 40
train: {{epochs: 3, batch_size: 12, eval_batch_size: 8, eval_every: 4 steps, log_every: 1}}
lr: {{peak: 1.0e-3, rewind_every: 1 epochs}}
pruning: {{sparsity: 0.9, initial: 0.5, start: 4 steps, end: 16 steps, every: 4 steps}}
distillation: {{hardness: {hardness}, temperature: 2.0}}
deepspeed:
  student: {{zero_optimization: {{stage: 2, stage3_param_persistence_threshold: 0}}}}
  teacher: {{zero_optimization: {{stage: 3, stage3_param_persistence_threshold: 0}}}}
""")
    return directory


def run(task: Path, output: Path, *overrides: str) -> Any:
    """Run on every rank; return the summary, or what was refused. Collective."""
    try:
        return train(settings.load_valid(str(task / "run.yaml"), [f"train.output={output}", *overrides]))
    except UserError as error:
        return str(error)


def run_patched(target: str, replacement: Any, task: Path, output: Path, *overrides: str) -> Any:
    """Run with one function replaced. Collective."""
    with patch(target, replacement):
        return run(task, output, *overrides)


def heard(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Return what a function returns, and what it prints and logs. Collective where the function is."""
    said = StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("distprune").addHandler(handler)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            result = function(*arguments)
        return result, said.getvalue()
    finally:
        logging.getLogger("distprune").removeHandler(handler)


def run_command(*arguments: Any) -> tuple[int, str]:
    """Run a command on ranks that stay; return its status and what it says. Collective."""
    with patch("distprune.dist.shutdown"):
        return heard(main, [str(each) for each in arguments])


def records(output: Path, split: str) -> list[dict[str, Any]]:
    """Return a run's lines of metrics.jsonl of one split."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


EVERY_STEP = ("checkpoint.steps=1", "checkpoint.keep=30")
"""Overrides that save after each step, and keep all."""


RATE = "distprune.training.train.set_learning_rate"
"""The first act of a step, for `run_patched`."""


class OnLastRank:
    """Stands in for `set_learning_rate`: in the sixth step the last rank, and no other, acts on its engine."""

    def __init__(self, act: Callable[[Any], None]):
        self.act, self.calls = act, 0

    def __call__(self, engine: Any, rate: float) -> None:
        set_learning_rate(engine, rate)
        self.calls += 1
        if self.calls == 6 and dist.detect().rank == dist.detect().size - 1:
            self.act(engine)


class CutOff:
    """Stands in for `set_learning_rate`, the first act of a step: the run ends before a step."""

    def __init__(self, step: int):
        self.left = step

    def __call__(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise UserError("cut off")
        set_learning_rate(*arguments)


def cut_off(world: Worlds, size: int, task: Path, output: Path, step: int, *overrides: str) -> str:
    """Begin a run and end it before its step of that number; return what was said."""
    patched = (RATE, CutOff(step))
    answers = world(size).run(heard, run_patched, *patched, task, output, *overrides)
    assert [answer for answer, _ in answers] == ["cut off"] * size
    return str(answers[0][1])


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(path / "final" / "model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def told(output: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says, without times and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("examples_per_s", "memory_mib")} for line in lines]


class FullDisk:
    """Stands in for `save`: the disk is full from a call on."""

    def __init__(self, good: int):
        self.good = good

    def __call__(self, *arguments: Any) -> None:
        self.good -= 1
        if self.good < 0:
            raise OSError(28, "No space left on device")
        save_file(*arguments)
