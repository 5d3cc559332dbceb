"""The README's own words: its configuration is valid, and each of its commands runs."""

import contextlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from distprune import settings
from tests.distributed.processes import REPOSITORY, environment
from tests.distributed.runs import run_command
from tests.readme import README, SLURM, commands, make_workplace
from tests.world import Worlds

CI = (REPOSITORY / ".ci" / "run").read_text()


def test_the_two_commands_are_run_by_ci() -> None:
    first, second, *_ = commands()
    assert (first, second) == ("launch/quickstart.sh", "launch/test.sh")
    assert re.search(rf"^step {first}$", CI, re.MULTILINE)
    assert re.search(rf"^step {second}$", CI, re.MULTILINE), "the whole of the tests, not a part"


def run_in(folder: Path, *words: str) -> tuple[int, str]:
    """Run a command of distprune in a folder. Collective."""
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return run_command(*words)


def test_the_other_recipe_fits_into_the_file(tmp_path: Path) -> None:
    mine, other = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(mine)
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n" + other)
    config = settings.load_valid(str(tmp_path / "other.yaml"), ["teacher.path=null"])
    assert (config.train.epochs, config.pruning.initial, config.pruning.end) == (3, 0.9, "0 steps")


@pytest.mark.slow
def test_every_other_command_runs_as_it_stands(world: Worlds, tmp_path: Path) -> None:
    make_workplace(tmp_path)
    _, _, *others = (command for command in commands() if not command.startswith(SLURM))
    assert len(others) >= 5
    variables = environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    for command in others:
        program, *words = shlex.split(command)
        if program == "distprune":
            ((status, said),) = world(1).run(run_in, tmp_path, *words)
        else:
            done = subprocess.run(command, shell=True, cwd=tmp_path, env=variables, capture_output=True, text=True)
            status, said = done.returncode, done.stdout + done.stderr
        assert status == 0, f"{command}\n{said}"
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert summary["sparsity_masked"] == pytest.approx(0.9, abs=1e-3)
    assert (tmp_path / "runs" / "oneshot" / "model.safetensors").exists()
