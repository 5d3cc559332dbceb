"""What the choice of SST-2's validation sentences adds to a difference of two models' accuracies.

python docs/results/answers.py SST2_DIRECTORY DENSE PRUNED [DENSE PRUNED ...], a pair of model directories for each seed
"""

import gzip
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 109


@torch.no_grad()
def right(model_directory: str, rows: list[dict[str, str | int]]) -> Tensor:
    """Return 1 for each sentence whose label the model says, else 0."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForSequenceClassification.from_pretrained(model_directory).eval()
    found = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        sentences = [row["sentence"] for row in batch]
        encoded = tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt")
        found.append(model(**encoded).logits.argmax(-1) == torch.tensor([row["label"] for row in batch]))
    return torch.cat(found).float()


def main(folder: Path, *models: str) -> None:
    """Print how many sentences one model of a pair has right alone, and the difference with its error."""
    with gzip.open(folder / "validation.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    answers = torch.stack([right(model, rows) for model in models])
    gains = answers[0::2] - answers[1::2]
    points = 100 * gains.mean(0)  # of each sentence, over the seeds
    half = 1.96 * points.std() / len(rows) ** 0.5
    print(f"{100 * gains.abs().mean():.1f} % of {len(rows)} sentences are right in one of the two alone")
    print(f"difference {points.mean():.2f} points, ± {half:.2f} by the choice of the sentences (95 %)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
