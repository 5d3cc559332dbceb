"""The quickstart's promises, and the task it makes itself."""

import json
from pathlib import Path

import pytest

from distprune import quickstart, synthetic


@pytest.mark.parametrize(
    ("accuracies", "broken"),
    [
        ((0.98, 0.7, 0.97), []),
        ((0.96, 0.7, 0.96), ["the dense model"]),
        ((0.98, 0.84, 0.98), ["one-shot pruning"]),
        ((0.98, 0.7, 0.95), ["gradual pruning"]),
        ((0.9, 0.9, 0.8), ["the dense model", "gradual pruning", "one-shot pruning"]),
    ],
)
def test_each_broken_promise_is_named(accuracies: tuple[float, float, float], broken: list[str]) -> None:
    said = quickstart.failures(*accuracies)
    assert len(said) == len(broken)
    assert all(sentence.startswith(what) for sentence, what in zip(said, broken, strict=True))


@pytest.mark.parametrize(("gradual", "status"), [(0.98, 0), (0.9, 1)])
def test_the_table_and_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gradual: float, status: int
) -> None:
    for run, accuracy in (("dense", 0.985), ("gradual", gradual)):
        (tmp_path / run).mkdir()
        counts = {"prunable_weights": 1000, "masked_weights": 900, "zeros_in_file": 901, "encoder_zeros": 1}
        content = {"final_metric": accuracy, "metric_name": "accuracy", **counts}
        (tmp_path / run / "summary.json").write_text(json.dumps(content))
    (tmp_path / "oneshot").mkdir()
    (tmp_path / "oneshot" / "pruning.json").write_text(json.dumps({"masked_weights": 900, "prunable_weights": 1000}))
    (tmp_path / "oneshot.json").write_text(json.dumps({"accuracy": 0.5, "encoder_zeros": 902}))
    assert quickstart.main(tmp_path) == status
    printed = capsys.readouterr()
    assert all(text in printed.out for text in ("0.9850", "0.5000", f"{gradual:.4f}", "90.00%", "901", "plot.png"))
    assert ("error" in printed.err) == bool(status)


def test_the_task_is_balanced_repeatable_and_without_leaks() -> None:
    rows = synthetic.examples(2000, seed=1)
    assert rows == synthetic.examples(2000, seed=1)
    assert rows != synthetic.examples(2000, seed=2)
    assert sum(int(row["label"]) for row in rows) == 1000
    assert len({row["sentence"] for row in rows}) == 2000


def test_no_bag_of_words_solves_the_task() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = synthetic.examples(6000, seed=0)
    counts = CountVectorizer(token_pattern=r"\S+").fit_transform(str(row["sentence"]) for row in rows)
    labels = [row["label"] for row in rows]
    model = LogisticRegression(max_iter=1000).fit(counts[:5000], labels[:5000])
    assert 0.6 < model.score(counts[5000:], labels[5000:]) < 0.9


def test_every_word_has_a_token() -> None:
    words = synthetic.tokenizer()
    for row in synthetic.examples(500, seed=3):
        assert words.unk_token_id not in words(str(row["sentence"]))["input_ids"]
