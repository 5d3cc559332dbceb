"""From a configuration to everything a run is made of, every mistake of the user's found before the first step."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distprune import dist, turns
from distprune.config import Config
from distprune.engines.batches import check_batch_size
from distprune.engines.build import build_student
from distprune.errors import UserError
from distprune.models.files import hash_of_weights, load_tokenizer, open_source, resolve
from distprune.models.weights import names_to_prune
from distprune.monitor.records import environment
from distprune.plugins import hashes_of_modules
from distprune.pruning.pruner import Pruner
from distprune.pruning.scores import build_score, try_out
from distprune.pruning.structures import build_structure
from distprune.pruning.targets import targets_of
from distprune.tasks import build_task
from distprune.tasks.base import Task
from distprune.tasks.files import hashes_of
from distprune.teachers.choose import Teacher, teacher_of
from distprune.teachers.live import LiveTeacher
from distprune.training.fit import check_model, check_teacher, check_zeros, prunes
from distprune.training.objective import put_out_features
from distprune.training.plan import Plan, make_plan
from distprune.turns import local_first
from distprune.zero.shards import ShardedParameters, shards_of, trained_shards


@dataclass
class Setup:
    """A run that is ready to train."""

    world: dist.World
    task: Task
    student: Any
    teacher: Teacher | None
    pruner: Pruner | None
    plan: Plan
    new_weights: list[str]
    data: dict[str, str]
    """Fingerprints of the tokenised examples (`Task.fingerprints`)."""
    files: dict[str, str]
    """Hashes of local data, by key and file name."""
    models: dict[str, str]
    """Hashes of the models' files, by the keys that name them; of ``model.path`` only where the run begins."""
    environment: dict[str, str | None]
    """What the run is made with, and the hashes of modules of other packages."""


def prepare(config: Config, checkpoint: Path | None = None) -> Setup:
    """Build tokenizer, data, student, teacher and pruner. Collective: every rank calls it.

    Args:
        config: of the run.
        checkpoint: whose model the student starts from, in place of ``model.path``.

    Raises:
        UserError: on every rank, where any part of the configuration does not fit the others.
    """
    world = dist.detect()
    if config.train.deterministic:
        make_deterministic()
    micro_batch = config.train.batch_size // (world.size * config.train.accumulation)
    directory = checkpoint or local_model(config.model.path, config.model.revision)
    task = load_task(config, directory)
    # Of a run that goes on its checkpoint has them.
    files = turns.on_main(lambda: hashes_of(config.task)) if checkpoint is None else {}

    def check() -> Plan:
        check_batch_size(config.train.batch_size, world.size, config.train.accumulation)
        return make_plan(config, len(task.train))

    plan = dist.agree(check)
    pruning = (config.pruning, config.regrowth, config.fisher)
    sections = (config.train, config.optimizer, config.lr, *pruning, config.distillation, config.deepspeed)
    dist.agree_equal(sections, "the settings")  # paths may differ from node to node
    dist.agree_equal((len(task.train), len(task.validation)), "the numbers of training and validation examples")
    dist.agree_equal(task.fingerprints, "the fingerprints of the data")
    model = dist.agree(lambda: check_model(config, plan, task, directory))
    classes = hashes_of_modules(config.task.name, config.pruning.score)
    dist.agree_equal(classes, "the hashes of the modules of task.name and pruning.score")
    models = {}
    if checkpoint is None:
        turns.on_main(lambda: check_zeros(config, model, directory))
        models["model.path"] = hash_of_model("model.path", directory)
    if config.pruning.weights_of is not None and prunes(config, plan):
        models["pruning.weights_of"] = hash_of_model("pruning.weights_of", local_model(config.pruning.weights_of, None))
    teacher = None
    if config.distillation.teaches:
        teacher, models["teacher.path"] = _teacher(config, task, directory, micro_batch, is_new=checkpoint is None)
    student, fresh = build_student(config, directory, task.auto_class, task.model_options(), micro_batch)
    if isinstance(teacher, LiveTeacher):
        put_out_features(config.distillation, student.module, teacher.engine.module)
    dist.agree(lambda: trained_shards(student))  # a layout that is not known is refused now, not at the export
    pruner = build_pruner(config, student, resumes=checkpoint is not None) if prunes(config, plan) else None
    made_with = turns.on_main(lambda: environment() | classes)
    return Setup(world, task, student, teacher, pruner, plan, fresh, task.fingerprints, files, models, made_with)


