"""The command line: ``distprune COMMAND ...``, the same for one process and for every rank of a launcher."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from distprune import __version__, allocator
from distprune.errors import LOST, STOPPED, CannotGoOn, UserError
from distprune.training.interrupts import EndedAtOnce, Interrupted

RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its name and arguments; None: those of the process.

    Returns:
        The exit status: 0; 2 where the user gave something that cannot be used; 75 where a run was asked to stop, and
        76 where other ranks are gone: in both cases the same command goes on with it.
    """
    status = 1
    try:
        status = _run(argv)
    finally:
        if status != LOST:
            _note_end(status)
    return status


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = options_of(sys.argv[1:] if argv is None else argv)
        imported(f"distprune.commands.{options.pop('command')}").run(**options)
    except UserError as error:
        if os.environ.get("DISTPRUNE_DEBUG") == "1":
            raise
        if _is_main():
            print(f"distprune: error: {error}", file=sys.stderr)
        return 2
    except CannotGoOn as lost:
        if lost.speaks:
            print(f"distprune: error: {lost}", file=sys.stderr)
        return LOST
    except (Interrupted, EndedAtOnce):
        return STOPPED
    return 0


def imported(name: str) -> ModuleType:
    """Import a module, and collect no garbage while that takes: there is next to none, and looking takes a fifth of it.

    What the imports leave stays for good, and is left alone when DeepSpeed has all garbage collected for each engine.

    Args:
        name: of a module.
    """
    if name in sys.modules or not gc.isenabled():
        return import_module(name)
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _note_end(status: int) -> None:
    """Leave word that the command ended by itself, for slurm/train.sbatch: srun's status tells of ranks it killed."""
    if "DISTPRUNE_ENDED" in os.environ:
        try:
            Path(os.environ["DISTPRUNE_ENDED"]).write_text(f"{status}\n")
        except OSError as error:  # the command's own end is what counts
            print(f"distprune: {error}", file=sys.stderr)


def entry() -> NoReturn:
    """Run one command as the whole of a process.

    Where ranks met, the interpreter is not taken down: gloo's threads outlive the process group, and one that lets go
    of a tensor while Python finalises ends the process by an abort, after a run that went well.
    """
    allocator.prepare()
    status = main()
    if "deepspeed" not in sys.modules:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def options_of(argv: Sequence[str]) -> dict[str, Any]:
    """Return the command's name and the arguments of its ``run``.

    Raises:
        UserError: what no command takes.
    """
    # DeepSpeed's launcher gives every rank this argument; the environment says the same.
    given = [text for text in argv if not text.startswith(("--local_rank=", "--local-rank="))]
    parser = _parser()
    # argparse takes the overrides up to the first option; those behind it are left over.
    known, rest = parser.parse_known_args(given)
    options = vars(known)
    late = [text for text in rest if "overrides" in options and "=" in text and not text.startswith("-")]
    if len(late) < len(rest):
        parser.error(f"unknown arguments: {' '.join(text for text in rest if text not in late)}")
    if late:
        options["overrides"] += late
    path = options.get("config_path")
    if options["command"] in ("config", "doctor", "oneshot") and path and "=" in path and not Path(path).exists():
        options["config_path"], options["overrides"] = None, [path, *options["overrides"]]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distprune", description="Gradual magnitude pruning with distillation under DeepSpeed ZeRO.")
    parser.add_argument("--version", action="version", version=f"distprune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="fine-tune, prune and distil as configured")
    _configurable(train)

    evaluation = commands.add_parser("eval", help="measure a model directory on a configuration's task")
    evaluation.add_argument("model_dir", metavar="MODEL_DIR", help="Hugging Face model directory or hub id")
    _configurable(evaluation)

    schedule = commands.add_parser("schedule", help="show the learning rate and the sparsity over the run")
    schedule.add_argument("--examples", type=int, metavar="N", help="training examples; left out: count the data")
    schedule.add_argument("--png", default="schedule.png", metavar="PATH", help="where to draw it [%(default)s]")
    _configurable(schedule)

    _sweep(commands.add_parser("sweep", help="the runs of a grid of methods, seeds and keys, and their table and plot"))

    report = commands.add_parser("report", help="a page about a run, or about several side by side")
    report.add_argument("run_dirs", metavar="RUN", nargs="+", help="a run's directory")
    report.add_argument("--html", default="report.html", metavar="PATH", help="with .png and .csv beside [%(default)s]")

    plan = commands.add_parser("plan", help="memory, wire and hours of a run, before its job is queued")
    plan.add_argument("--world", type=int, required=True, metavar="N", help="ranks that it is planned for")
    plan.add_argument("--examples-per-s", type=float, metavar="X", help="over all ranks; left out: measured here")
    _configurable(plan)

    oneshot = commands.add_parser("oneshot", help="prune a model directory without training")
    oneshot.add_argument("model_dir", metavar="MODEL_DIR", help="Hugging Face model directory or hub id")
    oneshot.add_argument("out", metavar="OUT", help="new directory for the pruned copy")
    _configurable(oneshot, optional=True)

    export = commands.add_parser("export", help="a checkpoint as a model; a model packed, or unpacked, or shrunk")
    export.add_argument("source", metavar="DIR", help="checkpoint, model directory, or one that is packed")
    export.add_argument("out", metavar="OUT", help="new directory")
    export.add_argument("--shrink", action="store_true", dest="shrinking", help="take out zero heads and neurons")
    export.add_argument(
        "--packed", action="store_true", dest="packing", help="a checkpoint's model with a bit a weight, and the values"
    )

    prepare = commands.add_parser("prepare", help="fetch, tokenise and compile, for a job that has no network")
    _configurable(prepare)

    doctor = commands.add_parser("doctor", help="check nodes, network and disk on every rank, before a job")
    _configurable(doctor, optional=True)

    _analyze(commands.add_parser("analyze", help="what your teacher, model and data say about a recipe's choices"))
    _bench(commands.add_parser("bench", help="measure what pruning costs on this machine"))

    config = commands.add_parser("config", help="print every key with its value and meaning, as YAML")
    _configurable(config, optional=True)
    return parser


def _sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("sweep_path", metavar="SWEEP", help="YAML file (docs/sweeps.md)")
    sweep.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="for all runs")
    sweep.add_argument("--results", dest="results_file", metavar="FILE", help="JSON lines; default: as the sweep says")
    sweep.add_argument("--only", action="append", default=[], metavar="PATTERN", help="runs' names, e.g. 'gmp/*=0.9'")
    sweep.add_argument("--dry-run", action="store_true", help="only say what would run")
    sweep.add_argument("--table", action="store_true", dest="only_table", help="only table and plot of what has ended")


