#!/usr/bin/env python
"""Write a SLURM job for a configuration, or an array of jobs over a grid or a sweep's file, and submit it.

    python launch/slurm.py CONFIG [key=value ...] --nodes 2 --gpus-per-node 8 --time 8:00:00 --partition gpu
    python launch/slurm.py CONFIG --sweep pruning.sparsity=0.8,0.9 --sweep train.seed=1,2,3 --dry-run
    python launch/slurm.py SWEEP [key=value ...] --gpus-per-node 1

Into a folder beside ``train.output``, or the sweep's ``output`` (its name and ``.job``), go the script, the
configurations as they are now, and the code's revision. The runs of a grid get folders below ``train.output``; when all
have ended, ``results.md`` there has their table. Of a sweep's file (docs/sweeps.md) the runs without a result are
carried out, those that others get models of first, and ``distprune sweep --table`` in the end.
"""

import argparse
import csv
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from distprune import settings
from distprune.config import Config
from distprune.errors import UserError
from distprune.sweeps import results
from distprune.sweeps.opened import open_sweep
from distprune.sweeps.spec import check_files

REPOSITORY = Path(__file__).resolve().parents[1]
COLUMNS = ("run", "sparsity_masked", "metric_name", "final_metric", "dense_metric", "steps", "wall_time_s")

OF_RUNS = ("--gres", "--gpus", "--exclusive", "--mem", "--output", "--error", "--constraint", "--cpus", "--nodes")
"""How options of sbatch begin that are for runs, and not for the table behind them."""

SCRIPT = """#!/usr/bin/env bash
# Written by launch/slurm.py; submitted with: {how}
{options}
set -euo pipefail
cd {here}
export SLURM_SUBMIT_DIR={repository} DISTPRUNE_LOGS={folder}
exec bash {train} {config}
"""
TABLE = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --output={log}
set -euo pipefail
cd {repository}
source launch/common.sh
activate
cd {here}
"${{CONTAINER[@]}}" {table}
"""


@dataclass
class Work:
    """What is to be submitted."""

    output: Path
    """Of the run, or the folder of all of them."""
    waves: list[list[Config]]
    """Runs that can be carried out together, each wave when the one before has ended."""
    table: str | None = None
    """The command that makes the table in the end; None: a single run, no array."""
    table_path: Path | None = None
    """Where it will be."""
    ranks: int = 1
    """Of a run, where the command line says nothing."""

    @property
    def folder(self) -> Path:
        """Where the job is written."""
        return self.output.with_name(self.output.name + ".job")

    @property
    def configs(self) -> list[Config]:
        """All runs, by the number of the array."""
        return [config for wave in self.waves for config in wave]

    @property
    def arrays(self) -> list[tuple[str, list[Config]]]:
        """What sbatch is told of each wave, and its runs."""
        firsts = itertools.accumulate(map(len, self.waves), initial=0)
        return [
            (f"--array={first}-{first + len(wave) - 1}", wave) for first, wave in zip(firsts, self.waves, strict=False)
        ]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of a run, or of a sweep")
    found.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. pruning.sparsity=0.9")
    found.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="one run for each value")
    found.add_argument("--nodes", type=int, default=1, metavar="N", help="machines [%(default)s]")
    ranks = found.add_mutually_exclusive_group()
    ranks.add_argument("--gpus-per-node", type=int, metavar="G", help="a rank on each")
    ranks.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks on a machine's CPUs")
    found.add_argument("--cpus-per-task", type=int, metavar="C", help="cores of a rank")
    found.add_argument("--partition", metavar="P", help="SLURM's partition")
    found.add_argument("--account", metavar="A", help="SLURM's account")
    found.add_argument("--time", metavar="T", help="limit, as SLURM writes it: 8:00:00; the job goes on in another")
    found.add_argument("--warn", type=int, default=180, metavar="S", help="seconds before the limit to save [180]")
    found.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other, as --sbatch=--qos=long"
    )
    found.add_argument("--dry-run", action="store_true", help="print the script, and write and submit nothing")
    found.add_argument("--table", metavar="FOLDER", help="only make the table of a grid's runs")
    return found


def main() -> int:
    """Do what the command line says; return the exit status."""
    given = parser().parse_intermixed_args()
    try:
        if given.table:
            make_table(Path(given.table))
        elif given.config is None:
            raise UserError("no CONFIG given; allowed: a YAML file, or --table FOLDER")
        else:
            submit(given, sweep_work(given) if is_sweep(given.config) else grid_work(given))
    except UserError as error:
        print(f"slurm.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def submit(given: argparse.Namespace, work: Work) -> None:
    """Write the job, and submit it."""
    text, folder = script(given, work), work.folder
    if given.dry_run:
        print(text, end="")
        for array, wave in work.arrays if work.table is not None else ():
            print("".join(f"# {array}: {config.train.output}\n" for config in wave), end="")
        return
    if folder.exists():
        how = f"sbatch {folder / 'job.sbatch'}" if work.table is None else "remove it, once its jobs have ended"
        raise UserError(f"{folder} exists: the job was written before; allowed: {how}")
    folder.mkdir(parents=True)
    write(work, text)
    if work.table is None:
        print(f"job {first_sbatch([str(folder / 'job.sbatch')], folder)}: 1 run, {folder}")
        return
    before = list[str]()
    for array, wave in work.arrays:
        arguments = [array, *before, str(folder / "job.sbatch")]
        job = sbatch(arguments) if before else first_sbatch(arguments, folder)
        print(f"job {job}: {len(wave)} run{'s' * (len(wave) > 1)}, {folder}", flush=True)
        before = [f"--dependency=afterany:{job}"]
    wanted = [f"--partition={given.partition}"] if given.partition else []
    wanted += [f"--account={given.account}"] if given.account else []
    wanted += [word for option in given.sbatch if not option.startswith(OF_RUNS) for word in shlex.split(option)]
    table = sbatch([*before, *wanted, str(folder / "table.sbatch")])
    print(f"job {table}: their table, {work.table_path}")


def is_sweep(path: str) -> bool:
    """Return whether a file is a sweep's; what cannot be read is left to the reader of runs."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "methods" in content


