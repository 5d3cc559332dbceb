"""``distprune oneshot``: prune a model directory without training, reading one file after the other.

Under a launcher each rank reads, scores and writes its files, so that a model larger than the memory of one machine
can be pruned by several, and one larger than theirs by reading it once a pass. A score that needs gradients trains
nothing either: it takes them from one batch of a configuration's data, by the engine that a run would use.
"""

import json
import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distprune import dist, recipes, settings
from distprune.checkpoints.files import is_checkpoint, save
from distprune.checks.sections import PRUNING
from distprune.config import Config, DistillationConfig, PruningConfig, RecipeConfig, RegrowthConfig
from distprune.errors import UserError, written
from distprune.models.files import Source, auto_class_of, begin_directory, stored_names
from distprune.models.weights import skeleton
from distprune.monitor import Monitor
from distprune.pruning.exchange import over_ranks, summed
from distprune.pruning.masks import KEPT, PRUNED, count_pruned
from distprune.pruning.scores import Score, build_score
from distprune.pruning.slices import Slice
from distprune.pruning.structures import Choice, build_structure
from distprune.pruning.targets import targets_of
from distprune.training.lr import LrSchedule
from distprune.training.setup import local_model, prepare
from distprune.training.train import Trainer

_OF_THE_DENSE_MODEL = ("*.safetensors", "*.bin", "README.md", "pruning.json", ".*")


def run(
    model_dir: str,
    out: str,
    sparsity: float,
    include: list[str],
    exclude: list[str],
    structure: str = "unstructured",
    scope: str = "global",
    groups: list[str] | None = None,
    score: str = "magnitude",
    seed: int = 42,
    start_sparse: bool = False,
    config: str | None = None,
) -> None:
    """Write a copy of a model whose smallest weights are zero. Collective: every rank calls it."""
    pruning = PruningConfig(
        sparsity,
        sparsity,
        "0 steps",
        "0 steps",
        "1 steps",
        include=include,
        exclude=exclude,
        structure=structure,
        scope=scope,
        groups=groups or [],
        score=score,
        start_sparse=start_sparse,
    )
    _check(pruning)
    chosen = build_score(score, seed)
    launched = dist.detect().size > 1
    if launched or chosen.needs_gradient:
        dist.init()
    if chosen.needs_gradient:
        _prune_by_gradients(model_dir, out, pruning, seed, config)
    else:
        _prune_files(model_dir, out, pruning, chosen)
    dist.shutdown()


def _check(pruning: PruningConfig) -> None:
    config = Config()
    config.pruning = pruning
    for check in PRUNING:
        if not check.holds(config):
            value = getattr(pruning, check.key.removeprefix("pruning."))
            raise UserError(f"--{check.key.removeprefix('pruning.')} is {value}; allowed: {check.allowed}")


# ------------------------------------------------------------------------------ from files


