"""Which teacher a run gets: a cached one or a live one."""

from pathlib import Path
from typing import Any

from distprune import dist, turns
from distprune.config import Config
from distprune.engines.build import build_frozen, let_go
from distprune.engines.options import precision_of
from distprune.errors import UserError
from distprune.paths import expanded
from distprune.tasks.base import Task
from distprune.teachers import cache
from distprune.teachers.cache import CachedTeacher, CacheManifest, Fingerprints
from distprune.teachers.live import LiveTeacher

Teacher = LiveTeacher | CachedTeacher


def is_cached(config: Config, task: Task) -> bool:
    """Return whether the teacher's outputs come from a cache, which keeps logits only."""
    logits_only = config.distillation.hidden == config.distillation.attention == 0
    return config.teacher.cache is not None and task.cacheable and logits_only


def teacher_of(config: Config, task: Task, directory: Path, weights: str, micro_batch: int, is_new: bool) -> Teacher:
    """Return the teacher; where a cache is asked for and is not there, it is made. Collective: every rank calls it.

    Args:
        config: of the run.
        task: with the tokenised data.
        directory: of the teacher's model, which fits the task.
        weights: `hash_of_weights` of it.
        micro_batch: examples in a training forward pass on one rank.
        is_new: whether the run begins: one that goes on does not make its cache again.

    Raises:
        UserError: on every rank, where the cache is of something else, damaged, or cannot be written or seen by all.
    """
    if not is_cached(config, task):
        return LiveTeacher(_engine(config, task, directory, micro_batch), task)
    assert config.teacher.cache is not None
    precision = precision_of(config.deepspeed.teacher)
    found = turns.on_main(lambda: cache.fingerprints(weights, task, precision))
    folder = cache.folder_of(found) if config.teacher.cache == "auto" else expanded(config.teacher.cache)
    if config.teacher.rebuild_cache and is_new:
        cache.remove(folder)
    manifest = turns.on_main(lambda: cache.find(folder, found))
    if manifest is None:
        manifest = _build(config, task, directory, folder, found)
    dist.agree(lambda: cache.refuse_unseen(folder / cache.MANIFEST))
    return CachedTeacher(folder, manifest, task, dist.detect().device)


def _build(config: Config, task: Task, directory: Path, folder: Path, found: Fingerprints) -> CacheManifest:
    """Make a cache, and let the teacher go. Collective: every rank calls it."""
    batch_size = config.train.eval_batch_size
    engine = _engine(config, task, directory, batch_size)
    if dist.is_main():
        print(f"the teacher's outputs for {len(task.train):,} training rows are computed once, into {folder}")
    cache.build(folder, LiveTeacher(engine, task), task, found, batch_size)
    let_go(engine)

    def made() -> CacheManifest:
        manifest = cache.find(folder, found)
        if manifest is None:
            raise UserError(
                f"the teacher's cache {folder} was removed meanwhile; allowed: one run at a time to rebuild it"
            )
        return manifest

    return turns.on_main(made)


def _engine(config: Config, task: Task, directory: Path, micro_batch: int) -> Any:
    return build_frozen(config.deepspeed.teacher, directory, task.auto_class, task.model_options(), micro_batch)