def make_deterministic() -> None:
    """Let torch take the algorithms that give the same bits each time, in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not
    torch.use_deterministic_algorithms(True, warn_only=True)
    if dist.on_gpu():  # where attention's fused kernels stay as they are, as torch is only to warn
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def build_pruner(config: Config, student: Any, resumes: bool = False) -> Pruner:
    """Return the pruner of a student's engine. Collective: every rank calls it.

    Args:
        config: of the run.
        student: its engine.
        resumes: whether the masks will come from a checkpoint, also where the run began with a sparse model's zeros.

    Raises:
        UserError: on every rank, where what is to be pruned, the structure or the score do not fit the model.
    """
    pruning = config.pruning
    names = dist.agree(lambda: targets_of(pruning, student.module))
    parameters = dist.agree(lambda: shards_of(student, names))
    heads = getattr(student.module.config, "num_attention_heads", None)
    shapes = {name: tuple(parameters.shape(name)) for name in names}
    cuts = _cuts(parameters)
    structure = dist.agree(lambda: build_structure(pruning, shapes, cuts, heads))
    score = dist.agree(lambda: build_score(pruning.score, config.train.seed, config.fisher, cuts))
    other_weights = None
    if pruning.weights_of is not None:
        directory = local_model(pruning.weights_of, None)
        other_weights = dist.agree(lambda: weights_of(directory, shapes, student.module))
    pruner = Pruner(parameters, student.basic_optimizer, structure, score, other_weights, config.regrowth.part > 0)
    if ":" in pruning.score:
        dist.agree(lambda: try_out(score, pruner.slices))
    if pruning.start_sparse and not resumes:
        pruner.adopt_zeros()
        if pruner.masked == 0:
            raise UserError(f"pruning.start_sparse is true, and no weight to prune of {config.model.path!r} is zero")
    return pruner


def weights_of(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], student: PreTrainedModel
) -> Callable[[str], torch.Tensor]:
    """Return a function that reads a weight of a model directory by the student's name: fp32, flat, whole, a copy.

    Args:
        directory: of the model.
        shapes: of the weights to prune, by the student's names.
        student: whose weights they are.

    Raises:
        UserError: where the model lacks one of them, or has it in another shape.
    """
    source = open_source(directory)
    stored = names_to_prune(student, source, shapes)
    return lambda name: source.read(stored[name][0]).to(torch.float32, copy=True).flatten()


def _cuts(parameters: ShardedParameters) -> dict[str, list[int]]:
    """Return where in each flattened parameter a rank's slice begins or ends. Collective: every rank calls it."""
    places: dict[str, set[int]] = {name: set() for name in parameters.names}
    for name, start, end in dist.gather([(shard.name, shard.start, shard.end) for shard in parameters.shards]):
        places[name] |= {start, end}
    return {name: sorted(places[name] - {0, parameters.numel[name]}) for name in places}


def local_model(path: str, revision: str | None) -> Path:
    """Return a model's directory on this node; local rank 0 downloads. Collective: every rank calls it."""

    def find() -> Path:
        with local_first():
            return resolve(path, revision)

    return dist.agree(find)


def hash_of_model(key: str, directory: Path) -> str:
    """Return the hash of a model's files. Collective: every rank calls it.

    Args:
        key: that names the model.
        directory: of it on this node.

    Raises:
        UserError: on every rank, where nodes have other files.
    """

    def find() -> str | None:
        with local_first():
            return hash_of_weights(directory) if dist.detect().local_rank == 0 else None

    first, *others = (each for each in dist.gather([dist.agree(find)]) if each is not None)
    if set(others) - {first}:
        raise UserError(f"the files of {key} are not the same on all nodes; allowed: the same")
    return first


def load_task(config: Config, directory: Path) -> Task:
    """Load and tokenise the data, once per node. Collective: every rank calls it."""

    def build() -> Task:
        with local_first():
            return build_task(config, load_tokenizer(config.model.tokenizer or str(directory)))

    return dist.agree(build)


def teacher_directory(config: Config, task: Task, student: Path) -> Path:
    """Return the directory of a teacher that fits task and student. Collective: every rank calls it.

    Args:
        config: of the run, with a teacher.
        task: gives tokens and labels.
        student: its model directory.

    Raises:
        UserError: on every rank, where there is no model, or it does not fit.
    """
    assert config.teacher.path is not None
    directory = local_model(config.teacher.path, config.teacher.revision)
    dist.agree(lambda: check_teacher(config, directory, task, student))
    return directory


def _teacher(config: Config, task: Task, student: Path, micro_batch: int, is_new: bool) -> tuple[Teacher, str]:
    """Return the teacher, and the hash of its files. Collective: every rank calls it."""
    directory = teacher_directory(config, task, student)
    weights = hash_of_model("teacher.path", directory)
    return teacher_of(config, task, directory, weights, micro_batch, is_new), weights
