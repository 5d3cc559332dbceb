"""The masks of every structure and score, on weights of integer arithmetic: the same at any split and any version."""

import hashlib
import json
from fractions import Fraction
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest

from distprune.pruning import scores
from tests.unit.structures.harness import SPLITS, Parameters, Shapes, dense, integers, prune, whole
from tests.unit.structures.units import bert_heads, bert_neurons

GOLDEN = Path(__file__).parents[2] / "golden" / "masks.json"
SPARSITY = Fraction("0.43")
SCORES = [name for name in scores.SCORES if name != "obs"]  # which is no integer arithmetic: test_fisher.py
HEADS = bert_heads(16)
NEURONS = bert_neurons(16, 24)
STRUCTURES: dict[str, tuple[Shapes, dict[str, str]]] = {
    **{scope: ({**HEADS, **NEURONS}, {"scope": scope}) for scope in ("global", "tensor", "layer")},
    **{name: ({**HEADS, **NEURONS}, {"structure": name}) for name in ("2:4", "1:4", "4:8", "1x4", "4x1", "4x4")},
    "heads": (HEADS, {"structure": "heads"}),
    "neurons": (NEURONS, {"structure": "neurons"}),
}
LAYOUTS = [("2", 1), *((split, world) for world in (2, 3, 4, 8) for split in SPLITS)]


@cache
def parameters_of(structure: str, score: str) -> Parameters:
    """Return weights and gradients of 24 bits, and of 4 in every other matrix, where there are ties."""

    def numbers(seed: int) -> Parameters:
        drawn = [integers(prod(shape), seed + n) for n, shape in enumerate(shapes.values())]
        few = [(each * 8).round() / 8 if n % 2 else each for n, each in enumerate(drawn)]
        return dense({name: few[n] * (1 + n % 3) for n, name in enumerate(shapes)})

    shapes, _ = STRUCTURES[structure]
    parameters = numbers(0)
    for name, each in numbers(1000).items():
        parameters[name].gradient = each.weights
        parameters[name].state = -parameters[name].weights * each.weights if score == "movement" else None
    return parameters


def digests(structure: str, split: str = "2", world: int = 1) -> dict[str, str]:
    """Return the SHA-256 of the packed masks, a bit a weight, by structure and score."""
    shapes, config = STRUCTURES[structure]
    found = {}
    for score in SCORES:
        pruned = prune(parameters_of(structure, score), shapes, SPARSITY, score, split, world, 4, **config)
        assert pruned.count == pruned.structure.masked_at(SPARSITY)
        bits = np.packbits(whole(pruned.parameters).numpy())
        found[f"{structure} {score}"] = hashlib.sha256(bits.tobytes()).hexdigest()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_masks_are_those_of_the_file_at_every_split(structure: str) -> None:
    """Masks on disk depend on it: a change of the file needs a reason, and a line in the changelog."""
    every = json.loads(GOLDEN.read_text())
    expected = {f"{structure} {score}": every[f"{structure} {score}"] for score in SCORES}
    for split, world in LAYOUTS:
        assert digests(structure, split, world) == expected, f"{split}, {world} ranks"


def test_every_structure_and_score_prunes_in_its_own_way() -> None:
    every = json.loads(GOLDEN.read_text())
    assert list(every) == [f"{structure} {score}" for structure in STRUCTURES for score in SCORES]
    assert len({every[f"global {score}"] for score in SCORES}) == len(SCORES)
    assert len({every[f"{structure} magnitude"] for structure in STRUCTURES}) == len(STRUCTURES)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({k: v for each in STRUCTURES for k, v in digests(each).items()}, indent=2) + "\n")
