"""What the lines of metrics.jsonl say of a run: where it stands, what it lost, and what it measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from distprune import dist
from distprune.training.objective import Losses
from distprune.training.setup import Setup


def of_training(setup: Setup, step: int, losses: Sequence[Sequence[float]], examples_per_s: float) -> dict[str, Any]:
    """Return the line of training steps. Collective where DeepSpeed's norm is.

    Args:
        setup: of the run.
        step: optimizer steps that are done, more than 0.
        losses: `Losses` of each step since the last line, means over the ranks.
        examples_per_s: over the same steps.
    """
    means = Losses(*(sum(column) / len(losses) for column in zip(*losses, strict=True)))
    norm = setup.student.get_global_grad_norm()
    return {
        **_stands(setup, step, "train"),
        "loss": means.total,
        **{f"{name}_loss": value for name, value in means._asdict().items() if name != "total"},
        "lr": setup.plan.lr.at(step - 1),
        "sparsity": setup.pruner.sparsity if setup.pruner else 0.0,
        "threshold": setup.pruner.threshold if setup.pruner else 0.0,
        "grad_norm": None if norm is None else float(norm),
        "examples_per_s": examples_per_s,
        "memory_mib": _memory_mib(),
    }


def of_validation(setup: Setup, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the line of an evaluation: the metrics, and the sparsity of every matrix."""
    layers = {} if setup.pruner is None else setup.pruner.layer_sparsity
    return {
        **_stands(setup, step, "validation"),
        **metrics,
        "sparsity": setup.pruner.sparsity if setup.pruner else 0.0,
        **{f"sparsity/{name}": value for name, value in layers.items()},
    }


def of_teacher(setup: Setup, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the line of what the teacher can."""
    return _stands(setup, step, "teacher") | dict(metrics)


def _stands(setup: Setup, step: int, split: str) -> dict[str, Any]:
    return {"step": step, "epoch": step / setup.plan.steps_per_epoch, "split": split}


def _memory_mib() -> float:
    """Return this rank's memory in MiB: the peak on its GPU, or what the process holds now on a CPU."""
    if dist.on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
