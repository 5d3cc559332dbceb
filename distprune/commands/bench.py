"""``distprune bench``: what pruning costs on this machine, as a table and as JSON."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distprune import dist, turns
from distprune.benchmarks import checkpoints, memory, models, selection, steps, training
from distprune.errors import UserError
from distprune.monitor.records import check_places, save_json

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(benchmark: str, threads: int, repeat: int, json_path: str | None, **options: Any) -> None:
    """Measure, print a table and write JSON on rank 0. Collective: every rank calls it."""
    dist.init()
    turns.on_main(lambda: check_places(json_path))
    if repeat < 1 or threads < 1:
        raise UserError(f"--repeat is {repeat} and --threads {threads}; allowed: at least 1")
    torch.set_num_threads(threads)
    measures: dict[str, Callable[..., tuple[Table, list[dict[str, Any]]]]]
    measures = {
        "select": _select,
        "step": _step,
        "train": _train,
        "checkpoint": _checkpoint,
        "memory": _memory,
    }
    table, records = measures[benchmark](repeat, **options)

    def show() -> None:
        Console(width=140).print(table)
        if json_path is not None:
            save_json(json_path, {"results": records})

    turns.on_main(show)
    dist.shutdown()


@contextmanager
def _shared_folder(parent: str | None = None) -> Iterator[Path]:
    """Give all ranks rank 0's temporary folder, until all are done. Collective: every rank calls it."""
    if parent is not None and not Path(parent).is_dir():
        raise UserError(f"--folder is {parent!r}; allowed: a directory that is there, on every node")
    with tempfile.TemporaryDirectory(dir=parent) as own:
        yield Path(dist.gather([own])[0])
        dist.barrier()


def _section(stage: int, dtype: str) -> dict[str, Any]:
    """Return DeepSpeed's options of a ZeRO stage and a type."""
    return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": dtype == "bf16"}}


def _check_batch_size(batch_size: int) -> dist.World:
    world = dist.detect()
    if batch_size < 1 or batch_size % world.size:
        raise UserError(f"--batch-size is {batch_size}; allowed: a multiple of the {world.size} ranks, at least 1")
    return world


def _check_length(length: int) -> None:
    if not 1 <= length <= models.POSITIONS:
        raise UserError(f"--length is {length}; allowed: 1 to the models' {models.POSITIONS} tokens")


def _select(repeat: int, sizes: Sequence[float], dtype: str, alone: bool) -> tuple[Table, list[dict[str, Any]]]:
    if not all(1 <= size < float("inf") for size in sizes):
        raise UserError(f"--sizes is {', '.join(f'{size:g}' for size in sizes)}; allowed: at least 1 weight each")
    device = dist.detect().device
    measured = [selection.measure(int(size), _DTYPES[dtype], device, repeat, not alone) for size in sizes]
    table = Table(title=f"a pruning to 80 %, and on to 85 %: times over one read ({dtype}, {device.type})")
    columns = ("weights", "ranks", "threads", "one read", "to 80 %", "to 85 %", "kthvalue", "topk")
    for name in (*columns, "reads", "collectives", "KiB sent", "MiB extra"):
        table.add_column(name, justify="right")
    for each in measured:
        ratios = {name: f"{ratio:.1f}" for name, ratio in each.ratios.items()}
        table.add_row(
            f"{each.weights:,}",
            str(each.ranks),
            str(each.threads),
            f"{each.read * 1e3:.2f} ms",
            *(ratios.get(name, "") for name in ("first", "next", "kthvalue", "topk")),
            str(each.passes),
            str(each.collectives),
            f"{each.wire_bytes / 1024:.1f}",
            "" if each.extra_bytes is None else f"{each.extra_bytes / 2**20:.1f}",
        )
    return table, [each.record() for each in measured]


