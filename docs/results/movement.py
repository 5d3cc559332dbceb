"""Movement pruning (arXiv 2005.07683) as a plain loop, with none of distprune's code: does it start on MiniLM?

python docs/results/movement.py MODEL_DIRECTORY SST2_DIRECTORY
"""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SEED, SENTENCES, BATCH, EPOCHS, TARGET = 41, 3000, 32, 10, 0.5
RATES = (1e-4, 1e-2)
"""Of the weights, and of the scores."""


class LowestScores(torch.autograd.Function):
    """A mask that is 0 at the lowest scores; its gradient is the scores' (straight-through)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparsity: float) -> Tensor:
        """Return the mask, of the scores' shape."""
        mask = torch.ones(scores.numel())
        mask[scores.flatten().argsort()[: int(sparsity * scores.numel())]] = 0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the mask's gradient as the scores'."""
        return gradient, None


class Masked(nn.Module):
    """A linear layer whose lowest scores are masked in each forward pass."""

    sparsity = 0.0

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.scores = layer, nn.Parameter(torch.zeros_like(layer.weight))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the masked layer gives."""
        mask = LowestScores.apply(self.scores, Masked.sparsity)
        return nn.functional.linear(inputs, self.layer.weight * mask, self.layer.bias)


def sparsity_at(step: int, steps: int) -> float:
    """Return the cubic from 0 after a tenth of the steps to the target a tenth before their end."""
    first, last = steps // 10, steps - 2 * (steps // 10)
    return TARGET * (1 - (1 - min(max((step - first) / (last - first), 0), 1)) ** 3)


def rate_at(step: int, steps: int) -> float:
    """Return the part of the learning rates: a warm-up of a tenth of the steps, then linear to 0."""
    warmup = steps // 10
    return (step + 1) / warmup if step < warmup else 1 - step / steps


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch."""
    encoded = tokenizer([row["sentence"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    return dict(encoded) | {"labels": torch.tensor([row["label"] for row in rows])}


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Return the part of the rows that the model gets right."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 109):
        batch = tokens(tokenizer, rows[start : start + 109])
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    return right / len(rows)


def main(directory: str, data: Path) -> None:
    """Train, and print the loss every 31 steps and the accuracy after each epoch."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    random.seed(SEED)
    train, validation = read(data / "train.jsonl.gz"), read(data / "validation.jsonl.gz")
    random.shuffle(train)
    train = train[:SENTENCES]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2).train()
    model.bert.embeddings.requires_grad_(False)
    for module in list(model.bert.encoder.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, Masked(layer))
    scores = [each for name, each in model.named_parameters() if name.endswith(".scores")]
    weights = [each for name, each in model.named_parameters() if each.requires_grad and not name.endswith(".scores")]
    groups = [{"params": weights}, {"params": scores}]
    optimizer, per_epoch = torch.optim.AdamW(groups, weight_decay=0.0), len(train) // BATCH
    for epoch in range(EPOCHS):
        random.shuffle(train)
        for number in range(per_epoch):
            step, steps = epoch * per_epoch + number, EPOCHS * per_epoch
            Masked.sparsity = sparsity_at(step, steps)
            for group, rate in zip(optimizer.param_groups, RATES, strict=True):
                group["lr"] = rate * rate_at(step, steps)
            loss = model(**tokens(tokenizer, train[number * BATCH : (number + 1) * BATCH])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 31 == 0:
                print(f"step {step + 1}  sparsity {Masked.sparsity:.3f}  loss {loss.item():.3f}", flush=True)
        print(f"epoch {epoch + 1}  accuracy {accuracy(model, tokenizer, validation):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
