"""The sections of a configuration but DeepSpeed's options."""

import re
from math import inf
from operator import le, lt
from typing import Any

from distprune.checks.check import Check
from distprune.checks.times import compare, evaluates, first_cycle, prunes_often, time, within_run
from distprune.config import COMPONENTS, Config, value_of


def _dense(config: Config) -> bool:
    return config.pruning.sparsity == 0


def _has_windows(config: Config) -> bool:
    return config.task.name != "question_answering" or config.task.stride < config.task.max_length


def _regexes(key: str) -> Check:
    def holds(config: Config) -> bool:
        try:
            return all(re.compile(pattern) for pattern in value_of(config, key))
        except (re.error, OverflowError):
            return False

    return Check(key, "a list of regular expressions", holds)


def _one_of(key: str, *names: str) -> Check:
    return Check(key, f"{', '.join(names[:-1])} or {names[-1]}", lambda c: value_of(c, key) in names)


def _positive(key: str) -> Check:
    return Check(key, "more than 0", lambda c: 0 < value_of(c, key) < inf)


def _normal(key: str) -> Check:
    return Check(key, "1e-37 to 1e38, as fp32 has them", lambda c: 1e-37 <= value_of(c, key) <= 1e38)


def _not_negative(key: str) -> Check:
    return Check(key, "at least 0", lambda c: 0 <= value_of(c, key) < inf)


def _part(key: str) -> Check:
    return Check(key, "at least 0 and less than 1", lambda c: 0 <= value_of(c, key) < 1)


def _at_least_one(key: str) -> Check:
    return Check(key, "at least 1", lambda c: value_of(c, key) >= 1)


def _at_least_one_or_null(key: str) -> Check:
    return Check(key, "at least 1, or null", lambda c: value_of(c, key) is None or value_of(c, key) >= 1)


def _replicates(key: str, default: Any) -> Check:
    names = ("gmp", "dense", "one_shot", "smc_gmp")
    allowed = f"{default!r} where recipe.name is not {', '.join(names[:-1])} or {names[-1]}, which alone read it"
    return Check(key, allowed, lambda c: value_of(c, key) == default or c.recipe.name in names)


def _read_by(key: str, default: Any, *kinds: str) -> Check:
    """Return the check of a key that only some of the built-in kinds of task read; others may read any."""

    def holds(config: Config) -> bool:
        return value_of(config, key) == default or config.task.name in kinds or ":" in config.task.name

    return Check(key, f"{default!r} where task.name is not {' or '.join(kinds)}", holds)


RECIPE = (
    _positive("recipe.epochs"),
    _at_least_one_or_null("recipe.replicas"),
    _replicates("recipe.epochs", 2.0),
    _replicates("recipe.replicas", None),
)

MODEL = (
    Check("model.path", "a model directory or hub id", lambda c: c.model.path not in ("", "???")),
    Check(
        "model.dropout",
        "at least 0 and less than 1, or null",
        lambda c: c.model.dropout is None or 0 <= c.model.dropout < 1,
    ),
    _regexes("model.freeze"),
)

DISTILLATION = (
    Check("distillation.hardness", "0 to 1", lambda c: 0 <= c.distillation.hardness <= 1),
    _positive("distillation.temperature"),
    _not_negative("distillation.hidden"),
    _not_negative("distillation.attention"),
    Check("distillation.layers", "layers from 1", lambda c: all(layer >= 1 for layer in c.distillation.layers)),
    Check(
        "distillation.layers",
        "none where distillation.hidden and attention are 0",
        lambda c: not c.distillation.layers or c.distillation.hidden > 0 or c.distillation.attention > 0,
    ),
    Check(
        "model.dropout",
        "0 where distillation.attention is more than 0: transformers puts out attention behind its dropout",
        lambda c: c.distillation.attention == 0 or c.model.dropout == 0,
    ),
    Check(
        "teacher.path",
        "a model directory or hub id where distillation.hardness, hidden or attention is more than 0",
        lambda c: bool(c.teacher.path) or not c.distillation.teaches,
    ),
)

