"""The whole training step, with everything that a user pays for, beside transformers' own Trainer on DeepSpeed.

Same model, data, ranks, dtype and ZeRO stage, in turns within one run: batches of like lengths, frozen embeddings, no
evaluation, nothing saved. The Trainer runs twice: as its users run it, and with every setting that distprune makes.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distprune import dist, settings, turns
from distprune.benchmarks import huggingface
from distprune.benchmarks.models import write_random_model
from distprune.engines.build import let_go
from distprune.engines.options import with_defaults
from distprune.synthetic import tokenizer
from distprune.training.setup import prepare
from distprune.training.train import Trainer as OurTrainer

PRUNE_EVERY = 10
"""Optimizer steps; ``recipe=gmp`` on MRPC, a small data set, prunes every 11."""


@dataclass(frozen=True)
class Throughput:
    """Examples a second over all ranks, one number for each turn, by what was trained.

    ``dense`` is fine-tuning alone; ``pruned`` prunes every `PRUNE_EVERY` steps; ``cached`` and ``live`` prune and
    distil, from a teacher's cache and from the teacher itself; ``trainer`` is transformers' Trainer, dense, by itself
    with DeepSpeed's defaults; ``same_options`` is the Trainer in distprune's processes, with distprune's defaults.
    """

    model: str
    device: str
    ranks: int
    threads: int
    stage: int
    batch_size: int
    mean_length: float
    dense: list[float]
    pruned: list[float]
    cached: list[float]
    live: list[float]
    trainer: list[float]
    same_options: list[float]

    @property
    def ratios(self) -> dict[str, float]:
        """Median ratios of turns that follow each other: of examples a second, or of the times of steps."""

        def ratio(first: list[float], second: list[float]) -> float:
            return median(a / b for a, b in zip(first, second, strict=True))

        return {
            "dense over trainer": ratio(self.dense, self.trainer),
            "dense over trainer with the same options": ratio(self.dense, self.same_options),
            "pruned and cached over trainer": ratio(self.cached, self.trainer),
            "pruned and cached over trainer with the same options": ratio(self.cached, self.same_options),
            "cached step over step without teacher": ratio(self.pruned, self.cached),
            "live step over step without teacher": ratio(self.pruned, self.live),
        }

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self) | {"ratios": self.ratios}


def measure(folder: Path, model: str, section: dict[str, Any], batch_size: int, steps: int, repeat: int) -> Throughput:
    """Train each way for some steps, in turns. Collective: every rank calls it.

    Args:
        folder: for data, models and the teacher's cache; on a disk that all ranks share.
        model: a name of `distprune.benchmarks.models.SHAPES`.
        section: DeepSpeed's options of the student; the teacher has them too, at ZeRO-3.
        batch_size: examples in a step over all ranks.
        steps: optimizer steps of each turn that are counted.
        repeat: turns.
    """
    world = dist.detect()
    turns.write_on_main(lambda: _write(folder, model, (steps + huggingface.WARM_UP) * batch_size), folder)
    base = _config(folder, section, batch_size)
    taught = ["distillation.hardness=1", f"teacher.path={folder}/model"]
    prunes = ["pruning.sparsity=0.8", "pruning.initial=0.4", "pruning.start=2 steps"]
    end = steps + huggingface.WARM_UP - 1
    prunes += [f"pruning.every={min(PRUNE_EVERY, end - 2)} steps", f"pruning.end={end} steps"]
    ways: dict[str, Callable[[], float]] = {
        "dense": lambda: _ours([*base]),
        "pruned": lambda: _ours([*base, *prunes]),
        "cached": lambda: _ours([*base, *prunes, *taught, f"teacher.cache={folder}/cache"]),
        "live": lambda: _ours([*base, *prunes, *taught, "teacher.cache=null"]),
        "trainer": lambda: huggingface.examples_per_s_apart(base, section),
        "same_options": lambda: huggingface.examples_per_s(base, with_defaults(section)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat):
        for name in ways if turn % 2 == 0 else reversed(ways):  # a drift must not count
            found[name].append(ways[name]())
    lengths = [len(json.loads(line)["text"].split()) + 2 for line in (folder / "train.jsonl").open()]
    return Throughput(
        model,
        world.device.type,
        world.size,
        torch.get_num_threads(),
        int(section["zero_optimization"]["stage"]),
        batch_size,
        sum(lengths) / len(lengths),
        **found,
    )


def _write(folder: Path, model: str, examples: int) -> None:
    """Write sentences of random words, in lengths like those of SST-2, and a random model."""
    random.seed(0)
    words = tokenizer()
    vocabulary = [word for word in words.get_vocab() if word.isalpha()]
    for name, count in (("train", examples), ("validation", 8)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(count):
                length = max(1, min(60, round(random.lognormvariate(2.6, 0.6))))
                text = " ".join(random.choices(vocabulary, k=length))
                file.write(json.dumps({"text": text, "label": number % 2}) + "\n")
    write_random_model(folder / "model", model)
    words.save_pretrained(folder / "model")


def _config(folder: Path, section: dict[str, Any], batch_size: int) -> list[str]:
    """Return the overrides that all ways share."""
    return [
        f"model.path={folder}/model",
        "model.freeze=[embeddings]",
        f"task.train={folder}/train.jsonl",
        f"task.validation={folder}/validation.jsonl",
        "task.text=[text]",
        "task.max_length=64",
        f"train.batch_size={batch_size}",
        "train.epochs=1",
        f"train.log_every={huggingface.WARM_UP}",
        "lr.peak=1e-4",
        "checkpoint.epochs=false",
        "checkpoint.minutes=null",
        f"deepspeed.student={json.dumps(section)}",
        f"deepspeed.teacher={json.dumps(section | {'zero_optimization': {'stage': 3}})}",
    ]


class _Clock:
    """Stands in for a run's monitor, and notes when it is told of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def log(self, record: Mapping[str, object]) -> None:
        if record["split"] == "train":
            self.ends.append(time.perf_counter())

    def progress(self, step: int, **shown: object) -> None:
        """Show nothing."""


def _ours(overrides: list[str]) -> float:
    """Train with distprune; return examples a second. Collective: every rank calls it."""
    config = settings.load_valid(None, overrides)
    setup = prepare(config)
    clock: Any = _Clock()
    trainer = OurTrainer(config, setup, clock, Path(config.train.output))
    trainer.run()
    let_go(setup.student)
    ends: list[float] = clock.ends
    return (setup.plan.total_steps - huggingface.WARM_UP) * config.train.batch_size / (ends[-1] - ends[0])
