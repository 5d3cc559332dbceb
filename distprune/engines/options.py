"""DeepSpeed's options of one engine: what they are where nothing is said, and which are refused."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, ValidationError

from distprune import dist
from distprune.checks.deepspeed import OWNED, UNUSED
from distprune.errors import UserError, unknown

QUANTIZING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
"""Options of ZeRO-3 that round the weights which the forward pass uses."""


def with_defaults(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section of DeepSpeed's options with distprune's own defaults where it says nothing."""
    options = deepcopy(section)
    zero = options.setdefault("zero_optimization", {})
    # The replacement of torch's linear function would outlive the engine and reach the other model.
    zero.setdefault("memory_efficient_linear", False)
    if stage_of(section) in (1, 2) and not zero.setdefault("reduce_scatter", False):
        # DeepSpeed all-reduces a bucket either way; without the option it does so in place, without two copies of it.
        options.setdefault("prescale_gradients", True)  # divided before the sum, as with the option
    options.setdefault("zero_force_ds_cpu_optimizer", False)
    options.setdefault("steps_per_print", 2**31)
    options.setdefault("timers", {"throughput": {"enabled": False}})  # it has the device waited for twice a step
    return options


def engine_options(section: dict[str, Any], micro_batch: int, accumulation: int, clip: float) -> dict[str, Any]:
    """Return a DeepSpeed configuration: the user's section, distprune's defaults, and what distprune decides.

    Args:
        section: DeepSpeed's own options.
        micro_batch: examples in a forward pass on one rank.
        accumulation: forward passes in an optimizer step.
        clip: largest gradient norm; 0: no clipping.
    """
    return with_defaults(section) | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
    }


def stage_of(section: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration."""
    return int(section.get("zero_optimization", {}).get("stage", 0))


def dtype_of(section: dict[str, Any]) -> torch.dtype:
    """Return the type of the weights that the forward pass uses."""
    if section.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if section.get("fp16", {}).get("enabled") else torch.float32


def precision_of(section: dict[str, Any]) -> str:
    """Return in words what an engine computes in: the type of its weights, and what else changes its outputs' bits."""
    words = [str(dtype_of(section)).removeprefix("torch.")]
    autocast, zero = section.get("torch_autocast", {}), section.get("zero_optimization", {})
    if autocast.get("enabled"):
        options = {name: value for name, value in sorted(autocast.items()) if name != "enabled"}
        options.pop("dtype")  # which has several names, of the only one that is allowed
        words.append(f"autocast bfloat16{f' {json.dumps(options)}' if options else ''}")
    if stage_of(section) == 3:
        words += [name for name in QUANTIZING if zero.get(name)]
    return ", ".join(words)


class _Recorded(dict[str, Any]):
    """A DeepSpeed configuration that notes which of its options are asked for."""

    def __init__(self, options: dict[str, Any]):
        super().__init__(options)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:
        return self


def check_options(key: str, section: dict[str, Any]) -> None:
    """Refuse what DeepSpeed refuses, and options that it never asks for: it would ignore them without a word."""
    recorded = _Recorded(deepcopy(section))
    try:
        DeepSpeedConfig(recorded)
    except ValidationError as error:
        raise refused(key, section, error) from error
    except Exception as error:  # DeepSpeed raises many kinds, some over several lines
        raise UserError(f"{key} is not what DeepSpeed accepts: {' '.join(str(error).split())}") from error
    for name in section:
        if name not in recorded.names:
            raise unknown(f"option of {key}", name, sorted(recorded.names - {*OWNED, *UNUSED}))
    _check_dtype(key, section)


def refused(key: str, section: dict[str, Any], error: ValidationError) -> UserError:
    """Return the error for an option within a section that DeepSpeed's own model of that section refuses.

    Args:
        key: dotted key of the engine's options.
        section: those options.
        error: of the model that was made of one of their sections.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    said = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not path:
        return UserError(f"{key} is not what DeepSpeed accepts: {said}")
    within = next((name for name, options in section.items() if _has(options, path)), "")
    where = ".".join(filter(None, [key, within, *path[:-1]]))
    if first["type"] == "extra_forbidden":
        return unknown(f"option of {where}", path[-1], sorted(_options_of(error.title, path[:-1])))
    return UserError(f"{where}.{path[-1]} is {first['input']!r}, which DeepSpeed does not accept: {said}")


def _has(options: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(options, dict) or part not in options:
            return False
        options = options[part]
    return True


def _options_of(title: str, path: list[str]) -> set[str]:
    """Return the options that a model of DeepSpeed's has, or the model of a section within it.

    Args:
        title: name of the model's class.
        path: of the section within.
    """
    model: type[BaseModel] = next(each for each in _kinds(DeepSpeedConfigModel) if each.__name__ == title)
    for part in path:
        annotation: Any = model.model_fields[part].annotation
        model = next(each for each in get_args(annotation) or [annotation] if issubclass(each, BaseModel))
    return set(model.model_fields)


def _kinds(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in model.__subclasses__():
        yield each
        yield from _kinds(each)


def _check_dtype(key: str, section: dict[str, Any]) -> None:
    accelerator, dtype = get_accelerator(), dtype_of(section)
    allowed = [each for each in accelerator.supported_dtypes() if each != torch.bfloat16 or _has_bf16(accelerator)]
    if dtype not in allowed:
        name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        raise UserError(
            f"{key}.{name}.enabled is True, which this {accelerator.device_name()} does not support; "
            f"allowed: {', '.join(str(each).removeprefix('torch.') for each in allowed)}"
        )


def bf16_is_slow() -> bool:
    """Return whether this is a CPU that has no instructions for bf16, where fp32 is several times faster."""
    flags = Path("/proc/cpuinfo")
    return not dist.on_gpu() and flags.exists() and "bf16" not in flags.read_text()


def _has_bf16(accelerator: Any) -> bool:
    """Return whether the device computes in bf16; torch emulates it on older GPUs, many times slower than fp16."""
    on_cuda = accelerator.device_name() == "cuda"
    return not on_cuda or torch.cuda.is_bf16_supported(including_emulation=False)
