"""The README's commands for a cluster, as they stand but for what this cluster wants of every job."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.cluster.conftest import SBATCH_OPTIONS
from tests.distributed.processes import environment
from tests.readme import SLURM, commands, make_workplace


def test_the_commands_for_a_cluster_run(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    srun, sbatch = (command for command in commands() if command.startswith(SLURM))
    for command, wait in ((srun, []), (sbatch, ["--wait"])):
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [program, *SBATCH_OPTIONS, *wait, *arguments],
            cwd=tmp_path,
            env=environment(HF_HUB_OFFLINE="1", VENV=sys.prefix),
            capture_output=True,
            text=True,
        )
        logs = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{logs}"
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert (summary["world_size"], summary["launcher"]) == (4, "srun")
