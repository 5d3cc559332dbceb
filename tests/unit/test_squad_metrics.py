"""Answers from logits, and the metrics of SQuAD against a plain writing-down of the published ones."""

import re
import string
from collections import Counter

import numpy as np
import pytest

from distprune.tasks.squad_metrics import (
    ANSWER_METRICS,
    N_BEST,
    best_spans,
    measure_answers,
    normalize,
    pick_windows,
)

# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver Broncos!", "denver broncos"),
        ("an apple, a day", "apple day"),
        ("theatre at a.n. other", "theatre at other"),  # without its points a.n. is an article
        ("24\u201310", "24\u201310"),  # a dash that is not ASCII stays
        ("U.S.-led", "usled"),
        ("École\u00a0Normale", "école normale"),
        ("\tA\n", ""),
        ("...", ""),
    ],
)
def test_what_is_left_of_a_text(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("predicted", "answers", "f1", "exact"),
    [
        ("the Broncos.", ["Broncos"], 1, 1),
        ("Denver Broncos", ["Broncos", "the Denver Broncos", "Carolina"], 1, 1),
        ("Denver Broncos won", ["Carolina", "Broncos"], 0.5, 0),
        ("to be or not to be", ["to be to be to"], 2 * 4 / 11, 0),  # a word counts as often as both have it
        ("Carolina", ["Broncos"], 0, 0),
        ("", ["Broncos"], 0, 0),
        ("", [], 1, 1),
        ("Broncos", [], 0, 0),
        ("the", [], 1, 1),
        ("", ["...", "the"], 1, 1),
        ("", [".", "Broncos"], 0, 0),
        ("ÉCOLE", ["école"], 1, 1),
    ],
)
def test_single_answers(predicted, answers, f1, exact):
    found = measure_answers(["exact_match", "f1"], [predicted], [answers])
    assert list(found) == ["exact_match", "f1"]
    assert found == pytest.approx({"exact_match": exact, "f1": f1})


def published(predicted: str, answers: list[str]) -> tuple[float, float]:
    """Return F1 and exact match of a question as the script of SQuAD 2 defines them."""

    def normal(text: str) -> str:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def overlap(gold: str, given: str) -> float:
        gold_words, words = normal(gold).split(), normal(given).split()
        if not gold_words or not words:
            return float(gold_words == words)
        same = sum((Counter(gold_words) & Counter(words)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(words), same / len(gold_words)
        return 2 * precision * recall / (precision + recall)

    golds = [answer for answer in answers if normal(answer)] or [""]
    return max(overlap(gold, predicted) for gold in golds), max(normal(g) == normal(predicted) for g in golds)


def test_the_metrics_are_the_published_ones():
    rng = np.random.default_rng(0)
    words = ["the", "A", "an", "broncos", "Broncos,", "École", "24\u201310", "of", "...", "the-end"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(0, 5)))

    predicted = [text() for _ in range(500)]
    answers = [[text() for _ in range(rng.integers(0, 4))] for _ in predicted]
    expected = np.mean([published(*pair) for pair in zip(predicted, answers, strict=True)], axis=0)
    found = measure_answers(ANSWER_METRICS, predicted, answers)
    assert [found["f1"], found["exact_match"]] == pytest.approx(expected.tolist())
    assert 0.1 < found["exact_match"] < found["f1"] < 0.9


# ------------------------------------------------------------------------------------------ spans


def plain_best(logits: np.ndarray, context: tuple[int, int], longest: int) -> tuple[float, int, int]:
    """Return the best span of a window, score first, by two loops."""
    starts, ends = (sorted(range(len(side)), key=lambda at, side=side: -side[at])[:N_BEST] for side in logits)
    spans = [
        (float(logits[0, start] + logits[1, end]), start, end)
        for start in starts
        for end in ends
        if context[0] <= start <= end < context[1] and end - start + 1 <= longest
    ]
    return max(spans, default=(-np.inf, 0, 0))


@pytest.mark.parametrize(("length", "longest"), [(40, 5), (40, 30), (7, 3), (40, 1)])
def test_spans_are_those_of_a_plain_search(length, longest):
    rng = np.random.default_rng(length + longest)
    logits = rng.normal(size=(50, 2, length)).astype(np.float32)
    begins = rng.integers(0, length, 50)
    context = np.stack([begins, rng.integers(begins, length + 1)], axis=1)
    found = best_spans(logits, context, longest)
    expected = [plain_best(each, tuple(inside), longest) for each, inside in zip(logits, context, strict=True)]
    assert found.score.tolist() == [score for score, *_ in expected]
    has_span = np.isfinite(found.score)
    assert has_span.sum() > 5
    spans = np.stack([found.first, found.last], axis=1)
    assert np.array_equal(spans[has_span], np.array([span for _, *span in expected])[has_span])


def test_the_best_window_of_each_question_and_the_lowest_score_of_none():
    picks = pick_windows(
        np.array([4, 2, 4, 4, 7]),
        np.array([1.0, -np.inf, 3.0, 3.0, 0.5], dtype=np.float32),
        np.array([0.0, 9.0, -2.0, 5.0, 6.0], dtype=np.float32),
    )
    assert picks.questions.tolist() == [2, 4, 7]
    assert picks.windows.tolist() == [1, 2, 4]
    assert picks.null.tolist() == [9, -2, 6]
