"""``distprune train``: fine-tune, prune and distil, under any launcher or alone."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distprune import dist, settings, turns
from distprune.checkpoints import run_directory
from distprune.checkpoints.files import FOLDER, Manifest, clear_behind
from distprune.checkpoints.resume import newest_whole
from distprune.config import Config
from distprune.engines.options import bf16_is_slow, dtype_of
from distprune.errors import UserError, written
from distprune.models.card import model_card
from distprune.monitor import Monitor
from distprune.monitor.plots import layers_figure, plot_run
from distprune.monitor.records import read_metrics, write_json
from distprune.monitor.wandb import store_id
from distprune.paths import expanded
from distprune.training.diagnose import name_unknown
from distprune.training.heartbeat import Heartbeat
from distprune.training.interrupts import (
    REQUEUE,
    EndedAtOnce,
    Interrupted,
    StopRequests,
    ending_at_once,
    requeue_job,
)
from distprune.training.setup import Setup, prepare
from distprune.training.summary import pruning_record, summarise
from distprune.training.train import Trainer


def run(config_path: str, overrides: list[str]) -> None:
    """Train as configured, and write the run directory. Collective: every rank calls it."""
    world = dist.init()
    if dist.is_main():
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        print(f"{ranks} on {world.device.type}, started by {world.launcher.replace('none', 'no launcher')}")
    try:
        with Heartbeat(world), ending_at_once():
            train(dist.agree(lambda: settings.load_valid(config_path, overrides)))
    except Interrupted as interrupted:
        # All wait for rank 0: srun ends all ranks as soon as one has ended with another status than 0.
        turns.on_main(partial(_say_how_it_goes_on, interrupted))
        dist.shutdown()  # NCCL may still be sending what rank 0 said
        raise
    except EndedAtOnce as ended:
        _say_how_it_ends(ended)
        raise
    dist.shutdown()


def _say_how_it_goes_on(interrupted: Interrupted) -> None:
    print(f"distprune: {interrupted}", file=sys.stderr, flush=True)
    if interrupted.requeue:
        print(f"distprune: {requeue_job(interrupted.trained)}", file=sys.stderr, flush=True)


def _say_how_it_ends(ended: EndedAtOnce) -> None:
    """Leave word to queue the job again on any rank: the others may hear nothing, and end as this one is missing."""
    if dist.is_main():
        print(f"distprune: {ended}", file=sys.stderr, flush=True)
    if ended.requeue and (dist.is_main() or REQUEUE in os.environ):
        print(f"distprune: {requeue_job(trained=False)}", file=sys.stderr, flush=True)


def train(config: Config) -> dict[str, Any]:
    """Carry out one run in an existing process group, or the rest of one. Collective: every rank calls it.

    Returns:
        The run's summary on rank 0, an empty one elsewhere.
    """
    run_dir = expanded(config.train.output)
    try:
        return _train(config, run_dir)
    finally:
        run_directory.unlock(run_dir)


def _train(config: Config, run_dir: Path) -> dict[str, Any]:
    """Collective: every rank calls it."""
    before = None
    if unfinished := turns.on_main(lambda: _enter(run_dir)):
        before = newest_whole(run_dir / FOLDER)
        turns.on_main(lambda: _say_where_it_goes_on(run_dir, config, before))
    setup = prepare(config, before and before[0])
    if before is not None:
        turns.on_main(lambda: _check_fits(setup, before[1]))
    turns.write_on_main(lambda: _make_ready(run_dir, config, unfinished, before and before[1]), run_dir)
    run_directory.refuse_unshared(run_dir)
    for note in setup.task.notes if dist.is_main() else ():
        print(f"data: {note}")
    if dtype_of(config.deepspeed.student) == torch.bfloat16 and bf16_is_slow() and dist.is_main():
        print("this CPU computes bf16 several times more slowly than fp32: deepspeed.student.bf16.enabled=false")
    if setup.new_weights and dist.is_main():
        print(f"new weights, which {config.model.path} lacks: {', '.join(setup.new_weights)}")
    if setup.pruner is not None and not config.pruning.include and dist.is_main():
        name_unknown(setup.student.module, setup.pruner)
    try:
        monitoring = Monitor(run_dir, config, setup.plan.total_steps, enabled=dist.is_main())
        with StopRequests() as requests, monitoring as monitor:
            trainer = Trainer(config, setup, monitor, run_dir, requests)
            if before is not None:
                trainer.resume(*before)
            if setup.teacher is not None and not _knows_teacher(before):
                trainer.measure_teacher()
            trainer.run()
            trainer.write_final()
    except (UserError, Interrupted):
        dist.barrier()  # all ranks are here; rank 0 may have had to wait for wandb, and has the sentence to say
        raise
    summary = summarise(trainer)
    # All ranks wait for rank 0: a launcher may end them as soon as one has ended.
    turns.write_on_main(lambda: _write_reports(trainer, summary), run_dir)
    return summary


def _enter(run_dir: Path) -> bool:
    """Return whether there is a run to go on with, which is locked then."""
    with written(run_dir):
        unfinished = run_directory.is_unfinished(run_dir)
        if unfinished:
            run_directory.lock(run_dir)
        return unfinished


def _say_where_it_goes_on(run_dir: Path, config: Config, before: tuple[Path, Manifest] | None) -> None:
    """Say from where a run goes on, and what has changed.

    Raises:
        UserError: where what has changed would make another run of it.
    """
    old = before[1].state["config"] if before else run_directory.started_with(run_dir)
    changed = run_directory.changes(old, config, _knows_teacher(before))
    where = f"step {before[1].step} ({before[0]})" if before else "the beginning: it has no checkpoint yet"
    print(f"going on with the run in {run_dir} from {where}")
    for change in changed:
        print(f"changed since: {change}")


def _knows_teacher(before: tuple[Path, Manifest] | None) -> bool:
    """Return whether a run goes on from a checkpoint with a hash of the teacher's files, and has measured it."""
    return before is not None and "teacher.path" in before[1].state.get("models", {})


