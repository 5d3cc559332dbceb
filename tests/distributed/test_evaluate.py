"""An evaluation is of the model without dropout, and of each of the task's data by itself."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset

from distprune.engines.evaluate import evaluate
from distprune.errors import UserError
from tests.world import Worlds


class Task:
    """Predicts what a model makes of the rows; its metrics are their sum, their number, and that of the data's rows."""

    def evaluations(self) -> dict[str, Dataset]:
        main, other = ([float(number) for number in range(start, start + size)] for start, size in ((1, 5), (10, 3)))
        return {
            prefix: Dataset.from_dict({"length": [1] * len(values), "value": values})
            for prefix, values in (("", main), ("other/", other))
        }

    def collate(self, rows: dict[str, Any] | list[Any]) -> dict[str, torch.Tensor]:
        values = rows["value"] if isinstance(rows, dict) else [row["value"] for row in rows]
        return {"value": torch.tensor(values)}

    def forward(self, engine: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted: torch.Tensor = engine.module(batch["value"])
        return predicted

    def predictions(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits

    def metrics(self, predictions: torch.Tensor, data: Dataset) -> dict[str, float]:
        return {"sum": float(predictions.sum()), "predictions": len(predictions), "rows": len(data)}


def refused(metrics: Any) -> str:
    """Return what is said of a task's metrics. Collective."""
    module = torch.nn.Identity()
    engine = SimpleNamespace(module=module, train=module.train, eval=module.eval, device=torch.device("cpu"))
    with patch.object(Task, "metrics", lambda *_: metrics):
        try:
            return str(evaluate(engine, cast("Any", Task()), 2))
        except UserError as error:
            return str(error)


@pytest.mark.parametrize("metrics", [{}, 0.5, {"loss": 1.0}, {"f1": 0.5, "step": 1.0}, {"f1": None}])
def test_what_is_no_metric_is_one_sentence_on_all_ranks(world: Worlds, metrics: Any) -> None:
    said = f"the task's metrics are {metrics!r}; allowed: numbers by their names, which are none of epoch, loss, lr"
    assert all(each.startswith(said) for each in world(2).run(refused, metrics))


def test_metrics_are_plain_numbers(world: Worlds) -> None:
    values = {"f1": torch.tensor(0.5), "accuracy": 1}
    assert (
        world(2).run(refused, values) == [str({"f1": 0.5, "accuracy": 1.0, "other/f1": 0.5, "other/accuracy": 1.0})] * 2
    )


def measured(training: bool) -> tuple[dict[str, float], bool]:
    """Return the metrics of a model of dropout, and whether it trains behind them. Collective."""
    module = torch.nn.Dropout(0.5).train(training)
    engine = SimpleNamespace(module=module, train=module.train, eval=module.eval, device=torch.device("cpu"))
    return evaluate(engine, cast("Any", Task()), 2), module.training


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_for_all_data_and_the_engine_stays_in_its_mode(world: Worlds, training: bool) -> None:
    main = {"sum": 15.0, "predictions": 5, "rows": 5}
    every = main | {"other/sum": 33.0, "other/predictions": 3, "other/rows": 3}
    for found, mode in world(2).run(measured, training):
        assert found == every
        assert next(iter(found)) == "sum", "the main metric"
        assert mode is training
