"""A run's seed decides everything that is drawn: a comparison over seeds is one of different runs."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from distprune import settings
from distprune.training.setup import prepare
from tests.distributed.engines import write_model
from tests.distributed.runs import DENSE, run, same_weights
from tests.world import Worlds


def test_it_decides_the_order_of_the_data(world: Worlds, task: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        world(1).run(run, task, tmp_path / name, *DENSE, f"train.seed={seed}")
    assert same_weights(tmp_path / "one", tmp_path / "again")
    assert not same_weights(tmp_path / "one", tmp_path / "other"), "no dropout and no new weights are drawn here"


def drawn(task: Path, *overrides: str) -> tuple[list[float], int, Any]:
    """Return a new head's weights, and what a run's score is given. Collective: every rank calls it."""
    config = settings.load_valid(str(task / "run.yaml"), [*overrides])
    setup = prepare(config)
    assert setup.pruner is not None
    score: Any = setup.pruner.score
    found = setup.student.module.classifier.weight.flatten().tolist(), score.seed, getattr(score, "config", None)
    setup.student.destroy()
    return found


@pytest.mark.parametrize("score", ["random", "obs"])
def test_it_decides_the_new_head_and_reaches_the_score(world: Worlds, task: Path, tmp_path: Path, score: str) -> None:
    AutoModel.from_pretrained(write_model(tmp_path / "headless")).save_pretrained(tmp_path / "headless")
    options = (f"model.path={tmp_path}/headless", f"pruning.score={score}", "fisher.block=7", "fisher.samples=3")
    options = (*options, "deepspeed.student.zero_optimization.stage=0")
    one, again, other = (
        world(1).run(drawn, task, *options, "fisher.damping=1e-3", f"train.seed={seed}")[0] for seed in (1, 1, 2)
    )
    assert one[0] == again[0] != other[0]
    assert (one[1], other[1]) == (1, 2)
    if score == "obs":
        assert (one[2].block, one[2].samples, one[2].damping) == (7, 3, 1e-3)
