"""The training loop: forward, distil, backward, prune where the ladder says so, step.

The order within an optimizer step is what keeps pruned weights at zero everywhere: after the backward pass the mask
may grow, then gradients are masked, then DeepSpeed clips and steps; the pruner's hook zeroes weights and moments
between the optimizer's update and DeepSpeed's copy to the low-precision weights.
"""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distprune import dist
from distprune.batches import rank_part, train_batches
from distprune.config import Config
from distprune.diagnose import refuse_nonfinite, refuse_nonfinite_weights
from distprune.distill import distillation_loss, mix
from distprune.engine import set_learning_rate
from distprune.errors import UserError
from distprune.evaluate import evaluate, forward
from distprune.export import export
from distprune.monitor import Monitor
from distprune.monitor.resources import memory_mib
from distprune.pruning.pruner import Pruner
from distprune.setup import Setup
from distprune.tasks.base import Batch


@dataclass
class Best:
    """The best evaluation, by the main metric, among states at the target sparsity."""

    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    evaluations_since: int = 0

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Take in an evaluation; return whether it is the best so far."""
        if not self.metrics or _main(metrics) > _main(self.metrics):
            self.metrics, self.step, self.evaluations_since = metrics, step, 0
            return True
        self.evaluations_since += 1
        return False


def _main(metrics: dict[str, float]) -> float:
    return next(iter(metrics.values()))


@dataclass
class Trainer:
    """One run: where it stands, and what is done in a step."""

    config: Config
    setup: Setup
    monitor: Monitor
    run_dir: Path
    step: int = 0
    best: Best = field(default_factory=Best)
    metrics: dict[str, float] = field(default_factory=dict)
    dense_metrics: dict[str, float] | None = None
    losses: list[list[float]] = field(default_factory=list)
    _logged_at: float = field(default_factory=time.perf_counter)

    def run(self) -> None:
        """Train to the end, or until patience runs out. Collective: every rank calls it."""
        plan = self.setup.plan
        for batch in self._batches():
            self._optimizer_step(batch)
            if self.step % self.config.train.log_every == 0 or self.step == plan.total_steps:
                self._log_training()
            if self.step % plan.eval_every == 0 or self.step == plan.total_steps:
                self._evaluate()
                if self._out_of_patience():
                    break

    def _batches(self) -> Iterator[list[int]]:
        """Yield the run's global batches, the same on every rank and at every world size."""
        plan, lengths = self.setup.plan, self.setup.task.train["length"]
        epochs = math.ceil(plan.total_steps / plan.steps_per_epoch)
        every = (
            batch
            for epoch in range(epochs)
            for batch in train_batches(lengths, self.config.train.batch_size, self.config.train.seed, epoch)
        )
        for _, batch in zip(range(plan.total_steps), every, strict=False):
            yield batch

    def _optimizer_step(self, batch: list[int]) -> None:
        student, pruner, plan = self.setup.student, self.setup.pruner, self.setup.plan
        world, task = self.setup.world, self.setup.task
        set_learning_rate(student, plan.lr.at(self.step))
        parts = rank_part(batch, world.rank, world.size, self.config.train.accumulation)
        sums = [0.0, 0.0, 0.0]
        for number, rows in enumerate(parts, start=1):
            micro_batch = {
                name: tensor.to(student.device) for name, tensor in task.collate(task.train.__getitems__(rows)).items()
            }
            if all(map(math.isfinite, sums)):
                suspect = micro_batch  # in the end the first with a loss that is not finite, where there is one
            losses = self._backward(micro_batch)
            sums = [total + float(loss) / len(parts) for total, loss in zip(sums, losses, strict=True)]
            if pruner is not None and number == len(parts):
                self._prune(pruner, plan.ladder.get(self.step))
            if number == len(parts):
                self._agree_on_losses(sums, suspect)
            student.step()
        self.step += 1

    def _prune(self, pruner: Pruner, sparsity: Fraction | None) -> None:
        try:
            pruner.after_backward(sparsity)
        except UserError as error:
            raise UserError(f"at step {self.step} {error}") from error

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the total, the task's and the distillation loss of a micro batch."""
        student, teacher, distillation = self.setup.student, self.setup.teacher, self.config.distillation
        logits = forward(student, batch)
        task_loss = self.setup.task.loss(logits, batch["labels"])
        teacher_loss = None
        if teacher is not None:
            with torch.no_grad():
                target = forward(teacher, batch)
            teacher_loss = distillation_loss(logits, target, distillation.temperature)
        loss = mix(task_loss, teacher_loss, distillation.hardness)
        student.backward(loss)
        return (
            loss.detach(),
            task_loss.detach(),
            torch.zeros(()) if teacher_loss is None else teacher_loss.detach(),
        )

    def _agree_on_losses(self, sums: list[float], batch: Batch) -> None:
        """Average the step's losses over the ranks, and stop all of them where they are not finite."""
        world = self.setup.world
        self.losses.append([value / world.size for value in dist.all_sum(sums)])
        if not all(math.isfinite(value) for value in self.losses[-1]):
            refuse_nonfinite(self.setup.student, batch, self.step)

    def _log_training(self) -> None:
        plan, pruner, student = self.setup.plan, self.setup.pruner, self.setup.student
        now = time.perf_counter()
        loss, task_loss, teacher_loss = (sum(column) / len(self.losses) for column in zip(*self.losses, strict=True))
        norm = student.get_global_grad_norm()
        record = {
            "step": self.step,
            "epoch": self.step / plan.steps_per_epoch,
            "split": "train",
            "loss": loss,
            "task_loss": task_loss,
            "distillation_loss": teacher_loss,
            "lr": plan.lr.at(self.step - 1),
            "sparsity": pruner.sparsity if pruner else 0.0,
            "threshold": pruner.threshold if pruner else 0.0,
            "grad_norm": None if norm is None else float(norm),
            "examples_per_s": len(self.losses) * self.config.train.batch_size / (now - self._logged_at),
            "memory_mib": memory_mib(),
        }
        self.losses, self._logged_at = [], now
        self.monitor.log(record)
        self.monitor.progress(self.step, loss=loss, sparsity=record["sparsity"], lr=record["lr"], **self._main_metric())

    def _evaluate(self) -> None:
        """Measure, and keep the state where it is the best one at the target sparsity."""
        plan, pruner, task = self.setup.plan, self.setup.pruner, self.setup.task
        started = time.perf_counter()
        self.metrics = evaluate(self.setup.student, task, task.validation, self.config.train.eval_batch_size)
        self._logged_at += time.perf_counter() - started  # examples/s are those of training
        layers = {} if pruner is None else pruner.layer_sparsity
        self.monitor.log(
            {
                "step": self.step,
                "epoch": self.step / plan.steps_per_epoch,
                "split": "validation",
                **self.metrics,
                "sparsity": pruner.sparsity if pruner else 0.0,
                **{f"sparsity/{name}": value for name, value in layers.items()},
            }
        )
        if pruner is None or pruner.masked == 0:
            self.dense_metrics = self.metrics
        improved = self.at_target and self.best.update(self.metrics, self.step)
        if improved and self.config.train.select == "best":
            self._keep(self.run_dir / "best")

    def _keep(self, directory: Path) -> None:
        """Export to a directory; what was there goes once the new one is complete. Collective: every rank calls it."""
        partial = directory.with_name(directory.name + ".partial")
        self.export(partial)

        def replace() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)

        dist.write_on_main(replace, directory)

    @property
    def at_target(self) -> bool:
        """Whether the weights have the target sparsity: only such states may be chosen (SMC-Bench's trap)."""
        pruner = self.setup.pruner
        if pruner is None:
            return True
        return pruner.carried and pruner.sparsity_asked == max(self.setup.plan.ladder.values(), default=0)

    def write_final(self) -> None:
        """Write ``final/``: the last state or the best one, at the target sparsity. Collective: every rank calls it."""
        assert self.at_target, "the run ended before its target sparsity"
        final, best = self.run_dir / "final", self.run_dir / "best"
        if self.config.train.select == "last":
            self._keep(final)
        else:
            dist.write_on_main(lambda: best.rename(final), final)

    @property
    def final_metrics(self) -> dict[str, float]:
        """The metrics of the state in ``final/``."""
        return self.metrics if self.config.train.select == "last" else self.best.metrics

    @property
    def final_step(self) -> int:
        """The optimizer steps of the state in ``final/``."""
        return self.step if self.config.train.select == "last" else self.best.step

    def export(self, directory: Path) -> None:
        """Write the student, its pruned weights verified. Collective: every rank calls it."""
        refuse_nonfinite_weights(self.setup.student, self.step)
        if self.setup.pruner is not None:
            self.setup.pruner.verify()
        export(self.setup.student, self.setup.task.tokenizer, directory)

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return self.at_target and patience is not None and self.best.evaluations_since >= patience

    def _main_metric(self) -> dict[str, Any]:
        return dict(list(self.metrics.items())[:1])
