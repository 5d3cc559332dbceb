"""The two DeepSpeed engines: the student that is trained, and the frozen teacher beside it.

Each is loaded and initialised by itself, from its own DeepSpeed configuration, and no configuration object outlives
its use: a global one would shard every later model in the process.
"""

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from distprune import dist
from distprune.checkpoints.files import is_checkpoint
from distprune.config import Config
from distprune.engines.options import check_options, dtype_of, engine_options, stage_of
from distprune.errors import UserError
from distprune.models.files import read_config
from distprune.models.weights import fill_masters, load_model, set_dropout
from distprune.pruning.targets import freeze
from distprune.zero.engine import free_weights, take_back_empty_step
from distprune.zero.saved import look_up_gathered_weights
from distprune.zero.shards import trained_shards

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def build_student(
    config: Config, directory: Path, auto_class: Any, options: dict[str, Any], micro_batch: int
) -> tuple[Any, list[str]]:
    """Load the student and give it to DeepSpeed. Collective: every rank calls it.

    Returns:
        The engine, and the names of the weights that were initialised anew.
    """
    section = engine_options(config.deepspeed.student, micro_batch, config.train.accumulation, config.optimizer.clip)
    dist.agree(lambda: check_options("deepspeed.student", section))
    model, fresh = load_model(
        directory,
        auto_class,
        set_dropout(options, directory, config.model.dropout),
        dtype=dtype_of(section),
        zero3=section if stage_of(section) == 3 else None,
        seed=config.train.seed,
        frozen=False,
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
    if stage_of(section) == 3 and not section["zero_optimization"]["memory_efficient_linear"]:
        look_up_gathered_weights(model)
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
    dist.agree(lambda: check_options("deepspeed.teacher", section))
    model, _ = load_model(
        directory,
        auto_class,
        options,
        dtype=dtype_of(section),
        zero3=section if stage_of(section) == 3 else None,
        seed=0,
        frozen=True,
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
