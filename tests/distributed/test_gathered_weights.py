"""What is left in memory, behind a forward pass, of the weights that ZeRO-3 gathered for it."""

import weakref
from pathlib import Path

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from tests.distributed.engines import Layout, Student, forward, random_batch, rows, write_model
from tests.world import Worlds


def kept_behind_forward_passes(directory: Path) -> list[tuple[int, set[str], set[str]]]:
    """Return for each step how many linear layers there are, whose gathered weights stay, and whose DeepSpeed keeps."""
    student, gathered, found = Student(directory, Layout(3, variant="released")), {}, []
    layers = {name: each for name, each in student.engine.module.named_modules() if isinstance(each, nn.Linear)}
    for name, module in layers.items():
        # Behind DeepSpeed's hooks, which have put the whole weight in place.
        module.register_forward_pre_hook(
            lambda layer, _, name=name: gathered.update({name: weakref.ref(layer.weight.untyped_storage())})
        )
    for step in range(3):  # from the second on, DeepSpeed fetches ahead
        logits = forward(student.engine, rows(random_batch(step), student.rank, student.world))
        kept = {name for name, storage in gathered.items() if storage() is not None}
        held = {name for name, each in layers.items() if each.weight.ds_status is ZeroParamStatus.AVAILABLE}
        found.append((len(gathered), kept, held))
        student.engine.backward(logits.float().square().mean())
        student.engine.step()
    student.close()
    return found


def test_no_gathered_weight_stays_that_deepspeed_has_released(world: Worlds, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    for steps in world(2).run(kept_behind_forward_passes, directory):
        for layers, kept, held in steps:
            assert layers == 14
            assert kept <= held
            assert len(held) < layers
