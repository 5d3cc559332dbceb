"""``distprune train``: fine-tune, prune and distil, under any launcher or alone."""

import time
from pathlib import Path
from typing import Any

from distprune import dist, settings
from distprune.config import Config
from distprune.errors import UserError
from distprune.evaluate import evaluate
from distprune.monitor import Monitor
from distprune.monitor.plots import plot_layers, plot_run
from distprune.report import model_card, read_metrics, write_json
from distprune.setup import prepare
from distprune.summary import pruning_record, summarise
from distprune.train import Trainer


def run(config_path: str, overrides: list[str]) -> None:
    """Train as configured, and write the run directory. Collective: every rank calls it."""
    world = dist.init()
    if dist.is_main():
        print(f"{world.size} ranks on {world.device.type}, started by {world.launcher.replace('none', 'no launcher')}")
    train(dist.agree(lambda: settings.load_valid(config_path, overrides)))
    dist.shutdown()


def train(config: Config) -> dict[str, Any]:
    """Carry out one run in an existing process group. Collective: every rank calls it.

    Returns:
        The run's summary on rank 0, an empty one elsewhere.
    """
    started = time.time()
    run_dir = Path(config.train.output).expanduser()
    dist.agree(lambda: _check_free(run_dir))
    setup = prepare(config)
    dist.write_on_main(lambda: _claim(run_dir, config), run_dir)
    if setup.new_weights and dist.is_main():
        print(f"new weights, which {config.model.path} lacks: {', '.join(setup.new_weights)}")
    dense = None
    try:
        with Monitor(run_dir, config, setup.plan.total_steps, enabled=dist.is_main()) as monitor:
            if setup.teacher is not None:
                dense = evaluate(setup.teacher, setup.task, setup.task.validation, config.train.eval_batch_size)
            trainer = Trainer(config, setup, monitor, run_dir)
            trainer.run()
            trainer.write_final()
    except UserError:
        dist.barrier()  # all ranks are here; rank 0 may have had to wait for wandb, and has the sentence to say
        raise
    summary = summarise(trainer, dense or trainer.dense_metrics, time.time() - started)
    # All ranks wait for rank 0: a launcher may end them as soon as one has ended.
    dist.write_on_main(lambda: _write_reports(trainer, summary), run_dir)
    return summary


def _check_free(run_dir: Path) -> None:
    """Refuse a run directory that holds anything."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"train.output {str(run_dir)!r} is not empty; allowed: a new or empty directory")


def _claim(run_dir: Path, config: Config) -> None:
    """Make the run directory; of two runs that want the same one, the second is refused."""
    _check_free(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "config.yaml").open("x") as file:
        file.write(settings.to_yaml(config))


def _write_reports(trainer: Trainer, summary: dict[str, Any]) -> None:
    run_dir = trainer.run_dir
    write_json(run_dir / "summary.json", summary)
    if summary["masked_weights"]:
        write_json(run_dir / "final" / "pruning.json", pruning_record(trainer, summary))
    (run_dir / "final" / "README.md").write_text(model_card(summary))
    if layers := summary["layers"]:
        sparsities = {name: layer["masked"] / layer["weights"] for name, layer in layers.items()}
        plot_layers(sparsities, run_dir / "layers.png")
    plot_run(read_metrics(run_dir / "metrics.jsonl"), run_dir / "plot.png", summary["dense_metric"], run_dir.name)
    print(
        f"{summary['metric_name']} {summary['final_metric']:.4f} at sparsity {summary['sparsity_masked']:.4f} "
        f"-> {run_dir / 'final'}, {run_dir / 'summary.json'}, {run_dir / 'plot.png'}"
    )
