"""What distprune adds to DeepSpeed's own start; engines themselves need ranks and are tested in tests/distributed."""

import os
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from distprune import dist
from distprune.engines import build
from distprune.errors import UserError
from distprune.training import setup
from distprune.zero import shards


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError, ValueError])
def test_what_deepspeed_refuses_at_its_start_is_one_sentence(monkeypatch, kind):
    def refuse(**_: object) -> None:
        raise kind("ZeRO does not go\n  with the pipeline")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(UserError, match=r"^DeepSpeed refuses the options of deepspeed\.teacher: ZeRO does not go with"):
        build._initialize("deepspeed.teacher", object(), {})


def test_a_defect_in_its_start_keeps_its_traceback(monkeypatch):
    def fail(**_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(deepspeed, "initialize", fail)
    with pytest.raises(TypeError):
        build._initialize("deepspeed.student", object(), {})


@pytest.mark.parametrize(
    ("flags", "on_gpu", "slow"),
    [("flags : avx512f", False, True), ("flags : avx512_bf16 amx_bf16", False, False), ("flags : avx2", True, False)],
)
def test_a_cpu_without_instructions_for_bf16_is_known(monkeypatch, flags, on_gpu, slow):
    monkeypatch.setattr(build.Path, "read_text", lambda _: flags)
    monkeypatch.setattr(dist, "on_gpu", lambda: on_gpu)
    assert build.bf16_is_slow() == slow


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_reduced_in_place_where_deepspeed_all_reduces_them(stage):
    options = build.with_defaults({"zero_optimization": {"stage": stage}})
    in_place = options["zero_optimization"].get("reduce_scatter") is False
    assert in_place == (stage in (1, 2)), "ZeRO-3's reduce-scatter is a real one"
    assert options.get("prescale_gradients", False) == in_place


def test_a_section_of_the_user_keeps_its_own_options():
    given = {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}
    options = build.with_defaults(given)
    assert options["zero_optimization"]["reduce_scatter"]
    assert "prescale_gradients" not in options, "DeepSpeed refuses both together"
    assert options["steps_per_print"] == 10
    assert given == {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}


def test_no_timer_has_the_device_waited_for_unless_asked():
    assert build.with_defaults({})["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True}}
    assert build.with_defaults({"timers": asked})["timers"] == asked


@pytest.mark.parametrize(
    ("name", "native", "refused"), [("cuda", False, True), ("cuda", True, False), ("cpu", 0, False)]
)
def test_bf16_is_refused_where_a_gpu_only_emulates_it(monkeypatch, name, native, refused):
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    accelerator = SimpleNamespace(device_name=lambda: name, supported_dtypes=lambda: dtypes)
    monkeypatch.setattr(build, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    section = {"bf16": {"enabled": True}}
    if refused:
        with pytest.raises(UserError, match=r"bf16.enabled is True, .* allowed: float32, float16$"):
            build._check_dtype("deepspeed.student", section)
    else:
        build._check_dtype("deepspeed.student", section)


@pytest.mark.parametrize("offload", [True, False])
def test_offloaded_gradients_are_waited_for_before_they_are_read(monkeypatch, offload):
    """DeepSpeed copies them from a GPU while Python goes on."""
    happened: list[str] = []

    def read(_: int) -> torch.Tensor:
        happened.append("read")
        return torch.ones(2, 2)

    waits = SimpleNamespace(synchronize=lambda: happened.append("wait"))
    monkeypatch.setattr(shards, "get_accelerator", lambda: waits)
    parameters = object.__new__(shards.PartitionedOptimizer)
    parameters.engine = SimpleNamespace(optimizer=SimpleNamespace(cpu_offload=offload))
    mapping = SimpleNamespace(get_lp_grad_fragment=read)
    parameters.parameters = {"w": SimpleNamespace(_hp_mapping=mapping, _index_in_param_group=0)}
    gradient = parameters.gradient(SimpleNamespace(name="w", start=4, end=8))
    assert gradient.shape == (4,)
    assert happened == (["wait", "read"] if offload else ["read"])


@pytest.fixture
def as_before(monkeypatch):
    """Give torch's own settings back behind a test that changes them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        enable(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_deterministic_run_takes_no_algorithm_that_is_not(monkeypatch, as_before, on_gpu):
    monkeypatch.setattr(dist, "on_gpu", lambda: on_gpu)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    setup.make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    cuda = torch.backends.cuda
    fused = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
    assert fused == (not on_gpu,) * 3
    assert cuda.math_sdp_enabled()
