"""docs/results/answers.py: which sentences one of two models has right alone, and the error of their difference."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs/results/answers.py"
LABELS = [0, 1, 1, 0, 1, 1]
SAID = {  # by two models, of two seeds
    "dense_1": [0, 1, 1, 0, 1, 0],
    "pruned_1": [0, 1, 0, 0, 1, 1],
    "dense_2": [0, 1, 1, 0, 1, 1],
    "pruned_2": [0, 0, 0, 0, 1, 1],
}


class _Said:
    """A tokenizer that gives the numbers that are its texts, and a model that says what is written above of them."""

    def __init__(self, name: str) -> None:
        self.answers = torch.tensor(SAID[name])

    def eval(self) -> "_Said":
        return self

    def __call__(self, texts: list[str] | None = None, of: torch.Tensor | None = None, **_: Any) -> Any:
        if texts is not None:
            return {"of": torch.tensor([int(text) for text in texts])}
        assert of is not None
        return SimpleNamespace(logits=torch.nn.functional.one_hot(self.answers[of], 2))


@pytest.mark.parametrize("at_once", [2, 6])
def test_the_difference_and_its_error_are_over_sentences_of_means_over_seeds(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with gzip.open(tmp_path / "validation.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"sentence": str(i), "label": label}) + "\n" for i, label in enumerate(LABELS))
    main: Callable[..., None] = run_path(str(SCRIPT))["main"]
    for name in ("AutoTokenizer", "AutoModelForSequenceClassification"):
        monkeypatch.setitem(main.__globals__, name, SimpleNamespace(from_pretrained=_Said))
    monkeypatch.setitem(main.__globals__, "BATCH", at_once)
    main(tmp_path, *SAID)
    right = {name: (np.array(said) == LABELS).astype(int) for name, said in SAID.items()}
    points = 50 * sum(right[f"dense_{seed}"] - right[f"pruned_{seed}"] for seed in (1, 2))
    error = 1.96 * np.std(points, ddof=1) / 6**0.5
    assert capsys.readouterr().out.splitlines() == [
        "33.3 % of 6 sentences are right in one of the two alone",
        f"difference 16.67 points, ± {error:.2f} by the choice of the sentences (95 %)",
    ]