def _check_fits(setup: Setup, manifest: Manifest) -> None:
    """Refuse a checkpoint of other data or models, or from behind the end of the run; say what it was made with."""
    if setup.data != manifest.state["data"]:
        raise UserError("the training or validation data are not those that the run began with; allowed: the same")
    models = manifest.state.get("models", {})  # those of earlier commits do not tell, or by other hashes
    for key in (key for key in setup.models if models.get(key, setup.models[key]) != setup.models[key]):
        raise UserError(f"the files of {key} are not those that the run began with; allowed: the same")
    if manifest.step > setup.plan.total_steps:
        raise UserError(
            f"train.epochs makes a run of {setup.plan.total_steps} steps, and {manifest.step} are done; allowed: more"
        )
    before = manifest.state.get("environment", setup.environment)
    for name in (name for name, now in setup.environment.items() if before.get(name) != now):
        print(f"changed since: {name} {before.get(name)} -> {setup.environment[name]}")


def _make_ready(run_dir: Path, config: Config, unfinished: bool, manifest: Manifest | None) -> None:
    """Claim the directory of a new run, or clear away what the process before has left behind the checkpoint."""
    if not unfinished:
        run_directory.claim(run_dir, config)
        return
    step = manifest.step if manifest else 0
    clear_behind(run_dir / FOLDER, step)
    run_directory.cut_metrics(run_dir, step)
    if manifest is not None and manifest.state["wandb_id"] is not None:
        store_id(run_dir, manifest.state["wandb_id"])
    run_directory.write_config(run_dir, config)


def _write_reports(trainer: Trainer, summary: dict[str, Any]) -> None:
    run_dir, task = trainer.run_dir, trainer.setup.task
    if summary["masked_weights"]:
        write_json(run_dir / "final" / "pruning.json", pruning_record(trainer, summary))
    (run_dir / "final" / "README.md").write_text(model_card(summary, task.auto_class.__name__, task.hub_task))
    if layers := summary["layers"]:
        sparsities = {name: layer["masked"] / layer["weights"] for name, layer in layers.items()}
        layers_figure(sparsities).savefig(run_dir / "layers.png")
    plot_run(read_metrics(run_dir / "metrics.jsonl"), run_dir / "plot.png", summary["dense_metric"], run_dir.name)
    write_json(run_dir / "summary.json", summary)  # with it the run is finished; until then it may need what follows
    shutil.rmtree(run_dir / "best", ignore_errors=True)
    print(
        f"{summary['metric_name']} {summary['final_metric']:.4f} at sparsity {summary['sparsity_masked']:.4f} "
        f"-> {run_dir / 'final'}, {run_dir / 'summary.json'}, {run_dir / 'plot.png'}"
    )
    if (remark := task.remark(summary["final_metrics"])) is not None:
        print(remark)
