"""What models, data and configuration must have in common, told before models are loaded; no collectives."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from distprune.config import Config
from distprune.engines.options import dtype_of
from distprune.errors import UserError
from distprune.models.files import load_tokenizer, open_source, read_config
from distprune.models.weights import (
    check_dropout,
    missing_weights,
    most_tokens,
    set_dropout,
    skeleton,
    stored_names,
)
from distprune.pruning.components import component_matrices
from distprune.pruning.scores import build_score
from distprune.pruning.structures import build_structure, check_sparsity
from distprune.pruning.targets import freeze, targets_of
from distprune.tasks.base import Task
from distprune.training.objective import check_features
from distprune.training.plan import Plan

FEW = 0.01
"""A part of a matrix that may be zero by chance."""


def check_model(config: Config, plan: Plan, task: Task, directory: Path) -> PreTrainedModel:
    """Refuse a student that does not fit the task, the data, or what is to be pruned, and how.

    Args:
        config: of the run.
        plan: of the run.
        task: with the tokenised data.
        directory: the student's.

    Returns:
        The student on the meta device, without weights.

    Raises:
        UserError: as said.
    """
    task.check_order(read_config(directory), f"the model {config.model.path}")
    model, source = skeleton(
        directory, task.auto_class, set_dropout(task.model_options(), directory, config.model.dropout)
    )
    missing_weights(model, source, new_allowed=True)
    check_dropout(model, config.model.dropout)
    check_limits(model, task)
    freeze(model, config.model.freeze)
    if prunes(config, plan):
        shapes = {name: tuple(model.get_parameter(name).shape) for name in targets_of(config.pruning, model)}
        heads = getattr(model.config, "num_attention_heads", None)
        structure = build_structure(config.pruning, shapes, {name: [] for name in shapes}, heads)
        check_sparsity(config.pruning, structure)
        _check_score(config)
    return model


def _check_score(config: Config) -> None:
    """Refuse a score that there is not, or that does not go with the gradients, regrowth or other weights of the run.

    Raises:
        UserError: as said.
    """
    pruning, regrows = config.pruning, config.regrowth.part > 0
    score = build_score(pruning.score, config.train.seed, config.fisher)
    if (score.reads_gradients or regrows) and dtype_of(config.deepspeed.student) == torch.float16:
        reader = f"regrowth.part is {config.regrowth.part}" if regrows else f"pruning.score is {pruning.score!r}"
        raise UserError(f"{reader}, and fp16 scales the gradients that it reads; allowed: bf16 or fp32 with it")
    if regrows and score.comes_back:
        raise UserError(
            f"regrowth.part is {config.regrowth.part} and pruning.score {pruning.score!r}, with which weights come "
            "back already; allowed: one of the two"
        )
    if pruning.weights_of is not None and (score.reads_gradients or score.comes_back or not score.reads_weights):
        raise UserError(
            f"pruning.weights_of is {pruning.weights_of!r} and pruning.score {pruning.score!r}; allowed: a score "
            "of weights alone, as magnitude"
        )


def check_zeros(config: Config, model: PreTrainedModel, directory: Path) -> None:
    """Refuse a model whose zeros are to stay (``pruning.start_sparse``) where the run does not mask all of them.

    Args:
        config: of the run.
        model: of `check_model`.
        directory: the student's.

    Raises:
        UserError: as said, with the first matrix of which more than `FEW` are zero, rows for padding left out.
    """
    if not config.pruning.start_sparse:
        return
    source, masked = open_source(directory), set(targets_of(config.pruning, model))
    stored = stored_names(model, source)
    for name in component_matrices(model):
        if name in masked or name not in stored or not model.get_parameter(name).requires_grad:
            continue
        zeros = source.read(stored[name][0]) == 0
        padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
        if padding is not None:
            zeros[padding] = False
        if int(zeros.sum()) > FEW * zeros.numel():
            raise UserError(
                f"{int(zeros.sum())} of {zeros.numel()} weights of {name} are zero, and it is not among what is "
                "pruned, so that they would not stay; allowed with pruning.start_sparse: pruning.components or "
                "pruning.include that hold it, or model.freeze"
            )


def prunes(config: Config, plan: Plan) -> bool:
    """Return whether a run has masks."""
    return bool(plan.ladder) or config.pruning.start_sparse


def check_teacher(config: Config, directory: Path, task: Task, student: Path) -> PreTrainedModel:
    """Refuse a teacher of other tokens or labels, that lacks a weight, is too small, or whose layers do not fit.

    Returns:
        The teacher on the meta device.

    Args:
        config: of the run; says what of the layers is distilled.
        directory: the teacher's.
        task: gives tokens and labels.
        student: its model directory.

    Raises:
        UserError: as said.
    """
    teacher = read_config(directory)
    task.check_teacher(teacher, load_tokenizer(str(directory)))
    task.check_outputs(read_config(student), teacher)
    check_features(config.distillation, read_config(student), teacher)
    model, source = skeleton(directory, task.auto_class, task.model_options())
    missing_weights(model, source, new_allowed=False)
    check_limits(model, task)
    return model


def check_limits(model: PreTrainedModel, task: Task) -> None:
    """Refuse a model that the task is not for, examples longer than its positions, and tokens without an embedding.

    Raises:
        UserError: as said.
    """
    task.check_architecture(model.config)
    longest = max(max(part["length"][:]) for part in (task.train, *task.evaluations().values()))
    most = most_tokens(model)
    if most is not None and most < longest:
        raise UserError(f"an example has {longest} tokens; allowed: task.max_length up to the model's {most}")
    tokens, embeddings = len(task.tokenizer), getattr(model.config, "vocab_size", None)
    if embeddings is not None and tokens > embeddings:
        raise UserError(f"the tokenizer has {tokens} tokens; allowed: up to the model's vocab_size, {embeddings}")
