"""Small data files, and a tokenizer of a few words."""

import gzip
import json
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "null", "NA"]
PAD, UNK, CLS, SEP = range(4)

DEFAULTS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "model_max_length": 512,
    "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
}


def make_tokenizer(words: list[str] = WORDS, cls_last: bool = False, **options) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; with ``cls_last`` as XLNet's, which is padded on the left."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="$A [SEP] [CLS]" if cls_last else "[CLS] $A [SEP]",
        pair="$A [SEP] $B:1 [SEP]:1 [CLS]:1" if cls_last else "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    options = DEFAULTS | ({"cls_token": "[CLS]"} if cls_last else {}) | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def ids(text: str) -> list[int]:
    return [CLS, *(WORDS.index(word) if word in WORDS else UNK for word in text.split()), SEP]


def write(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows)
    match "".join(path.suffixes):
        case ".parquet":
            table.to_parquet(path)
        case ".csv" | ".csv.gz":
            table.to_csv(path, index=False)
        case ".tsv":
            lines = [
                "\t".join(table.columns),
                *("\t".join(map(str, row)) for row in table.itertuples(index=False)),
            ]
            path.write_text("\n".join(lines) + "\n")
        case ".jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRAIN = [{"sentence": " ".join("abcdefghij"[: 1 + i % 5]), "label": i % 2} for i in range(20)]
VALIDATION = [{"sentence": "a b", "label": 0}, {"sentence": "c zzz", "label": 1}]


def labelled(*labels, sentence="a b") -> list[dict]:
    return [{"sentence": sentence, "label": label} for label in labels]


def make_masked_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Return `make_tokenizer`'s with a mask token, which knows its separators."""
    special = {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return make_tokenizer([*WORDS, "[MASK]"], **(special | options))