def grid_work(given: argparse.Namespace) -> Work:
    """Return the run of a configuration, or those of the grid over it.

    Raises:
        UserError: where any of them cannot be.
    """
    output = Path(settings.load_valid(given.config, given.overrides).train.output).expanduser().absolute()

    def of(run: list[str]) -> Config:
        places = [f"train.output={output / ','.join(run).replace('/', '_')}"] if run else []
        return settings.load_valid(given.config, [*given.overrides, *run, *places])

    table = shlex.join(["python", str(REPOSITORY / "launch" / "slurm.py"), "--table", str(output)])
    grid = [[of(run) for run in runs(given.sweep)]]
    return Work(output, grid, table, output / "results.md") if given.sweep else Work(output, grid)


def sweep_work(given: argparse.Namespace) -> Work:
    """Return the runs of a sweep that have no result yet, behind those whose models they get.

    Raises:
        UserError: where the sweep, its results or its files do not fit, or nothing is left to run.
    """
    if given.sweep:
        raise UserError(f"--sweep is {given.sweep[0]!r} and {given.config} a sweep; allowed: one of the two")
    opened = open_sweep(given.config, given.overrides)
    opened.check_directories(opened.runs)
    missing = results.still_to_run(opened.runs, opened.rows, opened.output, opened.settings)
    missing = [each for each in missing if not results.is_finished(each, opened.output)]
    if not missing:
        raise UserError(f"every run of {given.config} has ended; allowed: distprune sweep {given.config} --table")
    wave_of: dict[str, int] = {}
    waves: list[list[Config]] = []
    for each in missing:
        check_files(each, opened.configs[each.name])
        wave = max((wave_of[name] + 1 for name in each.models.values() if name in wave_of), default=0)
        wave_of[each.name] = wave
        if wave == len(waves):
            waves.append([])
        waves[wave].append(opened.configs[each.name])
    command = ["python", "-m", "distprune", "sweep", given.config, *given.overrides, "--table"]
    return Work(
        opened.output.absolute(), waves, shlex.join(command), opened.stored.with_suffix(".md"), opened.sweep.ranks
    )