def _step(
    repeat: int, model: str, dtype: str, stage: int, batch_size: int, length: int
) -> tuple[Table, list[dict[str, Any]]]:
    world = _check_batch_size(batch_size)
    _check_length(length)
    with _shared_folder() as folder:
        each = steps.measure(folder, model, _section(stage, dtype), batch_size, length, repeat)
    table = Table(
        title=f"{model}, {dtype}, ZeRO-{stage}, {world.size} ranks, batches of {batch_size} x {length} tokens"
    )
    for name in ("", "median s", "ratio", "95 % interval"):
        table.add_column(name, justify="right")
    middle = {name: median(times) for name, times in vars(each).items() if isinstance(times, list)}
    table.add_row("without masks", f"{middle['dense']:.3f}")
    for name, label, ratio in (
        ("masked", "with masks, over without", each.masked_ratio),
        ("taught", "and a teacher, over none", each.taught_ratio),
    ):
        interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        table.add_row(label, f"{middle[name]:.3f}", f"{ratio['median']:.3f}", interval)
    table.add_row("masks by themselves", f"{each.masking:.4f}", f"{each.masking / middle['dense']:.4f}")
    return table, [each.record()]


def _train(
    repeat: int, model: str, dtype: str, stage: int, batch_size: int, steps: int
) -> tuple[Table, list[dict[str, Any]]]:
    world = _check_batch_size(batch_size)
    if steps < 1:
        raise UserError(f"--steps is {steps}; allowed: at least 1")
    with _shared_folder() as folder:
        each = training.measure(folder, model, _section(stage, dtype), batch_size, steps, repeat)
    table = Table(title=f"{model}, {dtype}, ZeRO-{stage}, {world.size} ranks: whole training steps of {batch_size}")
    table.add_column("")
    table.add_column("examples/s", justify="right")
    for name in ("dense", "pruned", "cached", "live", "trainer", "same_options"):
        table.add_row(name, f"{median(getattr(each, name)):.1f}")
    table.add_section()
    for name, ratio in each.ratios.items():
        table.add_row(name, f"{ratio:.3f}")
    return table, [each.record()]


def _checkpoint(
    repeat: int, model: str, dtype: str, stage: int, folder: str | None
) -> tuple[Table, list[dict[str, Any]]]:
    with _shared_folder(folder) as shared:
        each = checkpoints.measure(shared, model, _section(stage, dtype), repeat)
    table = Table(
        title=f"{model}, {dtype}, ZeRO-{stage}, {each.ranks} ranks: checkpoints of {each.bytes / 1e6:,.0f} MB"
    )
    for name in ("", "median s", "over a plain write"):
        table.add_column(name, justify="right")
    for name, label in (
        ("plain", "plain write and fsync"),
        ("waiting", "a save that is waited for"),
        ("beside", "training stands still for a save beside it"),
        ("step", "(a forward and backward pass)"),
    ):
        table.add_row(label, f"{median(getattr(each, name)):.3f}", f"{each.ratio(name):.3f}")
    return table, [each.record()]


def _memory(
    repeat: int, model: str, dtype: str, stage: int, batch_size: int, length: int, teacher: int | None
) -> tuple[Table, list[dict[str, Any]]]:
    world = _check_batch_size(batch_size)
    _check_length(length)
    with _shared_folder() as folder:
        each = memory.measure(folder, model, _section(stage, dtype), batch_size, length, repeat, teacher)
    table = Table(title=f"{model}, {dtype}, ZeRO-{stage}, {world.size} ranks: MB of the rank that takes most")
    table.add_column("")
    table.add_column("MB", justify="right")
    for name, size in each.parts.items():
        table.add_row(name, f"{size / 1e6:,.0f}")
    table.add_section()
    table.add_row("estimated", f"{each.estimated / 1e6:,.0f}")
    table.add_row("measured, above the imports", f"{each.measured / 1e6:,.0f}")
    table.add_row("estimated over measured", f"{each.estimated / each.measured:.3f}")
    return table, [each.record()]
