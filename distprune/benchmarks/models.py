"""Models of random weights, and batches of random tokens for them."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

SHAPES = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}

POSITIONS = BertConfig().max_position_embeddings
"""Tokens that these models can read."""


def write_random_model(folder: Path, model: str) -> None:
    """Write a classifier of two classes with random weights.

    Args:
        folder: where it goes.
        model: a name of `SHAPES`.
    """
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SHAPES[model])).save_pretrained(folder)


def random_batch(examples: int, length: int, seed: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a model's inputs: tokens and a mask without padding, int64 of shape [examples, length]."""
    ids = torch.randint(0, 1000, (examples, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