def runs(sweeps: list[str]) -> Iterable[list[str]]:
    """Yield the overrides of each run of a grid."""
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and all(values.split(","))):
            raise UserError(f"--sweep {sweep!r}; allowed: KEY=V1,V2, e.g. pruning.sparsity=0.8,0.9")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return map(list, itertools.product(*axes))


def script(given: argparse.Namespace, work: Work) -> str:
    """Return the job's script."""
    ranks, folder = given.gpus_per_node or given.ranks_per_node or work.ranks, work.folder
    is_array, job = work.table is not None, shlex.quote(str(folder / "job.sbatch"))
    options = {
        "job-name": work.output.name,
        "output": folder / ("%x-%A-%a.log" if is_array else "%x-%j.log"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"USR1@{given.warn}",
        "nodes": given.nodes,
        "ntasks-per-node": ranks,
        "gres": f"gpu:{given.gpus_per_node}" if given.gpus_per_node else False,
        "cpus-per-task": given.cpus_per_task or False,
        "partition": given.partition or False,
        "account": given.account or False,
        "time": given.time or False,
        "array": f"0-{len(work.configs) - 1}" if is_array else False,
    }
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(str(value))}")
        for name, value in options.items()
        if value is not False
    ]
    lines += [f"#SBATCH {option}" for option in given.sbatch]
    config = shlex.quote(str(folder / "run-")) + "$SLURM_ARRAY_TASK_ID.yaml"
    return SCRIPT.format(
        how=f"sbatch {' or, behind it, '.join(array for array, _ in work.arrays)} {job}"
        if is_array
        else f"sbatch {job}",
        options="\n".join(lines),
        here=shlex.quote(str(Path.cwd())),
        repository=shlex.quote(str(REPOSITORY)),
        folder=shlex.quote(str(folder)),
        train=shlex.quote(str(REPOSITORY / "slurm" / "train.sbatch")),
        config=config if is_array else shlex.quote(str(folder / "run-0.yaml")),
    )


def write(work: Work, text: str) -> None:
    """Write everything that the job needs, and what it was made of."""
    folder = work.folder
    (folder / "job.sbatch").write_text(text)
    for number, config in enumerate(work.configs):
        (folder / f"run-{number}.yaml").write_text(settings.to_yaml(config))
    if work.table is not None:
        texts = {"name": f"{work.output.name}-table", "log": folder / "table-%j.log"}
        texts |= {"repository": REPOSITORY, "here": Path.cwd()}
        table = TABLE.format(**{key: shlex.quote(str(text)) for key, text in texts.items()}, table=work.table)
        (folder / "table.sbatch").write_text(table)
    git = ["git", "-C", str(REPOSITORY)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (folder / "revision.txt").write_text(revision or "no git repository\n")
    (folder / "changes.diff").write_text(subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True).stdout)


def first_sbatch(arguments: list[str], folder: Path) -> str:
    """Submit as `sbatch` does; where it is refused, nothing is left to be in the way of the next try."""
    try:
        return sbatch(arguments)
    except UserError:
        shutil.rmtree(folder)
        raise


def sbatch(arguments: list[str]) -> str:
    """Submit; return the job's number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch here; allowed: a machine that submits jobs, or --dry-run") from error
    if done.returncode != 0:
        raise UserError(f"sbatch refuses {arguments[-1]}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def make_table(output: Path) -> None:
    """Write the table of all runs below a folder, as Markdown and CSV.

    Raises:
        UserError: there is no such folder.
    """
    if not output.is_dir():
        raise UserError(f"{output} is no folder with runs; allowed: train.output of a grid whose jobs have begun")
    rows = []
    for run in sorted(path for path in output.iterdir() if path.is_dir()):
        summary = run / "summary.json"
        content = json.loads(summary.read_text()) if summary.exists() else {}
        rows.append([run.name, *(content.get(column, "not finished") for column in COLUMNS[1:])])
    with (output / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    lines = [" | ".join(map(str, row)) for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    (output / "results.md").write_text("".join(f"| {line} |\n" for line in lines))
    print((output / "results.md").read_text(), end="")


if __name__ == "__main__":
    sys.exit(main())
