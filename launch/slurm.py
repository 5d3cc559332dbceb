#!/usr/bin/env python
"""Write a SLURM job for a configuration, or an array of jobs over a grid of its keys, and submit it.

    python launch/slurm.py CONFIG [key=value ...] --nodes 2 --gpus-per-node 8 --time 8:00:00 --partition gpu
    python launch/slurm.py CONFIG --sweep pruning.sparsity=0.8,0.9 --sweep train.seed=1,2,3 --dry-run

Into a folder beside ``train.output`` (its name and ``.job``) go the script, the configuration as it is now, and the
code's revision. The runs of a grid get folders below ``train.output``; when all have ended, ``results.md`` there has
their table.
"""

import argparse
import csv
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from distprune import settings
from distprune.config import Config
from distprune.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
COLUMNS = ("run", "sparsity_masked", "metric_name", "final_metric", "dense_metric", "steps", "wall_time_s")

SCRIPT = """#!/usr/bin/env bash
# Written by launch/slurm.py; submit it with: sbatch {script}
{options}
set -euo pipefail
cd {here}
export SLURM_SUBMIT_DIR={repository} DISTPRUNE_LOGS={folder}
{run}
"""
TABLE = """#!/usr/bin/env bash
#SBATCH --job-name={name}-table
#SBATCH --output={folder}/table-%j.log
set -euo pipefail
cd {repository}
source launch/common.sh
activate
python launch/slurm.py --table {output}
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of a run")
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
    found.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other, e.g. --qos=long")
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
            submit(given)
    except UserError as error:
        print(f"slurm.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def submit(given: argparse.Namespace) -> None:
    """Check every run of the grid, write the job, and submit it."""
    grid = list(runs(given.sweep))
    config = settings.load_valid(given.config, given.overrides)
    output = Path(config.train.output).expanduser().absolute()
    folder = output.with_name(output.name + ".job")
    for run in grid:
        settings.load_valid(given.config, [*given.overrides, *run])
    text = script(given, folder, output, grid)
    if given.dry_run:
        print(text, end="")
        return
    if folder.exists():
        raise UserError(f"{folder} exists: the job was written before; allowed: sbatch {folder / 'job.sbatch'}")
    folder.mkdir(parents=True)
    write(folder, output, config, text, grid)
    job = sbatch([str(folder / "job.sbatch")])
    print(f"job {job}: {len(grid)} run{'s' * (len(grid) > 1)}, {folder}")
    if given.sweep:
        wanted = [f"--partition={given.partition}"] if given.partition else []
        wanted += [f"--account={given.account}"] if given.account else []
        table = sbatch([f"--dependency=afterany:{job}", *wanted, *given.sbatch, str(folder / "table.sbatch")])
        print(f"job {table}: their table, {output / 'results.md'}")


def runs(sweeps: list[str]) -> Iterable[list[str]]:
    """Yield the overrides of each run of a grid."""
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and all(values.split(","))):
            raise UserError(f"--sweep {sweep!r}; allowed: KEY=V1,V2, e.g. pruning.sparsity=0.8,0.9")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return map(list, itertools.product(*axes))


def script(given: argparse.Namespace, folder: Path, output: Path, grid: list[list[str]]) -> str:
    """Return the job's script."""
    ranks = given.gpus_per_node or given.ranks_per_node or 1
    options = {
        "job-name": output.name,
        "output": folder / ("%x-%A-%a.log" if given.sweep else "%x-%j.log"),
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
        "array": f"0-{len(grid) - 1}" if given.sweep else False,
    }
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={value}")
        for name, value in options.items()
        if value is not False
    ]
    lines += [f"#SBATCH {option}" for option in given.sbatch]
    train = shlex.join([str(REPOSITORY / "slurm" / "train.sbatch"), str(folder / "config.yaml")])
    run = f"exec bash {train}"
    if given.sweep:
        names = shlex.quote(str(folder / "runs.txt"))
        run = (
            f'mapfile -t overrides < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {names} | tr " " "\\n")\n'
            f'exec bash {train} "${{overrides[@]}}"'
        )
    return SCRIPT.format(
        script=folder / "job.sbatch",
        options="\n".join(lines),
        here=shlex.quote(str(Path.cwd())),
        repository=shlex.quote(str(REPOSITORY)),
        folder=shlex.quote(str(folder)),
        run=run,
    )


def write(folder: Path, output: Path, config: Config, text: str, grid: list[list[str]]) -> None:
    """Write everything that the job needs, and what it was made of."""
    (folder / "job.sbatch").write_text(text)
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    lines = [" ".join([*run, f"train.output={output / ','.join(run)}"]) for run in grid if run]
    (folder / "runs.txt").write_text("".join(line + "\n" for line in lines))
    table = TABLE.format(name=output.name, folder=folder, repository=REPOSITORY, output=shlex.quote(str(output)))
    (folder / "table.sbatch").write_text(table)
    git = ["git", "-C", str(REPOSITORY)]
    revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    (folder / "revision.txt").write_text(revision or "no git repository\n")
    (folder / "changes.diff").write_text(subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True).stdout)


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
    """Write the table of all runs below a folder, as Markdown and CSV."""
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
