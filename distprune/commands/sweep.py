"""``distprune sweep``: the runs of a file, one after another or several at a time, and their table and plot."""

import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from distprune.checkpoints import run_directory
from distprune.disk import write_text
from distprune.errors import UserError, written
from distprune.monitor.records import csv_text
from distprune.sweeps import results
from distprune.sweeps.execute import Outcome, carry_out, check_room
from distprune.sweeps.means import Difference, Mean, differences_of, means_of, record, without_result
from distprune.sweeps.opened import Opened, open_sweep
from distprune.sweeps.spec import Run
from distprune.sweeps.table import draw, markdown, markdown_of_differences
from distprune.training.interrupts import Interrupted


def run(
    sweep_path: str,
    overrides: list[str],
    only: list[str],
    dry_run: bool,
    only_table: bool,
    results_file: str | None = None,
) -> None:
    """Carry out what is missing of a sweep, then write its table and plot.

    Args:
        sweep_path: the file.
        overrides: ``key=value`` for all runs.
        only: patterns (``*``, ``?``, ``[...]``) of the names of runs to carry out, beside what they need; none: all.
        dry_run: print what would run, and run nothing.
        only_table: make table and plot of the results that there are, and of the runs that have ended since.
        results_file: where the results are; None: where the file says.

    Raises:
        UserError: before anything runs, where the file, the results or a run directory do not fit; in the end, where
            runs failed.
    """
    if only_table and (dry_run or only):
        raise UserError("--table is given with --dry-run or --only; allowed: one of them, as a table is of all results")
    opened = open_sweep(sweep_path, overrides, results_file)
    sweep, runs, rows = opened.sweep, opened.runs, opened.rows
    if not (only_table or dry_run):
        check_room(sweep.ranks, sweep.at_once)
        with written(opened.output):
            opened.output.mkdir(parents=True, exist_ok=True)
            run_directory.lock(opened.output)  # until this process ends
        with written(opened.stored):  # now, not when the first run has ended
            opened.stored.parent.mkdir(parents=True, exist_ok=True)
            opened.stored.open("a").close()
        opened.read()
    if only_table:
        _take_up_what_has_ended(opened)
        _say("".join(f"no result: {each.name}\n" for each in runs if each.name not in rows), end="")
        _report(opened)
        return
    names = chosen([each.name for each in runs], only)
    missing = opened.missing(names)
    _say(f"{len(names)} runs, {sum(name in rows for name in names)} with a result, {len(missing)} to run")
    if dry_run:
        _say("".join(f"{each.name}\n" for each in missing), end="")
        return
    opened.check_can_begin(missing)
    outcome = _run(missing, opened)
    if any(each.name in rows for each in runs):
        _report(opened, [*outcome.failed, *outcome.left])
    if outcome.stopped:
        _say("stopped, as asked; the same command goes on from there")
        raise Interrupted(0, None, requeue=False)
    if outcome.failed:
        logs = ", ".join(f"{name} ({log})" for name, log in outcome.failed.items())
        without = f"; not run without them: {', '.join(outcome.left)}" if outcome.left else ""
        raise UserError(f"{len(outcome.failed)} of {len(missing)} runs failed, see their logs: {logs}{without}")


def chosen(names: list[str], patterns: list[str]) -> list[str]:
    """Return the names that any of the patterns of ``--only`` fits, or all where there are none.

    Raises:
        UserError: a pattern that fits no run.
    """
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            raise UserError(f"--only {pattern!r} fits no run; there are e.g. {', '.join(names[:3])}")
    return [name for name in names if not patterns or any(_fits(name, each) for each in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a list in a name looks like a pattern


def _take_up_what_has_ended(opened: Opened) -> None:
    """Write the lines of runs that jobs of their own have carried out, unless a sweep is under way in the folder."""
    ended = [run for run in opened.runs if run.name not in opened.rows and results.is_finished(run, opened.output)]
    opened.check_directories(ended)
    if not ended:
        return
    try:
        run_directory.lock(opened.output)
    except UserError:
        return
    opened.read()
    for each in ended:
        opened.add(each)
    run_directory.unlock(opened.output)


def _run(missing: Sequence[Run], opened: Opened) -> Outcome:
    """Carry out what is missing; each result is written as its run ends."""

    def done(run: Run) -> None:
        row = opened.add(run)
        _say(f"{run.name}: {row['metric_name']} {row['final_metric']}")
        before = opened.rows[run.name]["final_metric"]
        if before != row["final_metric"]:
            _say(f"{run.name} was trained again, and its line has {before}: what builds on it builds on this one")

    finished = [each for each in missing if results.is_finished(each, opened.output)]
    for each in finished:
        done(each)  # it ended, and the sweep was stopped before its line was written
    left, sweep = [each for each in missing if each not in finished], opened.sweep
    return carry_out(left, opened.output, sweep.ranks, sweep.at_once, done, _say)


def _say(text: str, end: str = "\n") -> None:
    """Print, as long as somebody listens: a terminal that was closed is no reason to leave the runs alone."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until this process ends


def _report(opened: Opened, failed: Sequence[str] = ()) -> None:
    """Write table and plot beside the results, and print the table."""
    opened.read()  # also what others have added
    sweep, stored = opened.sweep, opened.stored
    table, means, differences = table_of(opened, failed)
    with written(stored.with_suffix(".md")):
        write_text(stored.with_suffix(".md"), table)
        _write_records(stored, "means", means)
        if sweep.compare:
            _write_records(stored, "differences", differences)
        draw(means, sweep.baseline, opened.path.stem).savefig(stored.with_suffix(".png"))
    _say(f"{table}table and plot: {stored.with_suffix('')}.md, .means.csv, .means.jsonl and .png")


def table_of(opened: Opened, failed: Sequence[str] = ()) -> tuple[str, list[Mean], list[Difference]]:
    """Return the table of a sweep's results, for a reader, and the means and differences in it.

    Args:
        opened: with its results.
        failed: names of runs that have failed, which the table says.

    Raises:
        UserError: there is no result yet.
    """
    runs, rows, sweep = opened.runs, opened.rows, opened.sweep
    known = {each.name: rows[each.name] for each in runs if each.name in rows}
    means = means_of(known, sweep.baseline, sweep.chance)
    if not means:
        raise UserError(f"{opened.stored} has no result of this sweep yet; allowed: --table once it has")
    table = markdown(means, sweep.baseline)
    differences = differences_of(runs, known, sweep.compare, sweep.chance)
    if differences:
        table += "\n" + markdown_of_differences(differences)
    if without := dict.fromkeys([*without_result(runs, known), *failed]):
        table += f"\nWithout a result, and in none of the means: {', '.join(without)}\n"
    return table, means, differences


def _write_records(stored: Path, what: str, of: Sequence[Mean | Difference]) -> None:
    """Write what a table says beside the results, for a spreadsheet and for programs."""
    records = [record(each) for each in of]
    write_text(stored.with_suffix(f".{what}.csv"), csv_text(records))
    write_text(stored.with_suffix(f".{what}.jsonl"), "".join(f"{json.dumps(each)}\n" for each in records))