@dataclass
class Files:
    """The part of a model's files that this rank reads and writes."""

    model: PreTrainedModel
    checkpoint: Source
    stored: dict[str, str]
    """The name in the files of each parameter to prune."""
    mine: list[Path]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters to prune, by their names in the files."""
        return {stored: tuple(self.model.get_parameter(name).shape) for name, stored in self.stored.items()}

    def slices(self, start_sparse: bool) -> list[Slice]:
        """Return the tensors to prune that this rank has, whole; each is read when a pass comes to it.

        Nothing is masked, for which one byte is enough; or what is zero, which takes a byte a weight.
        """
        read = lru_cache(maxsize=1)(lambda name: self.checkpoint.read(name).float().view(-1))
        kept = torch.tensor([KEPT], dtype=torch.int8)
        first, slices = 0, []
        for name, shape in self.shapes.items():
            size = prod(shape)
            if self.checkpoint.file_of[name] in self.mine:
                mask = torch.where(read(name) == 0, PRUNED, KEPT).to(torch.int8) if start_sparse else kept.expand(size)
                slices.append(Slice(name, 0, size, 0, size, first, mask, partial(read, name)))
            first += size
        return slices


def _prune_files(model_dir: str, out: str, pruning: PruningConfig, score: Score) -> None:
    """Prune by a score of the weights themselves. Collective: every rank calls it."""
    source, target = local_model(model_dir, None), Path(out).expanduser()
    files = dist.agree(lambda: _open(source, pruning))
    slices = files.slices(pruning.start_sparse)
    sizes = {name: prod(shape) for name, shape in files.shapes.items()}
    heads = getattr(files.model.config, "num_attention_heads", None)
    structure = dist.agree(lambda: build_structure(pruning, files.shapes, {name: [] for name in sizes}, heads))
    partial_dir = dist.on_main(lambda: _begin(target))
    device = dist.detect().device
    over_ranks(score.prepare(slices, sizes), device)
    sparsity = Fraction(str(pruning.sparsity))
    mine = {each.name: count_pruned(each.mask) for each in slices}
    before = over_ranks(summed(torch.tensor([mine.get(name, 0) for name in sizes])), device).tolist()
    choosing = structure.choose(slices, score, sparsity, dict(zip(sizes, before, strict=True)))
    choice = over_ranks(choosing, device)
    others = shutil.ignore_patterns(*_OF_THE_DENSE_MODEL)
    dist.write_on_main(lambda: shutil.copytree(source, partial_dir, ignore=others, dirs_exist_ok=True), target)
    masked = dist.agree(lambda: _write(files, slices, choice, partial_dir))
    (total,) = over_ranks(summed(torch.tensor([masked])), device).tolist()
    wanted = structure.masked_at(sparsity)
    assert total == wanted or (sum(before) and total > wanted), f"{total} weights were masked, and not {wanted}"
    _finish(partial_dir, target, pruning, {"masked": total, "prunable": sum(sizes.values())}, choice.threshold)


def _open(source: Path, pruning: PruningConfig) -> Files:
    """Find the weights to prune, and deal the files out to the ranks.

    Raises:
        UserError: where a weight is missing, or of another shape than the model's.
    """
    if is_checkpoint(source):
        raise UserError(f"{str(source)!r} is a checkpoint; allowed: a model directory, as distprune export makes")
    model, checkpoint = skeleton(source, auto_class_of(source), {})
    names = targets_of(pruning, model)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    stored = stored_names(checkpoint, shapes, model.base_model_prefix)
    world = dist.detect()
    every = sorted(set(checkpoint.file_of.values()), key=lambda file: (-file.stat().st_size, file))
    return Files(model, checkpoint, stored, every[world.rank :: world.size])


def _begin(target: Path) -> Path:
    with written(target):
        return begin_directory(target)


def _write(files: Files, slices: list[Slice], choice: Choice, target: Path) -> int:
    """Write this rank's files again, one at a time, with the chosen weights zero; return how many those are.

    Raises:
        UserError: where a weight is NaN, or a file cannot be written.
    """
    by_name = {each.name: each for each in slices}
    masked = 0
    for file in files.mine:
        tensors: dict[str, Tensor] = {}
        for name in (name for name, place in files.checkpoint.file_of.items() if place == file):
            tensor = files.checkpoint.read(name)
            if name in by_name:
                mask = by_name[name].mask.clone(memory_format=torch.contiguous_format)
                values = tensor.float().flatten().clone()
                if choice.mark(replace(by_name[name], mask=mask, weights=partial(_same, values))):
                    raise UserError(
                        f"{name} in {files.checkpoint.directory} has scores that are NaN, and no place in an order"
                    )
                tensor = tensor.masked_fill((mask == PRUNED).view_as(tensor), 0.0)
                masked += count_pruned(mask)
            tensors[name] = tensor
        with written(target / file.name):
            save(tensors, target / file.name, {"format": "pt"})
    return masked


def _same(values: Tensor) -> Tensor:
    return values


def _finish(partial_dir: Path, target: Path, pruning: PruningConfig, counts: dict[str, int], threshold: float) -> None:
    """Say in ``pruning.json`` what was done, and give the directory its name. Collective: every rank calls it."""
    keys = ("structure", "scope", "groups", "score", "start_sparse", "include", "exclude", "sparsity")
    record = {"method": "one-shot", **{key: getattr(pruning, key) for key in keys}, **counts, "threshold": threshold}

    def finish() -> None:
        (partial_dir / "pruning.json").write_text(json.dumps(record, indent=2))
        partial_dir.rename(target)

    dist.write_on_main(finish, target)
    if dist.is_main():
        print(f"masked {counts['masked']} of {counts['prunable']} weights -> {target}")


# ------------------------------------------------------------------------------ with gradients


def _prune_by_gradients(model_dir: str, out: str, pruning: PruningConfig, seed: int, path: str | None) -> None:
    """Take one optimizer step at a learning rate of 0, pruning in it. Collective: every rank calls it."""
    if path is None:
        raise UserError(f"--score {pruning.score} needs gradients; allowed: with --config FILE, whose data give them")
    config = dist.agree(lambda: _for_one_step(path, model_dir, out, pruning, seed))
    target = Path(out).expanduser()
    partial_dir = dist.on_main(lambda: _begin(target))
    setup = prepare(config)
    assert setup.pruner is not None
    setup.plan = replace(setup.plan, total_steps=1, lr=LrSchedule(0.0, 0.0, 0, (0, 1)))
    trainer = Trainer(config, setup, Monitor(Path(out), config, 1, enabled=False), Path(out))
    trainer.run()
    trainer.export(partial_dir)
    counts = {"masked": setup.pruner.masked, "prunable": setup.pruner.total}
    _finish(partial_dir, target, pruning, counts, setup.pruner.threshold)


def _for_one_step(path: str, model_dir: str, out: str, pruning: PruningConfig, seed: int) -> Config:
    """Return a run's configuration for one step that prunes, what else a run does taken out."""
    config, given = settings.load_given(path, [])
    config.pruning.sparsity = pruning.sparsity
    recipes.apply(config, given)
    config.recipe, config.task.more_validation = RecipeConfig(), []
    config.model.path = model_dir
    if not config.fisher.dropout:
        config.model.dropout = 0.0
    config.train.output, config.train.seed = out, seed
    config.train.select, config.train.patience = "last", None
    config.checkpoint.epochs, config.checkpoint.steps, config.checkpoint.minutes = False, None, None
    config.pruning, config.regrowth, config.distillation = pruning, RegrowthConfig(), DistillationConfig()
    settings.validate(config)
    return config
