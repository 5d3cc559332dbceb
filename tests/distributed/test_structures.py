"""Every structure and score on real engines: one mask at every ZeRO stage and world size, and little on the wire."""

import hashlib
import json
import tempfile
from contextlib import ExitStack
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from distprune.commands import oneshot
from distprune.config import Config, PruningConfig
from distprune.errors import UserError
from distprune.training.setup import build_pruner
from distprune.zero.shards import Shard, trained_shards
from tests.distributed.engines import Layout, Student, whole, write_model
from tests.world import Worlds, by_world, by_world_slow_from_2

GOLDEN = Path(__file__).parents[1] / "golden" / "engine_masks.json"
STRUCTURES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "tensor": {"scope": "tensor"},
    "2:4": {"structure": "2:4"},
    "1:4": {"structure": "1:4"},
    "4:8": {"structure": "4:8"},
    "1x4": {"structure": "1x4"},
    "4x1": {"structure": "4x1"},
    "8x8": {"structure": "8x8"},
    "heads": {"structure": "heads"},
    "neurons": {"structure": "neurons"},
}
SCORES = ["magnitude", "normalized_magnitude", "taylor", "movement", "random"]
SPARSITY = Fraction("0.37")


def integers(count: int, seed: int) -> Tensor:
    """Return numbers from -1 to 1 by a linear congruential generator, in integers until the last division."""
    state, numbers = 2 * seed + 1, []
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        numbers.append((state >> 40) - 2**23)
    return torch.tensor(numbers, dtype=torch.float32) / 2**23


def write_integers(folder: Path) -> Path:
    """Write a model whose weights, and gradients in a file beside them, come from integer arithmetic."""
    directory = write_model(folder / "integers", hidden_size=16, intermediate_size=24, num_attention_heads=4)
    weights = load_file(directory / "model.safetensors")
    made = {name: integers(each.numel(), n).view(each.shape) for n, (name, each) in enumerate(sorted(weights.items()))}
    made |= {name: each * (1 + n % 3) for n, (name, each) in enumerate(sorted(made.items()))}
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    gradients = {name: integers(each.numel(), 1000 + n) for n, (name, each) in enumerate(sorted(weights.items()))}
    save_file(gradients, directory.parent / "gradients.safetensors")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_integers(tmp_path_factory.mktemp("models"))


def prune_by(student: Student, pruning: PruningConfig, gradients: dict[str, Tensor]) -> None:
    """Give the student another pruner, and prune to each sparsity with these gradients."""
    config = Config()
    config.pruning = pruning
    student.pruner = build_pruner(config, student.engine)
    student.names = student.pruner.parameters.names

    def gradient(shard: Shard) -> Tensor:
        return gradients[shard.name][shard.start : shard.end].clone()

    with patch.object(student.pruner.parameters, "gradient", gradient):
        student.pruner.after_backward(SPARSITY)


def digests(directory: Path, layout: Layout, combinations: list[tuple[str, str]]) -> dict[str, str]:
    """Prune by each structure and score, from equal weights; return a digest of the masks of each."""
    student = Student(directory, layout)
    gradients = load_file(directory.parent / "gradients.safetensors")
    before = [(shard, shard.master.clone()) for shard in trained_shards(student.engine).shards]
    found = {}
    for structure, score in combinations:
        prune_by(student, PruningConfig(0.5, score=score, **STRUCTURES[structure]), gradients)
        masks = student.masks()
        bits = np.packbits(torch.cat([masks[name] for name in student.names]).numpy())
        found[f"{structure} {score}"] = hashlib.sha256(bits.tobytes()).hexdigest()
        for shard, weights in before:
            shard.master.copy_(weights)
    student.close()
    return found


@by_world_slow_from_2
def test_one_mask_for_each_structure_and_score_at_every_layout(world: Worlds, model: Path, size: int) -> None:
    """The digests are those of the file: masks on disk depend on them, whatever the stage, the world or the version.

    On three and four ranks: every structure by magnitude and by movement, and every score over all matrices.
    """
    every = [(structure, score) for structure in STRUCTURES for score in SCORES]
    cross = [
        (structure, score) for structure, score in every if structure == "global" or score in ("magnitude", "movement")
    ]
    expected = json.loads(GOLDEN.read_text())
    combinations = every if size <= 2 else cross
    for stage in range(4):
        for found in world(size).run(digests, model, Layout(stage), combinations):
            assert found == {" ".join(each): expected[" ".join(each)] for each in combinations}, f"ZeRO-{stage}"
    assert len(expected) == len(every)
    assert len({expected[f"global {score}"] for score in SCORES}) == len(SCORES), "each score prunes in its own way"
    assert len({expected[f"{structure} magnitude"] for structure in STRUCTURES}) == len(STRUCTURES)