def _analyze(analyze: argparse.ArgumentParser) -> None:
    subjects = analyze.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    teacher = subjects.add_parser("teacher", help="how much the teacher says over the temperature")
    _configurable(teacher)
    teacher.add_argument(
        "--rows", type=int, default=2000, metavar="N", help="training rows that are drawn [%(default)s]"
    )
    teacher.add_argument("--temperatures", type=float, nargs="+", default=[], metavar="T", help="left out: 0.5 to 16")
    components = subjects.add_parser("components", help="what each component of a model costs, and where pruning pays")
    _configurable(components)
    components.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.5, 0.8], metavar="S", help="of a component alone [0.5 0.8]"
    )
    components.add_argument("--layers", action="store_true", help="each layer's attention and feed-forward as well")
    for name, subject in (("teacher", teacher), ("components", components)):
        subject.add_argument("--png", default=f"{name}.png", metavar="PATH", help="where to draw it [%(default)s]")
        subject.add_argument("--json", dest="json_path", metavar="PATH", help="where to write all numbers")


def _bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    select = kinds.add_parser("select", help="a pruning: time, memory and wire, beside torch's own ways")
    select.add_argument(
        "--sizes", type=float, nargs="+", default=[85e6, 302e6], metavar="N", help="weights [85e6 302e6]"
    )
    select.add_argument("--alone", action="store_true", help="leave out kthvalue and topk, which take long")
    step = kinds.add_parser("step", help="a training step with masks, without, and with a teacher")
    train = kinds.add_parser("train", help="whole training steps, beside transformers' Trainer")
    train.add_argument("--steps", type=int, default=40, metavar="N", help="counted in each turn [%(default)s]")
    checkpoint = kinds.add_parser("checkpoint", help="what training stands still for a checkpoint")
    checkpoint.add_argument("--folder", metavar="PATH", help="on the disk to measure; left out: the system's own")
    memory = kinds.add_parser("memory", help="the memory of a rank at its peak, and what distprune plan says of it")
    memory.add_argument("--teacher", type=int, choices=(0, 3), metavar="STAGE", help="beside one at ZeRO 0 or 3")
    for kind, stage in ((step, 2), (train, 2), (checkpoint, 3), (memory, 2)):
        kind.add_argument("--model", default="bert-base", choices=["bert-base", "minilm", "tiny"], help="[%(default)s]")
        kind.add_argument("--stage", type=int, default=stage, choices=range(4), help="ZeRO stage [%(default)s]")
    for kind, size in ((step, 32), (train, 32), (memory, 8)):
        kind.add_argument("--batch-size", type=int, default=size, metavar="N", help="over all ranks [%(default)s]")
    for kind in (step, memory):
        kind.add_argument("--length", type=int, default=128, metavar="N", help="tokens of an example [%(default)s]")
    ways = ((select, "fp32", 5), (step, "bf16", 10), (train, "bf16", 3), (checkpoint, "bf16", 5), (memory, "fp32", 3))
    for kind, dtype, repeat in ways:
        kind.add_argument("--dtype", default=dtype, choices=["fp32", "bf16"], help="of the weights [%(default)s]")
        kind.add_argument("--repeat", type=int, default=repeat, metavar="N", help="measurements [%(default)s]")
        kind.add_argument("--threads", type=int, default=1, metavar="N", help="of each rank [%(default)s]")
        kind.add_argument("--json", dest="json_path", metavar="PATH", help="where to write all numbers")


def _configurable(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add a configuration file, and overrides of its keys."""
    file = "YAML file; left out: the defaults" if optional else "YAML file"
    parser.add_argument("config_path", metavar="CONFIG", nargs="?" if optional else None, help=file)
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. pruning.sparsity=0.9")


def _is_main() -> bool:
    """Return whether this is global rank 0, as ``dist.detect`` does, without importing torch."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


if __name__ == "__main__":
    entry()
