"""The plan's arithmetic, against numbers worked out by hand."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from distprune.config import FisherConfig
from distprune.errors import UserError
from distprune.planning import memory, wire
from distprune.planning.activations import Activations, count, most_at_once
from distprune.planning.held import mask_bytes, reduced, state_bytes, weight_bytes
from distprune.planning.hours import hours, measure
from distprune.planning.memory import Need, gathered
from distprune.planning.shapes import Layout, Shapes, layout_of
from distprune.planning.subject import stand_in
from distprune.pruning.scores import build_score

# A matrix of 10 and one of 21 that is pruned, biases of 3 and 4, and 5 frozen weights: 38 that are trained.
SHAPES = Shapes(({"embedding": 10, "matrix": 21}, {"bias": 3, "norm": 4}), (5,), frozenset({"matrix"}))
MIB = 1 << 20


def held(stage: int, world: int, dtype: torch.dtype = torch.float32) -> tuple[int, int, int, int]:
    layout = Layout(stage, world, dtype)
    states = state_bytes(SHAPES, layout)
    return weight_bytes(SHAPES, layout), states["master"], states["moments"], mask_bytes(SHAPES, layout)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stage_0_holds_everything_on_every_rank(world: int) -> None:
    assert held(0, world) == (43 * 4, 0, 38 * 8 + 4 * 4, 21)
    assert held(0, world, torch.bfloat16) == (43 * 2, 38 * 4, 38 * 8 + 4 * 4, 21)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_cut_each_group_into_even_partitions_of_an_even_size(stage: int) -> None:
    # One rank: 31 of the first group are 32, 7 of the second are 8. Two: 16 and 4. Three: 12 and 4.
    assert held(stage, 1) == (43 * 4, 40 * 4, 40 * 8 + 2 * 4, 21)
    assert held(stage, 2) == (43 * 4, 20 * 4, 20 * 8 + 2 * 4, 15)  # the pruned ones are 10 to 31
    assert held(stage, 3, torch.float16) == (43 * 2, 16 * 4, 16 * 8 + 2 * 4, 12)


def test_stage_3_cuts_each_parameter() -> None:
    # Two ranks hold 5, 11, 2, 2 and of the frozen ones 3; three hold 4, 7, 1, 2 and 2.
    assert held(3, 2) == (23 * 4, 20 * 4, 20 * 8 + 2 * 4, 11)
    assert held(3, 3, torch.bfloat16) == (16 * 2, 14 * 4, 14 * 8 + 2 * 4, 7)
    small = replace(Layout(3, 2), sub_group=6)
    assert state_bytes(SHAPES, small)["moments"] == 20 * 8 + 2 * 4, "5 do not fill a sub-group, 5 + 11 do"


def test_gradients_are_kept_of_whole_parameters() -> None:
    assert reduced(SHAPES, Layout(2, 1)) == 38
    assert reduced(SHAPES, Layout(2, 2)) == 38, "the first rank's 16 and 4 overlap all"
    # Of sixteen each has 2 of either group: the sixth's are in the matrix alone, the second's in three others, 17.
    assert reduced(SHAPES, Layout(2, 16)) == 21


def need(layout: Layout, **changes: object) -> Need:
    return replace(Need(SHAPES, layout, None, Activations((100, 40 * MIB)), 2, on_gpu=True), **changes)


def test_activations_are_there_in_the_forward_pass_and_gradients_in_the_reduction() -> None:
    moments = memory.moments(need(Layout(0, 1, torch.bfloat16)))
    assert moments["forward pass"].device["activations"] == 200 + 80 * MIB
    assert moments["reduction"].device["gradients"] == 38 * 2
    assert moments["update"].device["gradients"] == 38 * (2 + 4)


def test_a_gpu_reserves_its_bucket_and_a_cpu_writes_to_what_it_needs_of_it() -> None:
    gpu = memory.peak(need(Layout(3, 2, bucket=1000)))
    cpu = memory.peak(need(Layout(3, 2, bucket=1000), on_gpu=False))
    assert gpu.device["buckets"] == 1000 * 4
    assert cpu.device["buckets"] == 38 * 4
    held = memory.moments(need(Layout(3, 2)))
    assert [each.device["gathered weights"] for each in held.values()] == [43 * 4, 43 * 4, 0]
    assert gpu.device["libraries"] == 0 < cpu.device["libraries"]


def test_a_bucket_is_copied_to_be_reduced_only_where_deepspeed_is_told_so() -> None:
    section = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 20}}
    in_place = memory.moments(need(layout_of("student", section, 2)))["reduction"]
    section["zero_optimization"]["reduce_scatter"] = True
    copied = memory.moments(need(layout_of("student", section, 2)))["reduction"]
    assert (in_place.device["copies"], copied.device["copies"]) == (0, 20 * 4)


def test_a_cpu_keeps_small_pieces_that_are_freed() -> None:
    cpu = memory.peak(need(Layout(2, 1), activations=Activations((100, 20)), on_gpu=False))
    assert cpu.device["kept when freed"] == 1.5 * 2 * 120 + 1.5 * 38 * 4, (
        "activations, and the weights before they were flat"
    )
    assert Activations((100, 2 * MIB - 1)).total(1, memory.LARGE) == 100 + 2 * MIB - 1
    assert Activations((100, MIB)).total(2, memory.LARGE) == 200


def test_offload_moves_master_moments_masks_and_gradients_to_the_host() -> None:
    gpu = memory.peak(need(Layout(2, 2, torch.bfloat16, offload_optimizer=True)))
    assert gpu.host["master"] == gpu.host["gradients"] == 20 * 4
    assert gpu.host["moments"] == 20 * 8 + 8
    assert gpu.host["masks"] == 15
    assert gpu.device["weights"] == 43 * 2
    assert not {"master", "moments", "masks"} & gpu.device.keys()
    cpu = memory.peak(need(Layout(2, 2, offload_optimizer=True), on_gpu=False))
    assert cpu.host.total() == 0
    assert cpu.device["master"] == 20 * 4


@pytest.mark.parametrize(("score", "held"), [("magnitude", 0), ("movement", 8), ("obs", 4 * 53)])
def test_what_a_score_holds_counts_for_each_weight_to_prune(score: str, held: int) -> None:
    assert build_score(score, 0, FisherConfig(block=50)).bytes_held == held
    kept = memory.peak(need(Layout(2, 2), score_bytes=held)).device
    assert kept["score"] == held * kept["masks"] == held * 15


def test_offloaded_weights_are_on_the_host() -> None:
    gpu = memory.peak(need(Layout(3, 2, offload_weights=True)))
    assert (gpu.device["weights"], gpu.host["weights"]) == (0, 23 * 4)


def test_one_rank_gathers_what_is_offloaded() -> None:
    assert gathered(SHAPES, Layout(3, 1, offload_weights=True)) == 43


@pytest.mark.parametrize(("stage", "moment", "kept"), [(2, "update", 38), (3, "forward pass", 20)])
def test_gradients_are_kept_in_the_type_in_which_they_add_up(stage: int, moment: str, kept: int) -> None:
    section = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    single = section | {"data_types": {"grad_accum_dtype": "fp32"}}
    found = [memory.moments(need(layout_of("student", each, 2)))[moment].device for each in (section, single)]
    assert [each["gradients"] for each in found] == [kept * 2, kept * 4]


def test_a_teacher_is_replicated_or_sharded() -> None:
    frozen = Shapes((), (10, 21), frozenset())
    whole = memory.peak(need(Layout(0, 2), teacher=(frozen, Layout(0, 2))))
    cut = memory.peak(need(Layout(0, 2), teacher=(frozen, Layout(3, 2))))
    assert whole.device["teacher"] == 31 * 4
    assert cut.device["teacher"] == 16 * 4
    assert cut.device["teacher's gathered weights"] == 31 * 4
    away = memory.peak(need(Layout(0, 2), teacher=(frozen, Layout(3, 2, offload_weights=True))))
    assert (away.device["teacher"], away.host["teacher"]) == (0, 16 * 4)


def test_stage_3_gathers_no_more_than_its_options_let_it() -> None:
    assert gathered(SHAPES, Layout(3, 1)) == 0
    assert gathered(SHAPES, Layout(3, 2)) == 43
    assert gathered(SHAPES, Layout(3, 2, prefetch=4, live=10, reuse=2)) == 21 + 10
    assert gathered(SHAPES, Layout(3, 2, prefetch=0, reuse=2)) == 21 + 1
    assert gathered(SHAPES, Layout(2, 2)) == 0


def test_what_has_just_been_gathered_is_there_twice_and_once_more_for_gloo() -> None:
    frozen = Shapes((), (10, 21, 90), frozenset())
    teacher = frozen, Layout(3, 2, prefetch=30, live=100)
    gpu, cpu = (memory.moments(need(Layout(0, 2), teacher=teacher, on_gpu=each)) for each in (True, False))
    assert gpu["forward pass"].device["teacher's gathered weights"] == 121 * 4
    assert (gpu["forward pass"].device["copies"], cpu["forward pass"].device["copies"]) == (90 * 4, 121 * 4)


def test_the_wire_of_each_stage() -> None:
    def sent(stage: int, accumulation: int = 1) -> list[int]:
        layout = Layout(stage, 2, torch.bfloat16)
        return list(wire.bytes_per_step(SHAPES, layout, None, accumulation, 0.5, 2.0).values())

    assert sent(0) == [76, 0, 0, 32 << 10, 2 * 76]
    assert sent(1, 3) == [76, 38, 0, 32 << 10, 2 * 76]
    assert sent(2, 3) == [3 * 76, 38, 0, 32 << 10, 2 * 3 * 76]
    assert sent(3, 3) == [3 * 38, 3 * 43, 0, 32 << 10, 2 * (3 * 38 + 3 * 43)], "weights are gathered for them too"
    teacher = Shapes((), (10, 21), frozenset()), Layout(3, 2)
    assert wire.bytes_per_step(SHAPES, Layout(0, 2), teacher, 2, 0)["teacher's weights"] == 2 * 62
    assert sum(wire.bytes_per_step(SHAPES, Layout(3, 1), None, 1, 1).values()) == 0, "one rank sends nothing"


def test_activations_are_counted_once_and_parameters_not() -> None:
    layer = nn.Linear(3, 5)
    inputs = torch.ones(2, 3)
    counted = count(layer, lambda: (gelu(layer(inputs)) + gelu(layer(inputs).view(5, 2)).view(2, 5)).sum())
    assert sorted(counted.sizes) == [2 * 3 * 4, 2 * 5 * 4, 2 * 5 * 4]
    assert counted.total(4) == 4 * 104


def test_what_is_there_at_once_is_counted_and_what_has_gone_is_not() -> None:
    model = nn.Linear(1000, 10)

    def work() -> torch.Tensor:
        rows = torch.ones(2, 1000)
        halves = rows.view(4, 500) * 0.5
        del rows
        return model(halves.view(2, 1000).tanh_()).sum()

    assert most_at_once(model, work) == 2 * 2 * 4000, "both, and not the view, the result in place, or the weights"


def test_an_evaluation_and_the_pass_for_a_cache_are_moments_of_their_own() -> None:
    layout = Layout(3, 2, prefetch=0)
    moments = memory.moments(need(layout, evaluation=900, teaching=70, cached=(SHAPES, Layout(0, 2))))
    passing, caching = moments["evaluation"].device, moments["caching"].device
    assert (passing["outputs"], caching["outputs"]) == (900, 70)
    assert passing["masks"] == moments["update"].device["masks"] > 0 == caching["masks"]
    assert caching["teacher"] == weight_bytes(SHAPES, Layout(0, 2))
    beside = memory.moments(need(layout, evaluation=900, teaching=7000, teacher=(SHAPES, Layout(0, 2))))
    assert beside["evaluation"].device["outputs"] == 7000
    assert "evaluation" not in memory.moments(need(layout))


def test_a_model_that_this_machine_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cast("PreTrainedModel", nn.Linear(1000, 1000, device="meta"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 << 20))
    with pytest.raises(UserError, match=r"a plan takes 0\.0 GB on this machine, with 0\.0 to give; allowed: a"):
        stand_in(model, torch.float32)
    stand_in(model, torch.bfloat16)


def test_hours() -> None:
    assert hours(3600, 32, 64.0) == 0.5


@pytest.mark.parametrize(
    ("seconds", "speed"),
    [([9.0, 1.0, 2.0, 3.0], 4.0), ([50.0, 16.0], 0.5), ([80.0], 0.1)],
    ids=["three behind one that warms up", "no other after a minute", "one that takes as long"],
)
def test_speed_is_of_the_steps_that_are_timed(
    seconds: list[float], speed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, model, took = 0.0, nn.Linear(2, 1), iter(seconds)

    def loss() -> torch.Tensor:
        nonlocal now
        now += next(took)
        return cast(torch.Tensor, model(torch.ones(2))).sum()

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    before = [each.clone() for each in model.parameters()]
    assert measure(model, loss, [{"params": list(model.parameters())}], 8) == speed
    assert next(took, None) is None
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_options_are_read_as_deepspeed_reads_them() -> None:
    section = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "stage3_prefetch_bucket_size": 7,
            "stage3_max_live_parameters": 9,
        },
        "bf16": {"enabled": True},
    }
    layout = layout_of("deepspeed.student", section, 4)
    assert (layout.stage, layout.world, layout.width, layout.prefetch, layout.live) == (3, 4, 2, 7, 9)
    assert (layout.offload_weights, layout.offload_optimizer, layout.bucket) == (True, False, 500_000_000)
    with pytest.raises(UserError, match=r"offload_optimizer\.device 'nvme'; allowed: cpu"):
        layout_of("x", {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/"}}}, 1)
    with pytest.raises(UserError, match=r"^x\.zero_optimization\.stage is 7, which DeepSpeed does not accept"):
        layout_of("x", {"zero_optimization": {"stage": 7}}, 1)
