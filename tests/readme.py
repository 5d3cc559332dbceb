"""The README's commands, and what its user has when they are given."""

import json
import re
import shlex
from pathlib import Path

from distprune.synthetic import examples
from tests.distributed.engines import write_model
from tests.distributed.processes import REPOSITORY

README = (REPOSITORY / "README.md").read_text()

SLURM = ("srun ", "sbatch ")
"""What tests/cluster runs."""


def commands() -> list[str]:
    """Return the lines of the README's shell blocks, without their comments."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


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
