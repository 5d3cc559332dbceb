"""Components are pruned one by one, exactly, under any layout, and the model is then the dense one again."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from distprune import settings
from distprune.analysis.pruned_alone import dense_setup, pruned_alone
from distprune.commands import analyze, oneshot
from distprune.commands import eval as evaluation
from distprune.engines.evaluate import evaluate
from distprune.errors import UserError
from distprune.pruning.components import component_matrices
from distprune.zero.engine import FullParameters
from tests.distributed.engines import Layout, plain_model, reference_masks
from tests.distributed.runs import heard, stage
from tests.world import Worlds

SPARSITIES = [0.3, 0.8]
PRUNED = ("token_embedding", "attention", "head")


def overrides(layout: Layout) -> list[str]:
    return [f"deepspeed.student.bf16.enabled={str(layout.dtype == 'bf16').lower()}", *stage(layout.stage)]


def weights(engine: Any) -> dict[str, Tensor]:
    """Return what the forward pass uses, and on rank 0 the fp32 weights as well. Collective."""
    found, masters = {}, FullParameters(engine)
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().float().clone()
        whole = masters.on_main(name)
        assert whole is None or torch.equal(whole.to(parameter.dtype).float(), found[name]), f"{name} is not in both"
    return found


def prune_each(task: Path, layout: Layout) -> dict[str, tuple[list[dict[str, Tensor]], dict[str, Tensor], bool]]:
    """Return the weights at each sparsity and behind, and whether the metrics are the dense ones. Collective."""
    config = settings.load_valid(str(task / "run.yaml"), overrides(layout))
    setup = dense_setup(config)
    places = component_matrices(setup.student.module)
    dense = evaluate(setup.student, setup.task, 8)
    found = {}
    for component in PRUNED:
        names = [name for name, place in places.items() if place == component]
        pruned = pruned_alone(config, setup, names, SPARSITIES, lambda: weights(setup.student))
        same = evaluate(setup.student, setup.task, 8) == dense
        found[component] = pruned, weights(setup.student), same
    setup.student.destroy()
    return found


LAYOUTS: list[Any] = [(1, Layout(2))]
SLOW = [
    (2, Layout(3)),
    (1, Layout(0, "bf16")),
    (2, Layout(0)),
    (2, Layout(1, "bf16")),
    (2, Layout(2, "bf16")),
    (2, Layout(3, "bf16")),
]
SLOW += [(3, Layout(1, "bf16")), (3, Layout(3))]
LAYOUTS += [pytest.param(*each, marks=pytest.mark.slow) for each in SLOW]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_each_component_is_pruned_alone_and_exactly_and_then_dense_again(
    world: Worlds, task: Path, size: int, layout: Layout
) -> None:
    dense = {name: each.detach() for name, each in plain_model(task / "model").named_parameters()}
    low = dict(plain_model(task / "model", layout.dtype).named_parameters())
    places = component_matrices(plain_model(task / "model"))
    for found in world(size).run(prune_each, task, layout):
        assert tuple(found) == PRUNED
        for component, (pruned, behind, same) in found.items():
            mine = {name: dense[name] for name, place in places.items() if place == component}
            for sparsity, held in zip(SPARSITIES, pruned, strict=True):
                gone = reference_masks({n: w.abs() for n, w in mine.items()}, Fraction(str(sparsity)))
                for name, values in held.items():
                    mask = gone[name].view(values.shape) if name in gone else torch.zeros_like(values, dtype=torch.bool)
                    assert torch.equal(values, low[name].masked_fill(mask, 0.0)), f"{name} with {component} pruned"
            assert all(torch.equal(values, low[name]) for name, values in behind.items())
            assert same


def analyse(task: Path, folder: Path, *given: str, **options: Any) -> str:
    """Collective; the ranks stay together."""
    files = {"png": str(folder / "c.png"), "json_path": str(folder / "c.json")}
    try:
        with patch("distprune.dist.shutdown"):
            analyze.run("components", str(task / "run.yaml"), list(given), **files, **options)
    except UserError as error:
        return str(error)
    return ""


def one_shot_metric(task: Path, folder: Path, include: str) -> float:
    """Collective."""
    with patch("distprune.dist.shutdown"):
        oneshot.run(
            str(task / "model"),
            str(folder / "pruned"),
            None,
            ["pruning.sparsity=0.8", f"pruning.include=['{include}']"],
        )
        _, said = heard(evaluation.run, str(folder / "pruned"), str(task / "run.yaml"), [])
    metric: float = json.loads(said.splitlines()[-1])["accuracy"]
    return metric


@pytest.mark.slow
def test_the_analysis_is_that_of_oneshot_on_any_number_of_ranks(world: Worlds, task: Path, tmp_path: Path) -> None:
    given = ("model.freeze=[embeddings]", "train.batch_size=7", "train.accumulation=7")
    found = []
    for size, layers, student in ((1, False, 2), (2, True, 3), (3, False, 1)):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = {"sparsities": [0.8, 0.5], "layers": layers}
        answers = world(size).run(analyse, task, folder, *given, *stage(student), **options)
        assert answers == [""] * size
        assert imread(folder / "c.png").shape == (1200 if layers else 700, 1650, 4)
        found.append(json.loads((folder / "c.json").read_text()))
    assert [len(each["results"]) for each in found] == [7, 11, 7]
    for each in found:
        assert each["recommended"] == ["attention", "feed_forward"]
        assert each["dense"] == found[0]["dense"]
        for one, other in zip(each["results"][:7], found[0]["results"], strict=True):
            del one["latency_share"]
            assert one == {name: value for name, value in other.items() if name != "latency_share"}
    include = {"attention": r"attention\.(self\.\w+|output\.dense)\.weight$", "token_embedding": "word_embeddings"}
    by_name = {each["component"]: each for each in found[2]["results"]}
    for component, pattern in include.items():
        folder = tmp_path / component
        folder.mkdir()
        (metric,) = world(1).run(one_shot_metric, task, folder, pattern)
        assert by_name[component]["metrics"]["0.8"] == metric
    assert list(by_name["attention"]["metrics"]) == ["0.5", "0.8"]


@pytest.mark.parametrize("sparsities", [[0.0], [0.5, 1.0], [float("nan")]])
def test_sparsities_that_no_component_can_have_are_refused(
    world: Worlds, task: Path, tmp_path: Path, sparsities: list[float]
) -> None:
    (said,) = world(1).run(analyse, task, tmp_path, sparsities=sparsities, layers=False)
    assert said == f"--sparsities is {sparsities}; allowed: more than 0 and less than 1 each"
