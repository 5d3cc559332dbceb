#!/usr/bin/env python
"""Write a SLURM job for a configuration, or an array of jobs over a grid or a sweep's file, and submit it.

    python launch/slurm.py CONFIG [key=value ...] --nodes 2 --gpus-per-node 8 --cpus-per-task 8 --time 8:00:00
    python launch/slurm.py CONFIG --sweep pruning.sparsity=0.8,0.9 --sweep train.seed=1,2,3 --dry-run
    python launch/slurm.py SWEEP [key=value ...] --gpus-per-node 1 --cpus-per-task 8

Into a folder beside ``train.output``, or the sweep's ``output`` (its name and ``.job``), go the script, the
configurations as they are now, and the code's revision. Of a sweep (docs/sweeps.md) the runs without a result are
carried out, those that others get models of first, and ``distprune sweep --table`` in the end. A grid becomes a sweep's
file in that folder, with one method, called as the configuration is, and ``train.output`` as the sweep's output.
"""

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from distprune import settings, yaml12
from distprune.config import Config
from distprune.errors import UserError
from distprune.sweeps import results
from distprune.sweeps.opened import Opened, expand, open_sweep
from distprune.sweeps.spec import Method, Sweep

REPOSITORY = Path(__file__).resolve().parents[1]
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
    grid: Sweep | None = None
    """What ``--sweep`` has made."""

    @property
    def folder(self) -> Path:
        """Where the job is written."""
        return job_folder(self.output)

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
    found.add_argument("config", metavar="CONFIG", help="YAML file of a run, or of a sweep")
    found.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="e.g. pruning.sparsity=0.9")
    found.add_argument("--sweep", action="append", default=[], metavar="KEY=V1,V2", help="a run for each value")
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
    return found


def main() -> int:
    """Do what the command line says; return the exit status."""
    given = parser().parse_intermixed_args()
    try:
        submit(given, work_of(given))
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
        content = yaml12.parse(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "methods" in content


def job_folder(output: Path) -> Path:
    """Return where the job for an output is written."""
    return output.with_name(output.name + ".job")


def work_of(given: argparse.Namespace) -> Work:
    """Return what the command line asks for: a run, a grid or a sweep.

    Raises:
        UserError: where any of its runs cannot be.
    """
    if is_sweep(given.config):
        if given.sweep:
            raise UserError(f"--sweep is {given.sweep[0]!r} and {given.config} a sweep; allowed: one of the two")
        return sweep_work(open_sweep(given.config, given.overrides), given.overrides)
    if given.sweep:
        return grid_work(given)
    config = settings.load_valid(given.config, given.overrides)
    return Work(Path(config.train.output).expanduser().absolute(), [[config]])


def grid_work(given: argparse.Namespace) -> Work:
    """Return the runs of a grid that have no result yet.

    Raises:
        UserError: as `sweep_work`.
    """
    config = Path(given.config).absolute()
    output = Path(settings.load(given.config, given.overrides).train.output).expanduser().absolute()
    name = re.sub(r"^\W", "_", re.sub(r"[^\w.-]", "_", config.stem))
    grid = Sweep(str(config), {name: Method(grid=grid_of(given.sweep))}, output=str(output))
    overrides = [text for text in given.overrides if not text.startswith("train.output=")]  # the sweep's output
    work = sweep_work(expand(grid, job_folder(output) / f"{output.name}.yaml", overrides), overrides)
    return replace(work, grid=grid)


def sweep_work(sweep: Opened, overrides: list[str]) -> Work:
    """Return the runs of a sweep that have no result yet, behind those whose models they get.

    Args:
        sweep: with its results so far.
        overrides: with which it was opened.

    Raises:
        UserError: where its run directories or its files do not fit, or nothing is left to run.
    """
    missing = [each for each in sweep.missing(sweep.settings) if not results.is_finished(each, sweep.output)]
    sweep.check_can_begin(missing)
    command = ["python", "-m", "distprune", "sweep", str(sweep.path), *overrides, "--table"]
    if not missing:
        raise UserError(f"every run of {sweep.path} has ended; allowed: {shlex.join(command[2:])}")
    wave_of: dict[str, int] = {}
    waves: list[list[Config]] = []
    for each in missing:
        wave = max((wave_of[name] + 1 for name in each.models.values() if name in wave_of), default=0)
        wave_of[each.name] = wave
        if wave == len(waves):
            waves.append([])
        waves[wave].append(sweep.configs[each.name])
    table = sweep.stored.with_suffix(".md")
    return Work(sweep.output.absolute(), waves, shlex.join(command), table, sweep.sweep.ranks)


def grid_of(axes: list[str]) -> dict[str, list[Any]]:
    """Return the keys of a grid, and their values."""
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        key, _, values = axis.partition("=")
        try:
            found = yaml12.parse(f"[{values}]")
        except yaml.YAMLError:
            found = []
        if not (key and isinstance(found, list) and found):
            raise UserError(f"--sweep {axis!r}; allowed: KEY=V1,V2, e.g. pruning.sparsity=0.8,0.9")
        if key in grid:
            raise UserError(f"--sweep {key} is given twice; allowed: once, with all of its values")
        grid[key] = found
    return grid


def log_folder(folder: Path) -> str:
    """Return a folder as sbatch is to read it, for which %j is the job."""
    return str(folder).replace("%", "%%")


def script(given: argparse.Namespace, work: Work) -> str:
    """Return the job's script."""
    ranks, folder = given.gpus_per_node or given.ranks_per_node or work.ranks, work.folder
    is_array, job = work.table is not None, shlex.quote(str(folder / "job.sbatch"))
    options = {
        "job-name": work.output.name,
        "output": f"{log_folder(folder)}/{'%x-%A-%a' if is_array else '%x-%j'}.log",
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
        texts = {"name": f"{work.output.name}-table", "log": f"{log_folder(folder)}/table-%j.log"}
        texts |= {"repository": REPOSITORY, "here": Path.cwd()}
        table = TABLE.format(**{key: shlex.quote(str(text)) for key, text in texts.items()}, table=work.table)
        (folder / "table.sbatch").write_text(table)
    if work.grid is not None:
        (folder / f"{work.output.name}.yaml").write_text(yaml.safe_dump(asdict(work.grid), sort_keys=False))
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


if __name__ == "__main__":
    sys.exit(main())
