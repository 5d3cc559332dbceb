"""``python -m tests.gpu.masks DEVICE``: masks of every structure and score on a device, compared with the CPU's."""

import sys
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from distprune.config import PruningConfig
from distprune.pruning.exchange import over_ranks
from distprune.pruning.masks import KEPT
from distprune.pruning.scores import SCORES, build_score
from distprune.pruning.slices import Slice
from distprune.pruning.structures import build_structure

SHAPES = {
    "encoder.layer.0.attention.self.query.weight": (1024, 1024),
    "encoder.layer.0.attention.self.key.weight": (1024, 1024),
    "encoder.layer.0.attention.self.value.weight": (1024, 1024),
    "encoder.layer.0.attention.output.dense.weight": (1024, 1024),
}
STRUCTURES = ["unstructured", "2:4", "4x1", "heads"]


def masks(structure: str, score: str, device: torch.device) -> Tensor:
    """Return the masks of fixed weights at 30 and then 50 %, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    slices, first = [], 0
    for name, shape in SHAPES.items():
        size = prod(shape)
        # Rounded, so that many are equal.
        weights, gradient = ((torch.randn(size, generator=generator) * 64).round().to(device) / 64 for _ in range(2))
        mask = torch.full((size,), KEPT, dtype=torch.int8, device=device)
        state = torch.zeros(size, device=device)
        readers = (weights.view(-1).detach, gradient.detach)
        slices.append(Slice(name, 0, size, 0, size, first, mask, *readers, state))
        first += size
    chosen = build_structure(PruningConfig(0.5, structure=structure), SHAPES, {name: [] for name in SHAPES}, 16)
    scoring = build_score(score, 0)
    masked = dict.fromkeys(SHAPES, 0)
    for part in (part for each in slices for part in each.held()):
        scoring.observe(part)
    for sparsity in (Fraction(3, 10), Fraction(1, 2)):
        over_ranks(scoring.prepare(slices, {name: prod(shape) for name, shape in SHAPES.items()}), device)
        choice = over_ranks(chosen.choose(slices, scoring, sparsity, masked), device)
        assert sum(choice.mark(each) for each in slices) == 0
        masked = {each.name: int((each.mask == 0).sum()) for each in slices}
        assert sum(masked.values()) == chosen.masked_at(sparsity)
    return torch.cat([each.mask.cpu() for each in slices])


if __name__ == "__main__":
    for structure in STRUCTURES:
        for score in (name for name in SCORES if name != "obs"):  # which learns in an engine
            found = masks(structure, score, torch.device(sys.argv[1]))
            assert torch.equal(found, masks(structure, score, torch.device("cpu"))), f"{structure} by {score}"
    print("the same")