TASK = (
    _read_by("task.regression", False, "text_classification"),
    _read_by("task.labels", [], "text_classification", "multiple_choice", "choice_by_masked_lm"),
    _read_by("task.choices", [], "multiple_choice", "choice_by_masked_lm"),
    _read_by("task.form", [], "multiple_choice"),
    _read_by("task.too_long", "truncate", "text_classification", "multiple_choice", "choice_by_masked_lm"),
    Check(
        "task.text",
        "one column, or two different ones",
        lambda c: len(set(c.task.text)) == len(c.task.text) in (1, 2),
    ),
    Check(
        "task.text",
        "other columns than 'label', unless task.label is that one",
        lambda c: "label" not in c.task.text or c.task.label == "label",
    ),
    Check("task.label", "another column than those of task.text", lambda c: c.task.label not in c.task.text),
    Check(
        "task.validation",
        "another split or file than task.train, unless task.holdout is set",
        lambda c: c.task.validation != c.task.train or c.task.holdout > 0,
    ),
    Check(
        "task.labels",
        "none where task.regression is true",
        lambda c: not (c.task.regression and c.task.labels),
    ),
    Check("task.labels", "at least two, or none to take them from the data", lambda c: len(c.task.labels) != 1),
    Check("task.labels", "different names", lambda c: len(set(c.task.labels)) == len(c.task.labels)),
    Check("task.subset", "null where task.hub is", lambda c: c.task.subset is None or c.task.hub is not None),
    _part("task.holdout"),
    _at_least_one("task.max_length"),
    Check("task.stride", "at least 0 and less than task.max_length", lambda c: c.task.stride >= 0 and _has_windows(c)),
    _at_least_one("task.longest_answer"),
    Check("task.mask", "more than 0 and less than 1", lambda c: 0 < c.task.mask < 1),
    _one_of("task.bad_rows", "refuse", "skip"),
    _one_of("task.too_long", "truncate", "skip", "refuse"),
    _at_least_one_or_null("task.limit"),
)

SEED = Check("train.seed", "at least 0 and less than 2^63", lambda c: 0 <= c.train.seed < 1 << 63)

TRAIN = (
    Check("train.output", "a directory, of one line", lambda c: c.train.output.splitlines() == [c.train.output]),
    _positive("train.epochs"),
    _at_least_one("train.batch_size"),
    _at_least_one("train.accumulation"),
    Check(
        "train.accumulation",
        "a divisor of train.batch_size",
        lambda c: c.train.batch_size % c.train.accumulation == 0,
    ),
    _at_least_one("train.eval_batch_size"),
    Check(
        "train.eval_every",
        "more than 0 and at most train.epochs; a number counts epochs, '500 steps' steps",
        evaluates,
    ),
    _at_least_one("train.log_every"),
    SEED,
    _one_of("train.select", "last", "best"),
    _at_least_one_or_null("train.patience"),
    Check(
        "train.patience",
        "null where train.select is last, which would keep the state that patience ran out at",
        lambda c: c.train.patience is None or c.train.select == "best",
    ),
)

CHECKPOINT = (
    _at_least_one_or_null("checkpoint.steps"),
    Check(
        "checkpoint.minutes",
        "more than 0, or null",
        lambda c: c.checkpoint.minutes is None or c.checkpoint.minutes > 0,
    ),
    _at_least_one("checkpoint.keep"),
)

OPTIMIZER = (
    Check(
        "optimizer.betas",
        "two numbers of at least 0 and less than 1",
        lambda c: len(c.optimizer.betas) == 2 and all(0 <= beta < 1 for beta in c.optimizer.betas),
    ),
    _normal("optimizer.eps"),
    _not_negative("optimizer.weight_decay"),
    _not_negative("optimizer.clip"),
)

