"""Training steps in interleaved pairs: with masks and without, and with a teacher and without."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distprune import dist
from distprune.benchmarks.timing import seconds
from distprune.config import Config
from distprune.engines.build import build_frozen, build_student
from distprune.training.distill import distillation_loss
from distprune.training.setup import build_pruner

SHAPES = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}

POSITIONS = BertConfig().max_position_embeddings
"""Tokens that these models can read."""


@dataclass(frozen=True)
class Steps:
    """Seconds of training steps on rank 0, and ratios of pairs that follow each other."""

    model: str
    device: str
    ranks: int
    threads: int
    dtype: str
    stage: int
    batch_size: int
    length: int
    dense: list[float]
    masked: list[float]
    taught: list[float]
    """With masks, and with a teacher's forward pass and the distillation loss."""
    masking: float
    """Seconds that the masks take in a step, by themselves."""

    @property
    def masked_ratio(self) -> dict[str, float]:
        """Masked over dense."""
        return _ratio(self.masked, self.dense)

    @property
    def taught_ratio(self) -> dict[str, float]:
        """With a teacher over without."""
        return _ratio(self.taught, self.masked)

    def record(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        return asdict(self) | {"masked_ratio": self.masked_ratio, "taught_ratio": self.taught_ratio}


def _ratio(first: list[float], second: list[float]) -> dict[str, float]:
    """Return the median ratio of pairs, and its 95 % interval by the bootstrap."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": median(ratios), "low": medians[50], "high": medians[1949]}


def measure(folder: Path, model: str, section: dict[str, Any], batch_size: int, length: int, repeat: int) -> Steps:
    """Measure steps of a student at 80 % sparsity. Collective: every rank calls it.

    Args:
        folder: where the random model is written.
        model: a name of `SHAPES`.
        section: DeepSpeed's options of the student; the teacher has them too, at ZeRO-3.
        batch_size: examples in a step over all ranks.
        length: tokens of each.
        repeat: how many pairs.
    """
    world = dist.detect()
    config = Config()
    config.train.batch_size = batch_size
    config.deepspeed.student = section
    config.pruning.sparsity = 0.8
    dist.write_on_main(lambda: write_random_model(folder, model), folder)
    micro_batch = batch_size // world.size
    student, _ = build_student(config, folder, AutoModelForSequenceClassification, {}, micro_batch)
    frozen = section | {"zero_optimization": {"stage": 3}}
    teacher = build_frozen(frozen, folder, AutoModelForSequenceClassification, {}, micro_batch)
    pruner = build_pruner(config, student)
    pruner.prune(Fraction(4, 5))
    masked_of, nothing = pruner.masked_of, dict.fromkeys(pruner.masked_of, 0)
    generator = torch.Generator().manual_seed(world.rank)
    ids = torch.randint(0, 1000, (micro_batch, length), generator=generator).to(student.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 2, (micro_batch,), generator=generator).to(student.device)
    masking: list[float] = []

    def loss_of(taught: bool) -> Tensor:
        logits = student(**batch).logits
        if not taught:
            return torch.nn.functional.cross_entropy(logits.float(), labels)
        with torch.no_grad():
            target = teacher(**batch).logits
        return distillation_loss(logits, target, 5.5)

    def step(masked: bool, taught: bool) -> float:
        pruner.masked_of = masked_of if masked else nothing  # without a masked weight it does nothing

        def work() -> None:
            student.backward(loss_of(taught))
            masking.append(seconds(pruner.after_backward, student.device))
            student.step()

        return seconds(work, student.device)

    kinds: list[Callable[[], float]] = [
        lambda: step(False, False),
        lambda: step(True, False),
        lambda: step(True, True),
    ]
    for kind in kinds:
        kind()
    times = []
    for number in range(repeat):
        order = range(len(kinds)) if number % 2 == 0 else reversed(range(len(kinds)))  # a drift must not count
        row = {kind: kinds[kind]() for kind in order}
        times.append([row[kind] for kind in range(len(kinds))])
    pruner.masked_of = masked_of
    weights = seconds(lambda: pruner._after_optimizer_step(student.basic_optimizer), student.device)
    gradients = median(masking[len(kinds) :][1::3])  # the masked student without a teacher is in the middle
    dense, masked, taught = ([row[column] for row in times] for column in range(3))
    dtype = next(student.module.parameters()).dtype
    stage = int(student.zero_optimization_stage())
    return Steps(
        model,
        student.device.type if isinstance(student.device, torch.device) else str(student.device),
        world.size,
        torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
        stage,
        batch_size,
        length,
        dense,
        masked,
        taught,
        weights + gradients,
    )


def write_random_model(folder: Path, model: str) -> None:
    """Write a model of random weights."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SHAPES[model])).save_pretrained(folder)
