"""`distprune analyze` says the same on any number of ranks."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from matplotlib.image import imread

from distprune.commands import analyze
from distprune.errors import UserError
from tests.distributed.runs import TAUGHT, run_command
from tests.world import Worlds


def analyse(task: Path, folder: Path, *overrides: str, rows: int = 50) -> str:
    """Collective; the ranks stay together."""
    try:
        with patch("distprune.dist.shutdown"):
            analyze.run(
                "teacher",
                str(task / "run.yaml"),
                [*TAUGHT, *overrides],
                png=str(folder / "t.png"),
                json_path=str(folder / "t.json"),
                rows=rows,
                temperatures=[],
            )
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_teacher_is_analysed_alike_on_any_number_of_ranks(world: Worlds, task: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        assert world(size).run(analyse, task, folder) == [""] * size
        found.append(json.loads((folder / "t.json").read_text()))
        assert imread(folder / "t.png").shape == (700, 1200, 4)
    first, second = found
    assert first["recommended"] == second["recommended"]
    assert len(first["results"]) == 11
    for one, other in zip(first["results"], second["results"], strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_where_results_go_is_looked_at_before_anything_is_measured(world: Worlds, task: Path, tmp_path: Path) -> None:
    for places, part in (
        (["--png", f"{tmp_path}/no/t.png"], "no/t.png' cannot be written"),
        (["--json", f"{tmp_path}/no/t.json"], "no/t.json' cannot be written"),
        (["--png", f"{tmp_path}/curves"], "curves' has no suffix"),
    ):
        arguments = ("analyze", "teacher", task / "run.yaml", "--rows", "0", "--png", f"{tmp_path}/t.png")
        ((status, said),) = world(1).run(run_command, *arguments, *places)
        assert (status, part in said) == (2, True), said


@pytest.mark.parametrize(
    ("overrides", "rows", "part"),
    [
        (["teacher.path=null", "distillation.hardness=0"], 50, "teacher.path is not set"),
        ([], 0, "--rows is 0"),
        (["task.regression=true", "task.metrics=[]", "teacher.path={regression}"], 50, "the task is a regression"),
    ],
)
def test_what_cannot_be_analysed_is_refused(
    world: Worlds, task: Path, tmp_path: Path, overrides: list[str], rows: int, part: str
) -> None:
    from tests.distributed.engines import write_model

    model = write_model(tmp_path / "regression", num_labels=1)
    (said,) = world(1).run(analyse, task, tmp_path, *(each.format(regression=model) for each in overrides), rows=rows)
    assert part in said
