"""What is left in memory, behind a forward pass, of the weights that ZeRO-3 gathered for it."""

import weakref
from pathlib import Path

from torch import nn

from tests.distributed.engines import Layout, Student, forward, random_batch, rows, write_model
from tests.world import Worlds


def kept_behind_a_forward_pass(directory: Path) -> tuple[int, list[str], list[str]]:
    """Return how many linear layers there are, and whose gathered weights stay, before and behind the backward pass."""
    student, gathered = Student(directory, Layout(3)), {}
    for name, module in student.engine.module.named_modules():
        if isinstance(module, nn.Linear):
            # Behind DeepSpeed's hooks, which have put the whole weight in place.
            module.register_forward_pre_hook(
                lambda layer, _, name=name: gathered.update({name: weakref.ref(layer.weight.untyped_storage())})
            )
    logits = forward(student.engine, rows(random_batch(0), student.rank, student.world))
    kept = [name for name, storage in gathered.items() if storage() is not None]
    student.engine.backward(logits.float().square().mean())
    student.engine.step()
    after = [name for name, storage in gathered.items() if storage() is not None]
    student.close()
    return len(gathered), kept, after


def test_no_gathered_weight_stays_from_forward_to_backward(world: Worlds, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    for found in world(2).run(kept_behind_a_forward_pass, directory):
        assert found == (14, [], [])