# ------------------------------------------------------------------------------ what goes over the wire


def payloads_of(directory: Path, layout: Layout, prunings: list[dict[str, Any]]) -> list[list[int]]:
    """Return the bytes of each call of torch.distributed that this rank made in a pruning step, for each pruning."""
    student = Student(directory, layout)
    before = [(shard, shard.master.clone()) for shard in trained_shards(student.engine).shards]
    payloads = [payloads_of_one(student, before, pruning) for pruning in prunings]
    student.close()
    return payloads


def payloads_of_one(student: Student, before: list[tuple[Shard, Tensor]], pruning: dict[str, Any]) -> list[int]:
    config = Config()
    config.pruning = PruningConfig(0.5, **pruning)
    pruner = build_pruner(config, student.engine)
    for shard, weights in before:
        shard.master.copy_(weights)
    payloads: list[int] = []

    def watched(name: str) -> Any:
        collective = getattr(torch_dist, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            every = [*arguments, *keywords.values()]
            lists = [each for argument in every if isinstance(argument, list) for each in argument]
            payloads.append(sum(each.numel() * each.element_size() for each in every + lists if torch.is_tensor(each)))
            return collective(*arguments, **keywords)

        return patch.object(torch_dist, name, call)

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(watched(name))
        pruner.prune(Fraction("0.5"))
    return payloads


COLLECTIVES = [
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "isend", "recv", "irecv"),
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
]


@pytest.mark.parametrize(
    "size", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_a_pruning_step_hands_little_to_collectives(
    world: Worlds, model: Path, tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    tied = write_model(tmp_path_factory.mktemp("tied"), levels=12, hidden_size=16, intermediate_size=24)
    # 12 matrices; a boundary cuts a group of four in each, and one row of at most three blocks.
    bounds = {"2:4": 12 * size * 4 * 16, "8x8": 12 * size * 3 * 16}
    prunings = [{}, {"structure": "1x1"}, *({"structure": structure} for structure in bounds)]
    for stage in range(4) if size < 8 else (1, 3):
        for single, units, *structured in world(size).run(payloads_of, model, Layout(stage), prunings):
            assert 0 < sum(single) <= 64 * 1024
            assert len(single) <= 12
            assert all(sum(sent) <= sum(units) + bound for sent, bound in zip(structured, bounds.values(), strict=True))
        for (sent,) in world(size).run(payloads_of, tied, Layout(stage), [{}]):
            assert 0 < sum(sent) <= 64 * 1024


# ------------------------------------------------------------------------------ in training


def train_structured(directory: Path, layout: Layout, pruning: dict[str, Any]) -> dict[str, Tensor]:
    """Climb a ladder with steps between; masks must hold, and only grow unless by movement. Return the last masks."""
    student = Student(directory, layout, clip=0.05, weight_decay=0.1, pruning={"sparsity": 0.5, **pruning})
    before = student.masks()
    for step, sparsity in enumerate([None, Fraction("0.2"), None, Fraction("0.5"), None]):
        student.step(step, sparsity)
        student.pruner.verify()
        masks = student.masks()
        only_grows = all((masks[name] | ~before[name]).all() for name in masks)
        assert only_grows or pruning["score"] == "movement", "a pruned weight is back"
        before = masks
    student.close()
    return before


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["tensor", "2:4", "4x1", "heads", "neurons"])
@pytest.mark.parametrize(
    ("score", "size"),
    [("movement", 1), *(pytest.param(score, 3, marks=pytest.mark.slow) for score in ("movement", "taylor"))],
)
def test_structures_hold_in_training(world: Worlds, model: Path, structure: str, score: str, size: int) -> None:
    for layout in (Layout(0), Layout(2, "bf16"), Layout(2, offload=True), Layout(3)):
        pruning = STRUCTURES[structure] | {"score": score}
        (masks, *_) = world(size).run(train_structured, model, layout, pruning)
        gone = sum(int(mask.sum()) for mask in masks.values())
        assert gone == sum(mask.numel() for mask in masks.values()) // 2, layout
        if structure == "2:4":
            assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())


