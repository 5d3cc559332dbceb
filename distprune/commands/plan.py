"""``distprune plan``: memory, bytes on the wire and hours of a run, in one process before its job is queued."""

from dataclasses import replace
from math import inf

from rich.console import Console
from rich.table import Table

from distprune import settings
from distprune.errors import UserError
from distprune.planning import memory, wire
from distprune.planning.hours import hours
from distprune.planning.memory import Need
from distprune.planning.subject import Subject, subject_of

_GB = 1e9


def run(config_path: str, overrides: list[str], world: int, examples_per_s: float | None) -> None:
    """Print a table of memory, one of the wire, and the hours.

    Args:
        config_path: YAML file.
        overrides: ``key=value``.
        world: ranks that the run is planned for.
        examples_per_s: of all ranks together; None: measured on this machine.

    Raises:
        UserError: where the run could not be, or DeepSpeed's options are not known here.
    """
    if examples_per_s is not None and not 0 < examples_per_s < inf:
        raise UserError(f"--examples-per-s is {examples_per_s}; allowed: more than 0")
    subject = subject_of(settings.load_valid(config_path, overrides), world)
    console = Console(soft_wrap=True)
    need = subject.need(on_gpu=True)
    console.print(memory_table(need))
    console.print(memory_table(replace(need, on_gpu=False)))
    console.print(
        "Activations and outputs: counted here in forward passes of the longest example; a GPU's attention kernels may "
        "keep less, its allocator leaves gaps that are not counted, and torch_autocast is not. An evaluation's batches "
        f"have {subject.config.train.eval_batch_size} examples (train.eval_batch_size); caching is the teacher's pass "
        "for its cache, ahead of the run."
    )
    console.print(wire_table(subject))
    console.print(_hours(subject, examples_per_s))


def memory_table(need: Need) -> Table:
    """Return a table of a rank's memory in each moment of a run that may be the fullest."""
    layout, moments = need.layout, memory.moments(need)
    kind, dtype = "GPU" if need.on_gpu else "CPU", str(layout.dtype).removeprefix("torch.")
    title = (
        f"GB a rank on {kind}s: ZeRO-{layout.stage}, {dtype}, {layout.world} ranks, micro batches of {need.micro_batch}"
    )
    columns = {name: each.device for name, each in moments.items()}
    if need.on_gpu:
        columns["on the host"] = memory.peak(need).host
    table = Table("", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        table.add_row(row, *(_gigabytes(column[row]) for column in columns.values()))
    table.add_section()
    table.add_row("all", *(_gigabytes(column.total()) for column in columns.values()))
    return table


def wire_table(subject: Subject) -> Table:
    """Return a table of what a rank sends in an optimizer step."""
    steps, accumulation = subject.plan.total_steps, subject.config.train.accumulation
    prunings, gradients = len(subject.plan.ladder) / steps, subject.score_gradients / steps
    sent = wire.bytes_per_step(
        subject.shapes, subject.layout, subject.teacher_shapes, accumulation, prunings, gradients
    )
    table = Table("", title="MB that a rank sends in an optimizer step")
    table.add_column("MB", justify="right")
    for name, size in sent.items():
        table.add_row(name, f"{size / 1e6:,.3f}")
    table.add_section()
    table.add_row("all", f"{sum(sent.values()) / 1e6:,.3f}")
    return table


def _hours(subject: Subject, examples_per_s: float | None) -> str:
    plan, batch_size, world = subject.plan, subject.config.train.batch_size, subject.layout.world
    source = "as given"
    if examples_per_s is None:
        examples_per_s = subject.examples_per_s() * world
        source = (
            f"{world} times what one process on this machine's CPU does with its {subject.micro_batch} longest "
            "examples, in plain torch: its speed, not the job's, without DeepSpeed and the wire, and as if each rank "
            "had cores of its own"
        )
    batches = f"{plan.total_steps:,} steps"
    if gradients := subject.score_gradients:
        batches += f", and {gradients:,} gradients for the score (fisher.samples before each pruning),"
    took = hours(plan.total_steps + gradients, batch_size, examples_per_s)
    return (
        f"{took:.2f} hours for {batches} of {batch_size} examples at {examples_per_s:.1f} examples/s "
        f"({source}); evaluations, checkpoints, what a score makes of its gradients, and a pass of the teacher for its "
        "cache come on top."
    )


def _gigabytes(size: int) -> str:
    return f"{size / _GB:.3f}" if size else ""
