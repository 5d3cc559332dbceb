"""The training loop: forward, distil, backward, prune where the ladder says so, step.

The order within an optimizer step is what keeps pruned weights at zero everywhere: after the backward pass the mask
may grow, then gradients are masked, then DeepSpeed clips and steps; the pruner's hook zeroes weights and moments
between the optimizer's update and DeepSpeed's copy to the low-precision weights.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distprune import dist, turns
from distprune.checkpoints.files import FOLDER, Manifest, newest_step
from distprune.checkpoints.pieces import Pieces
from distprune.checkpoints.saver import Saver
from distprune.checkpoints.state import owned_tensors, restore, state_of
from distprune.config import Config
from distprune.disk import copy_directory, entries_of
from distprune.engines.batches import train_batches
from distprune.engines.build import set_learning_rate
from distprune.engines.evaluate import evaluate
from distprune.errors import UserError
from distprune.models.export import describe
from distprune.monitor import Monitor
from distprune.monitor.wandb import stored_id
from distprune.pruning.pruner import Pruner
from distprune.tasks.base import Batch
from distprune.training import lines
from distprune.training.best import Best, remove_former
from distprune.training.clock import Clock
from distprune.training.curvature import estimate
from distprune.training.diagnose import name_unused, refuse_nonfinite
from distprune.training.interrupts import Interrupted, StopRequests
from distprune.training.objective import Objective
from distprune.training.setup import Setup
from distprune.training.steps import backward, take_step
from distprune.training.written import verify, write

_KEPT = ("metrics", "measured_at", "dense_metrics", "losses", "skipped_steps")
"""What of a `Trainer` a checkpoint has as it is."""


class _Asked(NamedTuple):
    """What a rank may ask all of them for at the end of a step."""

    save: bool
    stop: bool
    requeue: bool


@dataclass
class Trainer:
    """One run: where it stands, and what is done in a step."""

    config: Config
    setup: Setup
    monitor: Monitor
    run_dir: Path
    requests: StopRequests = field(default_factory=StopRequests)
    step: int = 0
    best: Best = field(default_factory=Best)
    metrics: dict[str, float] = field(default_factory=dict)
    measured_at: int = -1
    """The step of ``metrics``."""
    dense_metrics: dict[str, float] | None = None
    """Of the teacher, or without one of the student before its first pruning."""
    losses: list[list[float]] = field(default_factory=list)
    skipped_steps: int = 0
    """Of ``step``, those that DeepSpeed left out because fp16's gradients were not finite."""
    began_at: int = 0
    """Of ``step``, those that were done when this process went on with the run."""
    seconds_before: float = 0.0
    """What the run took before this process went on with it."""
    clock: Clock = field(default_factory=Clock)
    _logged_step: int = 0
    _started_at: float = field(default_factory=time.time)
    _logged_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.objective = Objective(self.setup.task, self.setup.teacher, self.config.distillation)
        self.saver = Saver(self.run_dir / FOLDER, self.config.checkpoint.keep, self._describe_model)

    def run(self) -> None:
        """Train to the end, or until patience runs out or a signal comes. Collective: every rank calls it.

        Raises:
            Interrupted: on every rank, where any was told to stop; everything is saved.
        """
        plan = self.setup.plan
        self._logged_step, self._logged_at = self.step, time.perf_counter()
        if self.step > 0 and self._evaluation_is_due() and self.measured_at != self.step:
            self._evaluate()  # the run was told to stop, and had no time for it
        for batch in self._batches():
            asked = self._optimizer_step(batch)
            if self.step == 1 and self.setup.pruner is not None:
                name_unused(self.setup.pruner)
            if self.step % self.config.train.log_every == 0 or self.step == plan.total_steps:
                self._log_training()
            if asked.stop and self.step < plan.total_steps:
                self._stop(asked.requeue)
            if self._evaluation_is_due():
                self._evaluate()
            if asked.save or self._save_is_planned():
                self._save()
            if self._out_of_patience():
                break
        if self.measured_at != self.step:
            self._evaluate()  # the run has become shorter than it was when it began
        self.saver.finish()

    def _stop(self, requeue: bool) -> NoReturn:
        """Save and stop. Collective: every rank calls it."""
        if self.step > 0:
            self._save()
            self.saver.finish()
        saved = turns.on_main(lambda: newest_step(self.saver.folder))
        raise Interrupted(self.step, saved, requeue, self.began_at)

    def _stop_if_asked(self) -> None:
        """Stop where any rank was told to, between two steps. Collective: every rank calls it."""
        stop, requeue = dist.all_sum([float(self.requests.stop), float(self.requests.requeue)])
        if stop:
            self._stop(requeue > 0)

    def _evaluation_is_due(self) -> bool:
        return self.step in self.setup.plan.evaluations

    def _batches(self) -> Iterator[list[int]]:
        """Yield the run's global batches, the same on every rank and at every world size."""
        plan, lengths = self.setup.plan, self.setup.task.train["length"]
        while self.step < plan.total_steps and not self._out_of_patience():
            epoch, done = divmod(self.step, plan.steps_per_epoch)
            batches = train_batches(lengths, self.config.train.batch_size, self.config.train.seed, epoch)
            yield from (batch.tolist() for batch in batches[done : done + plan.total_steps - self.step])

    def _optimizer_step(self, batch: list[int]) -> _Asked:
        """Train on a global batch; return what any rank asks for, the same on every rank."""
        student, pruner, plan = self.setup.student, self.setup.pruner, self.setup.plan
        set_learning_rate(student, plan.lr.at(self.step))
        if pruner is not None and pruner.score.learns and self.step in plan.ladder:
            with self.clock.of("gradients for scores"):
                estimate(self.config, self.setup, pruner, self.step, self._stop_if_asked)
        sums, suspect = backward(self.setup, self.objective, self.config.train, batch, self.step)
        self.saver.before_change()
        if pruner is not None:
            self._prune(pruner)
        asked = self._agree(sums, suspect)
        self.skipped_steps += not take_step(student, self.step)
        self.step += 1
        return asked

    def _prune(self, pruner: Pruner) -> None:
        sparsity, regrown = self.setup.plan.ladder.get(self.step), self.setup.plan.regrowths.get(self.step)
        part = self.clock.of("prunings") if sparsity is not None or regrown is not None else nullcontext()
        try:
            with part:
                pruner.after_backward(sparsity, regrown)
        except UserError as error:
            raise UserError(f"at step {self.step} {error}") from error

    def _agree(self, sums: list[float], batch: Batch) -> _Asked:
        """Average the step's losses over the ranks, and stop all of them where they are not finite.

        With the losses the ranks agree on what each knows by itself: whether its part of a checkpoint is written,
        whether rank 0's clock wants another, and whether a signal came.
        """
        world, minutes = self.setup.world, self.config.checkpoint.minutes
        is_time = world.rank == 0 and minutes is not None and self.saver.minutes_since >= minutes
        mine = (self.saver.busy, is_time, self.requests.stop, self.requests.requeue)
        *losses, ranks_busy, save, stop, requeue = dist.all_sum([*sums, *map(float, mine)])
        self.losses.append([value / world.size for value in losses])
        if not all(math.isfinite(value) for value in self.losses[-1]):
            refuse_nonfinite(self.setup.student, self.setup.task, batch, self.step)
        self.saver.settle(ranks_busy)
        return _Asked(save > 0, stop > 0, requeue > 0)

    def _log_training(self) -> None:
        now = time.perf_counter()
        steps = self.step - self._logged_step  # of this process, where a resumed run's losses are of more
        speed = steps * self.config.train.batch_size / (now - self._logged_at)
        line = lines.of_training(self.setup, self.step, self.losses, speed)
        self.losses, self._logged_step, self._logged_at = [], self.step, now
        self.monitor.log(line | {"skipped_steps": self.skipped_steps})
        main = dict(list(self.metrics.items())[:1])
        self.monitor.progress(self.step, loss=line["loss"], sparsity=line["sparsity"], lr=line["lr"], **main)

    def _evaluate(self) -> None:
        """Measure, and keep the state where it is the best one at the target sparsity."""
        pruner, started = self.setup.pruner, time.perf_counter()
        with self.clock.of("evaluations"):
            self.metrics = evaluate(
                self.setup.student, self.setup.task, self.config.train.eval_batch_size, self._stop_if_asked
            )
        self.measured_at = self.step
        self._logged_at += time.perf_counter() - started  # examples/s are those of training
        self.monitor.log(lines.of_validation(self.setup, self.step, self.metrics))
        if self.setup.teacher is None and (pruner is None or pruner.masked == 0):
            self.dense_metrics = self.metrics
        former = copy(self.best)
        improved = self.at_target and self.best.update(self.metrics, self.step, self.setup.task.merit)
        if improved and self.config.train.select == "best":
            self._keep_best(former)

    def _keep_best(self, former: Best) -> None:
        """Export the best state; the former one stays where the disk does not take it. Collective: all call it."""
        directory, checkpoints = self.best.directory(self.run_dir), self.saver.folder
        verify(self.setup, self.step)
        try:
            with self.clock.of("writing models"):
                write(self.setup, directory)
        except UserError as error:
            if dist.is_main():
                print(f"the best state so far, of step {self.step}, is not kept: {error}")
            former.evaluations_since += 1
            self.best = former
            return
        self.best.files = turns.on_main(lambda: [asdict(entry) for entry in entries_of(directory)])
        self.saver.finish()  # a checkpoint that is being written may need the former
        turns.write_on_main(lambda: remove_former(directory, checkpoints), directory)

    def _forget_damaged_best(self) -> None:
        """Choose among later states where the best one is not as it was written. Collective: every rank calls it."""
        if not self.best.metrics:
            if self.at_target:
                self.measured_at = -1  # the disk had no room for it
        elif (problem := turns.on_main(lambda: self.best.problem(self.run_dir))) is not None:
            if dist.is_main():
                print(f"the best state, of step {self.best.step}, is lost: {problem}; chosen among later ones")
            self.best, self.measured_at = Best(), -1

    def _save_is_planned(self) -> bool:
        plan, checkpoint = self.setup.plan, self.config.checkpoint
        at_end = checkpoint.epochs and (self.step % plan.steps_per_epoch == 0 or self.step == plan.total_steps)
        return at_end or (checkpoint.steps is not None and self.step % checkpoint.steps == 0)

    def _save(self) -> None:
        """Begin to write a checkpoint. Collective: every rank calls it."""
        pruner, student = self.setup.pruner, self.setup.student
        measured = self.at_target and self.measured_at == self.step
        state = state_of(student, pruner) | {
            "config": asdict(self.config),
            "data": self.setup.data,
            "files": self.setup.files,
            "models": self.setup.models,
            "environment": self.setup.environment,
            "new_weights": self.setup.new_weights,
            "wandb_id": stored_id(self.run_dir),
            "trainer": self.state(),
        }
        check = pruner.unmasked if pruner is not None and pruner.carried else list
        merit = self.setup.task.merit(self.metrics) if measured else None
        with self.clock.of("checkpoints"):
            self.saver.save(self.step, owned_tensors(student, pruner), state, merit, check)

    def state(self) -> dict[str, Any]:
        """Return where the run stands, for JSON."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return kept | {"best": asdict(self.best), "seconds": self.seconds, "seconds_of": self.clock.seconds}

    def resume(self, checkpoint: Path, manifest: Manifest) -> None:
        """Go on from a checkpoint that the student was loaded from. Collective: every rank calls it."""
        restore(self.setup.student, self.setup.pruner, Pieces(checkpoint), manifest.state)
        state = manifest.state["trainer"]
        self.step = self.began_at = manifest.step
        self.best = Best(**state["best"])
        self.seconds_before, self.clock.seconds = state["seconds"], state.get("seconds_of", {})
        for name in _KEPT:
            setattr(self, name, state[name])
        self.setup.new_weights = manifest.state["new_weights"]
        self.setup.files = manifest.state.get("files", {})  # older ones do not tell
        self.setup.models = manifest.state.get("models", {}) | self.setup.models
        self.saver.last_step = manifest.step
        if self.config.train.select == "best":
            self._forget_damaged_best()

    def measure_teacher(self) -> None:
        """Measure the teacher, which is the dense model, and say what it can. Collective: every rank calls it."""
        assert self.setup.teacher is not None
        with self.clock.of("evaluations"):
            self.dense_metrics = self.setup.teacher.measure(self.config.train.eval_batch_size)
        self.monitor.log(lines.of_teacher(self.setup, self.step, self.dense_metrics))
        if dist.is_main():
            print("the teacher:", ", ".join(f"{name} {value:.4f}" for name, value in self.dense_metrics.items()))
            if (remark := self.setup.task.remark(self.dense_metrics)) is not None:
                print(f"the teacher: {remark}")

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, in all processes."""
        return self.seconds_before + time.time() - self._started_at

    def _describe_model(self, directory: Path) -> None:
        """Write what makes a directory of weights a model's."""
        describe(self.setup.student.module, self.setup.task.tokenizer, directory)

    @property
    def at_target(self) -> bool:
        """Whether the weights have the target sparsity: only such states may be chosen (SMC-Bench's trap)."""
        pruner = self.setup.pruner
        if pruner is None:
            return True
        return pruner.carried and pruner.sparsity_asked == Fraction(str(self.config.pruning.sparsity))

    def write_final(self) -> None:
        """Write ``final/``: the last state or the best one, at the target sparsity. Collective: every rank calls it.

        Raises:
            UserError: on every rank, where no step has carried the last pruning.
        """
        if not self.at_target:
            raise UserError(
                "the step of the last pruning was skipped, as fp16's gradients were not finite; allowed: a pruning.end "
                "some steps ahead of the end of the run"
            )
        final = self.run_dir / "final"
        if self.config.train.select == "last":
            verify(self.setup, self.step)
            with self.clock.of("writing models"):
                write(self.setup, final)
            return
        if not self.best.metrics:
            raise UserError(f"no state could be kept in {self.run_dir}; allowed: room on its disk, and the run again")
        turns.write_on_main(lambda: copy_directory(self.best.directory(self.run_dir), final), final)

    @property
    def final_metrics(self) -> dict[str, float]:
        """The metrics of the state in ``final/``."""
        return self.metrics if self.config.train.select == "last" else self.best.metrics

    @property
    def final_step(self) -> int:
        """The optimizer steps of the state in ``final/``."""
        return self.step if self.config.train.select == "last" else self.best.step

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return self.at_target and patience is not None and self.best.evaluations_since >= patience