def movement_of(directory: Path, layout: Layout) -> dict[str, Tensor]:
    """Return what movement has accumulated over three steps, whole."""
    student = Student(directory, layout, pruning={"sparsity": 0.5, "score": "movement"}, lr=1e-3)
    for step in range(3):
        student.step(step)
    states = [
        (each, piece.state[each.owned])
        for each, piece in zip(student.pruner.shards, student.pruner.slices, strict=True)
    ]
    student.close()
    return whole(student.names, states)


@by_world
def test_gradients_are_read_whole(world: Worlds, model: Path, size: int) -> None:
    expected = world(1).run(movement_of, model, Layout(0))[0]
    assert all(each.any() for each in expected.values())
    size_of_all = float(torch.cat(list(expected.values())).norm())
    for layout in (*map(Layout, range(4)), Layout(2, offload=True), Layout(3, offload=True)):
        for name, found in world(size).run(movement_of, model, layout)[0].items():
            assert float((found - expected[name]).norm()) < 1e-4 * size_of_all, f"{layout}: {name}"


# ------------------------------------------------------------------------------ starting sparse


def start_sparse(directory: Path, layout: Layout, sparsity: float) -> tuple[int, dict[str, Tensor]]:
    """Train from a sparse model; return how many were masked at first, and the masks after a rung at ``sparsity``."""
    student = Student(directory, layout, weight_decay=0.1, pruning={"sparsity": sparsity, "start_sparse": True})
    first, before = student.pruner.masked, student.masks()
    student.step(0)
    student.pruner.verify()
    student.step(1, Fraction(str(sparsity)))
    student.pruner.verify()
    masks = student.masks()
    assert all((masks[name] | ~before[name]).all() for name in masks)
    student.close()
    return first, masks


@pytest.mark.slow
@by_world
@pytest.mark.parametrize("sparsity", [0.2, 0.6])
def test_the_zeros_of_a_sparse_model_stay_or_are_pruned_further(
    world: Worlds, model: Path, tmp_path: Path, sparsity: float, size: int
) -> None:
    oneshot.run(str(model), str(tmp_path / "sparse"), None, ["pruning.sparsity=0.4"])
    for layout in (Layout(0, "bf16"), Layout(1), Layout(2), Layout(3)):
        (first, masks), *_ = world(size).run(start_sparse, tmp_path / "sparse", layout, sparsity)
        total = sum(mask.numel() for mask in masks.values())
        assert first == floor(Fraction("0.4") * total)
        assert sum(int(mask.sum()) for mask in masks.values()) == floor(
            max(Fraction("0.4"), Fraction(str(sparsity))) * total
        )


def refused(directory: Path, pruning: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Student(directory, Layout(2), pruning={"sparsity": 0.5, **pruning})
    return str(caught.value)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"structure": "3x4"}, "query.weight has shape [16, 16]; blocks of 3x4"),
        ({"structure": "4:3"}, "'4:3'; allowed: N:M with N at least 1 and less than M"),
        ({"structure": "2:4", "sparsity": 0.6}, "query.weight of shape [16, 16]; allowed: at most 0.5"),
        ({"structure": "2:5"}, "query.weight has shape [16, 16]; 2:5 needs rows that 5 divides"),
        ({"structure": "heads", "include": ["query.weight"]}, "has 1 of the 4 matrices"),
        (
            {"structure": "neurons", "include": ["pooler"]},
            "weight of shape [16, 16] is no matrix of neurons",
        ),
        ({"scope": "groups", "groups": ["query"]}, "key.weight of shape [16, 16] is matched by none of pruning.groups"),
        ({"score": "magic"}, "score 'magic' is unknown; allowed: magnitude"),
        ({"start_sparse": True}, "no weight to prune of"),
    ],
)
def test_what_does_not_fit_is_one_sentence(world: Worlds, model: Path, pruning: dict[str, Any], message: str) -> None:
    first, second = world(2).run(refused, model, pruning)
    assert first == second
    assert message in first


if __name__ == "__main__":
    from tests.world import World

    with tempfile.TemporaryDirectory() as folder:
        written = write_integers(Path(folder))
        every = [(structure, score) for structure in STRUCTURES for score in SCORES]
        alone = World(1)
        GOLDEN.write_text(json.dumps(alone.run(digests, written, Layout(0), every)[0], indent=2) + "\n")
        alone.stop()