LR = (
    _positive("lr.peak"),
    Check("lr.final", "0 to lr.peak", lambda c: 0 <= c.lr.final <= c.lr.peak),
    Check(
        "lr.rewind_every",
        "more than 0 and at most train.epochs, or null",
        lambda c: within_run(c, "lr.rewind_every"),
    ),
    Check(
        "lr.rewind_first",
        "more than 0 and at most train.epochs, or null",
        lambda c: within_run(c, "lr.rewind_first"),
    ),
    Check(
        "lr.rewind_first",
        "null where lr.rewind_every is",
        lambda c: c.lr.rewind_first is None or c.lr.rewind_every is not None,
    ),
    Check(
        "lr.warmup",
        "less than the first cycle (lr.rewind_first, else lr.rewind_every, else train.epochs)",
        lambda c: compare(c, "lr.warmup", lt, first_cycle(c)),
    ),
)

PRUNING = (
    _part("pruning.sparsity"),
    _part("pruning.initial"),
    Check(
        "pruning.initial",
        "at most pruning.sparsity",
        lambda c: _dense(c) or c.pruning.initial <= c.pruning.sparsity,
    ),
    Check(
        "pruning.start",
        "at most pruning.end",
        lambda c: _dense(c) or compare(c, "pruning.start", le, "pruning.end"),
    ),
    Check(
        "pruning.end",
        "before the end of the run (train.epochs), to train with the last mask",
        lambda c: _dense(c) or compare(c, "pruning.end", lt, "train.epochs"),
    ),
    Check(
        "pruning.every",
        "more than 0 and at most the time from pruning.start to pruning.end; a number counts epochs, '500 steps' steps",
        lambda c: _dense(c) or prunes_often(c),
    ),
    Check(
        "pruning.components",
        f"some of {', '.join(COMPONENTS)}",
        lambda c: bool(c.pruning.components) and set(c.pruning.components) <= set(COMPONENTS),
    ),
    _regexes("pruning.include"),
    _regexes("pruning.exclude"),
    _regexes("pruning.groups"),
    Check(
        "pruning.structure",
        "unstructured, N:M, RxC, heads or neurons",
        lambda c: re.fullmatch(r"unstructured|heads|neurons|\d+[:x]\d+", c.pruning.structure) is not None,
    ),
    _one_of("pruning.scope", "global", "layer", "tensor", "groups"),
    Check(
        "pruning.scope",
        "global where pruning.structure is not unstructured",
        lambda c: c.pruning.scope == "global" or c.pruning.structure == "unstructured",
    ),
    Check(
        "pruning.groups",
        "regexes where pruning.scope is groups, and none elsewhere",
        lambda c: (c.pruning.scope == "groups") == bool(c.pruning.groups),
    ),
    Check(
        "pruning.weights_of",
        "null where pruning.start_sparse is true, whose mask is that of the student's own zeros",
        lambda c: c.pruning.weights_of is None or not c.pruning.start_sparse,
    ),
)

REGROWTH = (
    _part("regrowth.part"),
    Check(
        "regrowth.every",
        "more than 0",
        lambda c: c.regrowth.part == 0 or time(c, "regrowth.every").amount > 0,
    ),
    Check(
        "pruning.structure",
        "unstructured where regrowth.part is more than 0",
        lambda c: c.regrowth.part == 0 or c.pruning.structure == "unstructured",
    ),
    Check(
        "pruning.score",
        "another where regrowth.part is more than 0: what movement pruned comes back by itself",
        lambda c: c.regrowth.part == 0 or c.pruning.score != "movement",
    ),
    Check(
        "pruning.weights_of",
        "null where regrowth.part is more than 0",
        lambda c: c.regrowth.part == 0 or c.pruning.weights_of is None,
    ),
    Check(
        "pruning.sparsity",
        "more than 0, or pruning.start_sparse, where regrowth.part is",
        lambda c: c.regrowth.part == 0 or c.pruning.sparsity > 0 or c.pruning.start_sparse,
    ),
)

FISHER = (
    _at_least_one("fisher.block"),
    _at_least_one("fisher.samples"),
    _normal("fisher.damping"),
)

WANDB = (_one_of("wandb.mode", "online", "offline", "disabled"),)

SCORING = (*PRUNING, *REGROWTH, *FISHER)
SECTIONS = (*RECIPE, *MODEL, *DISTILLATION, *TASK, *TRAIN, *CHECKPOINT, *OPTIMIZER, *LR, *SCORING, *WANDB)
