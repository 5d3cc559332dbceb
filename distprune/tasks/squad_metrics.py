"""From the logits of starts and ends to answers, and what the evaluation of SQuAD makes of them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

N_BEST = 20

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Spans(NamedTuple):
    """The best span of tokens of each window: its first and its last token and its score, each of shape [N]."""

    first: Integers
    last: Integers
    score: Floats


class Picks(NamedTuple):
    """One window for each question.

    Attributes:
        questions: the questions that there are, ascending, shape [Q].
        windows: that holds each one's best span, shape [Q].
        null: each one's lowest score of no answer, shape [Q].
    """

    questions: Integers
    windows: Integers
    null: Floats


def best_spans(logits: Floats, context: Integers, longest: int) -> Spans:
    """Return the best span of each window, among those between its likeliest starts and its likeliest ends.

    Args:
        logits: of starts and of ends, shape [N, 2, T].
        context: the first token of each window's context and the one after its last, shape [N, 2].
        longest: tokens of the longest span.

    Returns:
        The spans; the score is the sum of two logits, and ``-inf`` where no span is within the context.
    """
    starts, ends = (np.argsort(-logits[:, side], axis=1, kind="stable")[:, :N_BEST] for side in (0, 1))
    of_start, of_end = (np.take_along_axis(logits[:, side], at, 1) for side, at in enumerate((starts, ends)))
    first, last = starts[:, :, None], ends[:, None, :]
    inside = (first >= context[:, 0, None, None]) & (last < context[:, 1, None, None])
    fits = inside & (first <= last) & (last - first < longest)
    scores = np.where(fits, of_start[:, :, None] + of_end[:, None, :], -np.inf).reshape(len(logits), -1)
    window, best = np.arange(len(logits)), scores.argmax(axis=1)
    start, end = np.divmod(best, ends.shape[1])
    return Spans(starts[window, start], ends[window, end], scores[window, best])


def pick_windows(questions: Integers, scores: Floats, null: Floats) -> Picks:
    """Return the window with the best span of each question; the first of several that are equally good.

    Args:
        questions: which question each window belongs to, shape [N].
        scores: of each window's best span, shape [N].
        null: the score of no answer in each window, shape [N].
    """
    order = np.lexsort((-scores, questions))
    found, at = np.unique(questions[order], return_index=True)
    return Picks(found, order[at], np.minimum.reduceat(null[order], at))


def normalize(text: str) -> str:
    """Return a text in lower case, without ASCII punctuation, English articles, and all but single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact_match(predicted: str, expected: str) -> float:
    return float(predicted == expected)


def _f1(predicted: str, expected: str) -> float:
    ours, theirs = predicted.split(), expected.split()
    if not (ours and theirs):
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


_MEASURES: dict[str, Callable[[str, str], float]] = {"f1": _f1, "exact_match": _exact_match}
ANSWER_METRICS = list(_MEASURES)


def measure_answers(
    names: Sequence[str], predicted: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Measure answers as the official script of SQuAD 2 does.

    That of SQuAD 1.1 differs only where an answer is nothing but punctuation and articles: three of the 10,570
    questions of its validation data have such a one, among others.

    Args:
        names: some of `ANSWER_METRICS`.
        predicted: one text for each question; empty: no answer.
        answers: of each question; the best of them counts. None: there is no answer.

    Returns:
        Each metric's mean over the questions, as a fraction, in the order of ``names``.
    """
    pairs = [(normalize(text), _expected(texts)) for text, texts in zip(predicted, answers, strict=True)]

    def mean(measure: Callable[[str, str], float]) -> float:
        values: Any = [max(measure(text, each) for each in expected) for text, expected in pairs]
        return float(np.mean(values))

    return {name: mean(_MEASURES[name]) for name in names}


def _expected(texts: Sequence[str]) -> list[str]:
    return [text for text in map(normalize, texts) if text] or [""]
