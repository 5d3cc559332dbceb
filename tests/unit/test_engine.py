"""What distprune adds to DeepSpeed's own start; engines themselves need ranks and are tested in tests/distributed."""

import os
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from distprune import dist
from distprune.engines import build, options
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
    monkeypatch.setattr(options.Path, "read_text", lambda _: flags)
    monkeypatch.setattr(dist, "on_gpu", lambda: on_gpu)
    assert options.bf16_is_slow() == slow


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_reduced_in_place_where_deepspeed_all_reduces_them(stage):
    section = options.with_defaults({"zero_optimization": {"stage": stage}})
    in_place = section["zero_optimization"].get("reduce_scatter") is False
    assert in_place == (stage in (1, 2)), "ZeRO-3's reduce-scatter is a real one"
    assert section.get("prescale_gradients", False) == in_place


def test_a_section_of_the_user_keeps_its_own_options():
    given = {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}
    section = options.with_defaults(given)
    assert section["zero_optimization"]["reduce_scatter"]
    assert "prescale_gradients" not in section, "DeepSpeed refuses both together"
    assert section["steps_per_print"] == 10
    assert given == {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}


def test_no_timer_has_the_device_waited_for_unless_asked():
    assert options.with_defaults({})["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True}}
    assert options.with_defaults({"timers": asked})["timers"] == asked


@pytest.mark.parametrize(
    ("name", "native", "refused"), [("cuda", False, True), ("cuda", True, False), ("cpu", 0, False)]
)
def test_bf16_is_refused_where_a_gpu_only_emulates_it(monkeypatch, name, native, refused):
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    accelerator = SimpleNamespace(device_name=lambda: name, supported_dtypes=lambda: dtypes)
    monkeypatch.setattr(options, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    section = {"bf16": {"enabled": True}}
    if refused:
        with pytest.raises(UserError, match=r"bf16.enabled is True, .* allowed: float32, float16$"):
            options._check_dtype("deepspeed.student", section)
    else:
        options._check_dtype("deepspeed.student", section)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"zero_optimization": {"stge": 3}},
            r"^option of x\.zero_optimization 'stge' is unknown \(did you mean 'stage'\?\); allowed: .*, stage,",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin": True}}},
            r"^option of x\.zero_optimization\.offload_param 'pin' is unknown.*; allowed: .*, pin_memory",
        ),
        ({"bf16": {"enabld": True}}, r"^option of x\.bf16 'enabld' is unknown \(did you mean 'enabled'\?\)"),
        ({"zero_optimization": {"stage": 7}}, r"^x\.zero_optimization\.stage is 7, .* accept: Input should be 0, 1, 2"),
        ({"fp16": {"loss_scale": "high"}}, r"^x\.fp16\.loss_scale is 'high', .*: fp16\.loss_scale must be a number$"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"^x is not what DeepSpeed accepts: Partial offloading only supported for ZeRO Stage 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"klass": []}}},
            r"^option of x\.zero_optimization\.leaf_module 'klass' is unknown.*; allowed: classes, ",
        ),
        (
            {"weight_quantization": {"bits": 8}},
            r"^option of x\.weight_quantization 'bits' is unknown.*; allowed: enabled, ",
        ),
        ({"zro": {}}, r"^option of x 'zro' is unknown.*; allowed: aio, bf16, (?!.* optimizer, )"),
    ],
)
def test_an_option_that_deepspeed_does_not_have_is_named_with_its_section(section, says):
    with pytest.raises(UserError, match=says) as error:
        options.check_options("x", section | {"train_batch_size": 1})
    assert "pydantic" not in str(error.value)


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


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "float32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}, "float32"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "float32, autocast bfloat16"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["a.B"]}},
            'float32, autocast bfloat16 {"lower_precision_safe_modules": ["a.B"]}',
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "float32, zero_quantized_weights"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "float32"),
    ],
)
def test_what_an_engine_computes_in_is_told_apart(section, words):
    """A teacher's cache is of one of them."""
    assert options.precision_of(section) == words
