"""The two DeepSpeed engines: the student that is trained, and the frozen teacher beside it.

Each is loaded and initialised by itself, from its own DeepSpeed configuration, and no configuration object outlives
its use: a global one would shard every later model in the process.
"""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn
from transformers import PreTrainedModel

from distprune import dist
from distprune.checkpoints.files import is_checkpoint
from distprune.config import Config
from distprune.errors import UserError, unknown
from distprune.models.files import read_config
from distprune.models.weights import fill_masters, load_model, set_dropout
from distprune.pruning.targets import freeze
from distprune.zero.engine import free_weights, take_back_empty_step
from distprune.zero.shards import trained_shards

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


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


def _check_section(key: str, section: dict[str, Any]) -> None:
    """Refuse what DeepSpeed refuses, and options that it never asks for: it would ignore them without a word."""
    recorded = _Recorded(deepcopy(section))
    try:
        DeepSpeedConfig(recorded)
    except Exception as error:  # DeepSpeed and pydantic raise many kinds, some over several lines
        raise UserError(f"{key} is not what DeepSpeed accepts: {' '.join(str(error).split())}") from error
    for name in section:
        if name not in recorded.names:
            raise unknown(f"option of {key}", name, sorted(recorded.names))
    _check_dtype(key, section)


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


def build_student(
    config: Config, directory: Path, auto_class: Any, options: dict[str, Any], micro_batch: int
) -> tuple[Any, list[str]]:
    """Load the student and give it to DeepSpeed. Collective: every rank calls it.

    Returns:
        The engine, and the names of the weights that were initialised anew.
    """
    section = engine_options(config.deepspeed.student, micro_batch, config.train.accumulation, config.optimizer.clip)
    dist.agree(lambda: _check_section("deepspeed.student", section))
    model, fresh = load_model(
        directory,
        auto_class,
        set_dropout(options, directory, config.model.dropout),
        dtype=dtype_of(section),
        zero3=section if stage_of(section) == 3 else None,
        seed=config.train.seed,
        new_weights_allowed=True,
    )
    model.written_config = read_config(directory, options)  # dropout is the run's, and not the model's
    freeze(model, config.model.freeze)
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.optimizer.weight_decay),
        lr=config.lr.peak,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        fused=True,
    )
    engine = _initialize("deepspeed.student", model, section, optimizer)
    if stage_of(section) == 0 and dtype_of(section) != torch.float32:
        take_back_empty_step(engine)
    if dtype_of(section) != torch.float32 and not is_checkpoint(directory):
        shards = dist.agree(lambda: trained_shards(engine)).shards
        dist.agree(lambda: fill_masters(model, directory, shards))
    return engine, fresh


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model recompute its activations in the backward pass.

    Raises:
        UserError: it cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.activation_checkpointing is True; allowed: false for a {type(model).__name__}")
    model.gradient_checkpointing_enable({"use_reentrant": False})


def build_frozen(
    section: dict[str, Any], directory: Path, auto_class: Any, options: dict[str, Any], micro_batch: int
) -> Any:
    """Load a model that is only run, replicated (stage 0) or sharded (stage 3). Collective: every rank calls it.

    Returns:
        The engine, in evaluation mode; DeepSpeed gives it no optimizer.
    """
    section = engine_options(section, micro_batch, 1, 0.0)
    dist.agree(lambda: _check_section("deepspeed.teacher", section))
    model, _ = load_model(
        directory,
        auto_class,
        options,
        dtype=dtype_of(section),
        zero3=section if stage_of(section) == 3 else None,
        seed=0,
        new_weights_allowed=False,
    )
    model.requires_grad_(False)
    engine = _initialize("deepspeed.teacher", model, section)
    engine.eval()
    return engine


def _initialize(key: str, model: PreTrainedModel, section: dict[str, Any], optimizer: Any = None) -> Any:
    """Return DeepSpeed's engine; options that contradict each other show only here, on every rank alike."""
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f"DeepSpeed refuses the options of {key}: {' '.join(str(error).split())}") from error
    return engine


def let_go(engine: Any) -> None:
    """Destroy an engine, and free its weights."""
    engine.destroy()
    free_weights(engine.module)


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = rate


def decay_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay on matrices and embeddings, none on biases and norms."""
    norms = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if name in norms or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
