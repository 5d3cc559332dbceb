"""A text task with a real grammar, and a small untrained model for it: what the quickstart runs on, made on the spot.

Sentences come from a context-free grammar with recursion: opinions, negated or not, in main clauses, concessive clauses
and relative clauses. The label is what the main clause says of its subject. The other clauses say things too, as often
the opposite, and negation turns words around, so no bag of words gives the label away.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

_NOUNS = [
    "actor",
    "book",
    "concert",
    "dinner",
    "film",
    "hotel",
    "museum",
    "painter",
    "play",
    "song",
    "story",
    "teacher",
]
_GOOD = ["brilliant", "charming", "clever", "delightful", "excellent", "lovely", "superb", "warm"]
_BAD = ["awful", "boring", "clumsy", "dreadful", "dull", "horrible", "poor", "tedious"]
_PEOPLE = ["critics", "everyone", "friends", "some", "visitors"]
_LIKE = ["admired", "enjoyed", "liked", "loved", "praised"]
_DISLIKE = ["disliked", "hated", "mocked", "regretted", "scorned"]
_ADVERBS = ["clearly", "perhaps", "quite", "rather", "really", "truly"]
_CONCESSIVE = ["although", "though", "while"]
_NEGATION = ["never", "not"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class _Grammar:
    """Derives sentences; every method returns the words of one symbol."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def sentence(self, positive: bool) -> list[str]:
        """S -> C . | CONC C , C . | C CONC C . ; the main clause says what ``positive`` asks for."""
        main, shape = self.clause(positive, depth=0), self.rng.random()
        if shape < 0.3:
            return [*main, "."]
        aside = [self.rng.choice(_CONCESSIVE), *self.clause(self.coin(), depth=1)]
        return [*aside, ",", *main, "."] if shape < 0.65 else [*main, *aside, "."]

    def clause(self, positive: bool, depth: int) -> list[str]:
        """C -> NP was OPINION | PEOPLE VIEW NP."""
        if self.coin():
            return [*self.noun_phrase(depth), "was", *self.opinion(positive)]
        return [*self.view(positive), *self.noun_phrase(depth)]

    def noun_phrase(self, depth: int) -> list[str]:
        """NP -> the N | the N that was OPINION | the N that VIEW | the N with NP."""
        words, shape = ["the", self.rng.choice(_NOUNS)], self.rng.random()
        if depth > 1 or shape < 0.6:
            return words
        if shape < 0.75:
            return [*words, "that", "was", *self.opinion(self.coin())]
        if shape < 0.9:
            return [*words, "that", *self.view(self.coin())]
        return [*words, "with", *self.noun_phrase(depth + 1)]

    def opinion(self, positive: bool) -> list[str]:
        """OPINION -> (ADV) ADJ | NEG (ADV) ADJ."""
        negated = self.rng.random() < 0.3
        adjective = self.rng.choice(_GOOD if positive != negated else _BAD)
        return [*self.negation(negated), *self.adverb(), adjective]

    def view(self, positive: bool) -> list[str]:
        """VIEW -> PEOPLE (ADV) V | PEOPLE NEG V."""
        negated = self.rng.random() < 0.3
        verb = self.rng.choice(_LIKE if positive != negated else _DISLIKE)
        between = self.negation(True) if negated else self.adverb()
        return [self.rng.choice(_PEOPLE), *between, verb]

    def negation(self, present: bool) -> list[str]:
        """NEG."""
        return [self.rng.choice(_NEGATION)] if present else []

    def adverb(self) -> list[str]:
        """(ADV)."""
        return [self.rng.choice(_ADVERBS)] if self.rng.random() < 0.3 else []

    def coin(self) -> bool:
        """Return either, as often."""
        return self.rng.random() < 0.5


def examples(count: int, seed: int) -> list[dict[str, str | int]]:
    """Return different labelled sentences, as many of either label.

    Args:
        count: number of sentences.
        seed: the same seed gives the same sentences.
    """
    grammar = _Grammar(random.Random(seed))
    rows: dict[str, int] = {}
    while len(rows) < count:
        label = len(rows) % 2
        rows.setdefault(" ".join(grammar.sentence(positive=label == 1)), label)
    return [{"sentence": text, "label": label} for text, label in rows.items()]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the grammar."""
    words = ["the", "that", "was", "with", ",", ".", *_NOUNS, *_GOOD, *_BAD, *_PEOPLE, *_LIKE, *_DISLIKE]
    words += [*_ADVERBS, *_CONCESSIVE, *_NEGATION]
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def write(directory: Path, train: int, validation: int, seed: int) -> None:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``model/``, an untrained BERT of 0.8 M parameters.

    Args:
        directory: made where it is missing.
        train: training sentences.
        validation: evaluation sentences, none of them in the training data.
        seed: of sentences and weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = examples(train + validation, seed)
    for name, part in (("train", rows[:train]), ("validation", rows[train:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(directory / "model")
    words.save_pretrained(directory / "model")


def main(arguments: list[str] | None = None) -> None:
    """Write the task into a directory."""
    parser = argparse.ArgumentParser(prog="python -m distprune.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=12_000, help="training sentences")
    parser.add_argument("--validation", type=int, default=2_000, help="evaluation sentences")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    write(chosen.directory, chosen.train, chosen.validation, chosen.seed)


if __name__ == "__main__":
    main()
