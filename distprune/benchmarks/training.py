"""The whole training step, with everything that a user pays for, beside transformers' own Trainer on DeepSpeed.

Same model, data, ranks, dtype and DeepSpeed options, in turns within one run; each at its best settings: batches of
like lengths, frozen embeddings, no evaluation, nothing saved.
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
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distprune import dist, settings
from distprune.benchmarks.steps import write_random_model
from distprune.config import Config
from distprune.setup import load_task, prepare
from distprune.synthetic import tokenizer
from distprune.train import Trainer as OurTrainer

LEARNING_RATE = 1e-4
WARM_UP = 10
"""Optimizer steps that are not counted."""


@dataclass(frozen=True)
class Throughput:
    """Examples a second over all ranks, one number for each turn, by what was trained.

    ``dense`` is fine-tuning alone; ``pruned`` prunes every other step; ``cached`` and ``live`` prune and distil, from a
    teacher's cache and from the teacher itself; ``trainer`` is transformers' Trainer, dense.
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

    @property
    def ratios(self) -> dict[str, float]:
        """Median ratios of turns that follow each other: of examples a second, or of the times of steps."""

        def ratio(first: list[float], second: list[float]) -> float:
            return median(a / b for a, b in zip(first, second, strict=True))

        return {
            "dense over trainer": ratio(self.dense, self.trainer),
            "pruned and cached over trainer": ratio(self.cached, self.trainer),
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
        model: a name of `steps.SHAPES`.
        section: DeepSpeed's options of the student; the teacher has them too, at ZeRO-3.
        batch_size: examples in a step over all ranks.
        steps: optimizer steps of each turn that are counted.
        repeat: turns.
    """
    world = dist.detect()
    dist.write_on_main(lambda: _write(folder, model, (steps + WARM_UP) * batch_size), folder)
    base = _config(folder, section, batch_size)
    taught = ["distillation.hardness=1", f"teacher.path={folder}/model"]
    prunes = ["pruning.sparsity=0.8", "pruning.initial=0.4", "pruning.start=2 steps", "pruning.every=2 steps"]
    prunes.append(f"pruning.end={steps + WARM_UP - 1} steps")
    ways: dict[str, Callable[[], float]] = {
        "dense": lambda: _ours([*base]),
        "pruned": lambda: _ours([*base, *prunes]),
        "cached": lambda: _ours([*base, *prunes, *taught, f"teacher.cache={folder}/cache"]),
        "live": lambda: _ours([*base, *prunes, *taught, "teacher.cache=null"]),
        "trainer": lambda: _theirs(settings.load(None, base), section),
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
        f"train.log_every={WARM_UP}",
        f"lr.peak={LEARNING_RATE}",
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
    setup.student.destroy()
    ends: list[float] = clock.ends
    return (setup.plan.total_steps - WARM_UP) * config.train.batch_size / (ends[-1] - ends[0])


class _Timer(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def _theirs(config: Config, section: dict[str, Any]) -> float:
    """Train with transformers' Trainer; return examples a second. Collective: every rank calls it."""
    world = dist.detect()
    folder = Path(config.model.path)
    task = load_task(config, folder)
    model = task.auto_class.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.train.batch_size // world.size,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        bf16=bool(section.get("bf16", {}).get("enabled")),
        deepspeed=section | {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": "auto"},
        train_sampling_strategy="group_by_length",
        dataloader_drop_last=True,
        use_cpu=world.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = _Timer()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=DataCollatorWithPadding(task.tokenizer),
        callbacks=[timer],
    )
    trainer.train()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()
    steps = len(timer.ends) - WARM_UP
    return steps * config.train.batch_size / (timer.ends[-1] - timer.ends[WARM_UP - 1])
