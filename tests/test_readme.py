"""The README's own words: its configuration is valid, and each of its commands runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distprune.synthetic import examples
from tests.distributed.engines import write_model

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
CI = (REPOSITORY / ".ci" / "run").read_text()


SLURM = ("srun ", "sbatch ")
"""What tests/cluster runs."""


def commands() -> list[str]:
    """Return the lines of the README's shell blocks, without their comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def test_the_two_commands_are_run_by_ci() -> None:
    first, second, *_ = commands()
    assert (first, second) == ("launch/quickstart.sh", "launch/test.sh")
    assert re.search(rf"^step {first}$", CI, re.MULTILINE)
    assert re.search(rf"^step {second}$", CI, re.MULTILINE), "the whole of the tests, not a part"


def make_workplace(folder: Path) -> None:
    """Make what the README's user has: a configuration, a model and data, and the repository's scripts."""
    for name in ("launch", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1))
    write_model(folder / "my" / "dense" / "model")
    (folder / "data").mkdir()
    rows = [{"premise": r["sentence"], "hypothesis": r["sentence"], "label": r["label"]} for r in examples(96, seed=1)]
    for name, part in (("train", rows[:64]), ("dev", rows[64:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@pytest.mark.slow
def test_every_other_command_runs_as_it_stands(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    _, _, *others = (command for command in commands() if not command.startswith(SLURM))
    assert len(others) >= 5
    environment = os.environ | {
        "VENV": sys.prefix,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    for command in others:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert summary["sparsity_masked"] == pytest.approx(0.9, abs=1e-3)
    assert (tmp_path / "runs" / "oneshot" / "model.safetensors").exists()
