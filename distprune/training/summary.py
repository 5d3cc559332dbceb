"""What a finished run reports of itself: counts read back from the written files, metrics, sizes, versions."""

from dataclasses import asdict
from typing import Any

from distprune import dist
from distprune.config import Config, PruningConfig, RegrowthConfig
from distprune.engines.options import stage_of
from distprune.models.card import chosen_by
from distprune.models.export import Counts, count_zeros
from distprune.pruning.targets import matrices_of
from distprune.training.train import Trainer
from distprune.zero.engine import held_bytes


def summarise(trainer: Trainer) -> dict[str, Any]:
    """Return the run's summary.

    Collective: every rank calls it. Rank 0 reads the written model.

    Args:
        trainer: after its run, with ``final/`` written.
    """
    config, setup, dense = trainer.config, trainer.setup, trainer.dense_metrics
    layers = {} if setup.pruner is None else setup.pruner.masked_of
    sizes = {"student": dist.gather([held_bytes(setup.student)])}
    if setup.teacher is not None:
        sizes["teacher"] = dist.gather([setup.teacher.held_bytes()])
    if not dist.is_main():
        return {}
    metrics, seconds = trainer.final_metrics, trainer.seconds
    name = next(iter(metrics))
    return {
        "task": config.task.hub or config.task.train,
        "data": setup.files,
        "model_files": setup.models,
        "base_model": config.model.path,
        "teacher": config.teacher.path if setup.teacher is not None else None,
        "metric_name": name,
        "lower_is_better": name in setup.task.lower_is_better,
        "dense_metric": None if dense is None else dense[name],
        "final_metric": metrics[name],
        "dense_metrics": dense,
        "final_metrics": metrics,
        **_sparsity(trainer, layers),
        "steps": trainer.step,
        "final_step": trainer.final_step,
        "skipped_steps": trainer.skipped_steps,
        "score_gradients": _score_gradients(trainer),
        "wall_time_s": round(seconds, 1),
        "seconds_of": trainer.clock.whole(seconds),
        "world_size": setup.world.size,
        "launcher": setup.world.launcher,
        "zero_stage": {
            "student": stage_of(config.deepspeed.student),
            "teacher": stage_of(config.deepspeed.teacher),
        },
        "bytes_per_rank": sizes,
        "new_weights": setup.new_weights,
        "environment": setup.environment,
    }


def pruning_record(trainer: Trainer, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what ``final/pruning.json`` says: how the weights were chosen, and how many went in each matrix."""
    keys = ("method", "sparsity_masked", "prunable_weights", "masked_weights", "encoder_sparsity", "model_sparsity")
    config: Config = trainer.config
    return {
        **{key: summary[key] for key in keys},
        "layers": summary["layers"],
        **chosen_by(asdict(config)),
    }


def _method(pruning: PruningConfig, regrowth: RegrowthConfig, prunings: int) -> str:
    """Return in words how the weights were chosen, in so many prunings."""
    if pruning.sparsity == 0:
        begun = f"; the zeros it began with {'move by regrowth' if regrowth.part else 'stay'}"
        return "no pruning" + begun * pruning.start_sparse
    what = {"unstructured": "single weights", "heads": "attention heads", "neurons": "feed-forward neurons"}
    where = {"global": "", "groups": " within groups"}.get(pruning.scope, f" within each {pruning.scope}")
    how = "one-shot" if prunings == 1 else "gradual"
    whose = " of another model's weights" if pruning.weights_of else ""
    moving = ", with regrowth" if regrowth.part else ""
    return f"{how} pruning of {what.get(pruning.structure, pruning.structure)}{where} by {pruning.score}{whose}{moving}"


def _score_gradients(trainer: Trainer) -> int:
    """Return how many global batches went forward and backward for the score alone (`curvature`)."""
    pruner = trainer.setup.pruner
    if pruner is None or not pruner.score.learns:
        return 0
    return trainer.config.fisher.samples * sum(step < trainer.step for step in trainer.setup.plan.ladder)


def _sparsity(trainer: Trainer, layers: dict[str, int]) -> dict[str, Any]:
    """Return the counts of the mask and of the written file, over all their denominators."""
    pruner, counts = trainer.setup.pruner, count_zeros(trainer.run_dir / "final")
    encoder = _total(counts, matrices_of(trainer.setup.student.module))
    model = _total(counts, [name for name, _ in trainer.setup.student.module.named_parameters()])
    masked, prunable = (0, 0) if pruner is None else (pruner.masked, pruner.total)
    in_file = _total(counts, layers)[0]
    assert in_file >= masked, f"{in_file} zeros were written, {masked} weights are masked"
    return {
        "method": _method(trainer.config.pruning, trainer.config.regrowth, len(trainer.setup.plan.ladder)),
        "sparsity_target": trainer.config.pruning.sparsity,
        "sparsity_masked": masked / prunable if prunable else 0.0,
        "masked_weights": masked,
        "prunable_weights": prunable,
        "zeros_in_file": in_file,
        "encoder_sparsity": encoder[0] / encoder[1] if encoder[1] else 0.0,
        "encoder_zeros": encoder[0],
        "encoder_weights": encoder[1],
        "model_sparsity": model[0] / model[1],
        "model_weights": model[1],
        "stored_bytes": sum(each.bytes for each in counts.values()),
        "packed_bytes": sum(each.packed_bytes for each in counts.values()),
        "layers": {name: {"masked": count, "weights": counts[name].elements} for name, count in layers.items()},
    }


def _total(counts: dict[str, Counts], names: Any) -> tuple[int, int]:
    """Return zeros and elements of some tensors together."""
    return sum(counts[name].zeros for name in names), sum(counts[name].elements for name in names)
