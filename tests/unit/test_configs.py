"""Every shipped configuration is one that trains, and its schedule is the recipe's."""

import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

from distprune import settings
from distprune.config import Config
from distprune.durations import parse
from distprune.lr import LrSchedule, lr_schedule
from distprune.pruning.schedule import sparsity_ladder

CONFIGS = Path(__file__).parents[2] / "configs"
# Recipes are bases of runs and set no data.
PARTS = sorted(CONFIGS.glob("**/recipes/*.yaml"))
RUNS = sorted(set(CONFIGS.glob("**/*.y*ml")) - set(PARTS))
PRUNED_BERT = [path for path in RUNS if re.fullmatch(r"(sst2|mnli|qqp)_\d+_\d+ep", path.stem)]
EPOCH = 1000


@cache
def load(path: Path) -> Config:
    return settings.load(str(path), [])


def schedules(config: Config) -> tuple[dict[int, Fraction], LrSchedule]:
    total = parse(str(config.train.epochs), "train.epochs").steps(EPOCH)
    return sparsity_ladder(config.pruning, EPOCH, total), lr_schedule(config.lr, EPOCH, total)


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_run_is_valid_and_its_schedule_ends_at_the_target(path: Path) -> None:
    config = load(path)
    settings.validate(config)
    ladder, lr = schedules(config)
    assert lr.at(lr.bounds[-1]) == config.lr.final
    assert list(ladder.values())[-1:] == ([Fraction(str(config.pruning.sparsity))] if config.pruning.sparsity else [])


@pytest.mark.parametrize("path", PARTS, ids=name)
def test_recipe_is_used_and_has_no_unknown_key(path: Path) -> None:
    load(path)
    assert any(f"recipes/{path.name}" in run.read_text() for run in path.parents[1].glob("*.yaml"))


def test_runs_write_to_different_directories() -> None:
    outputs = [load(path).train.output for path in RUNS]
    assert len(set(outputs)) == len(outputs)


def test_teachers_are_outputs_of_dense_runs_that_read_the_same_data() -> None:
    dense = {f"{config.train.output}/final": config for config in map(load, RUNS) if config.pruning.sparsity == 0}
    for config in map(load, RUNS):
        if config.distillation.hardness > 0 and config.teacher.path.startswith("runs/"):
            teacher = dense[config.teacher.path]
            assert (teacher.task.hub, teacher.task.subset, teacher.task.text, teacher.task.train) == (
                config.task.hub,
                config.task.subset,
                config.task.text,
                config.task.train,
            )


def test_all_combinations_of_bert_base_are_there() -> None:
    stems = {f"{task}_{sparsity}_{epochs}ep" for task in TEXT for sparsity in (80, 90, 97) for epochs in (10, 30)}
    assert {path.stem for path in PRUNED_BERT} == stems
    assert {path.stem for path in RUNS if path.parent.name == "bert_base"} - stems == {f"{task}_dense" for task in TEXT}


TEXT = {"sst2": ["sentence"], "mnli": ["premise", "hypothesis"], "qqp": ["question1", "question2"]}


@pytest.mark.parametrize("path", PRUNED_BERT, ids=name)
def test_bert_base_follows_the_recipe_that_its_name_says(path: Path) -> None:
    task, percent, epochs = re.fullmatch(r"(\w+)_(\d+)_(\d+)ep", path.stem).groups()
    config = load(path)
    ladder, lr = schedules(config)
    assert config.model.path == "google-bert/bert-base-uncased"
    assert (config.task.subset, config.task.text, config.task.max_length) == (task, TEXT[task], 128)
    assert config.task.validation == ("validation_matched" if task == "mnli" else "validation")
    assert config.task.metrics == (["accuracy", "f1"] if task == "qqp" else [])
    assert (config.train.batch_size, config.train.seed, config.train.epochs) == (32, 42, int(epochs))
    assert (config.optimizer.weight_decay, config.lr.warmup) == (0.0, "0 epochs")
    assert (config.distillation.hardness, config.distillation.temperature) == (1.0, 2.0)
    assert config.deepspeed.student["zero_optimization"]["stage"] == 2
    assert config.deepspeed.teacher["zero_optimization"]["stage"] == 3
    assert (min(ladder.values()), max(ladder.values())) == (Fraction(7, 10), Fraction(int(percent), 100))
    if epochs == "10":
        assert list(ladder) == list(range(2000, 8001, 500))
        assert (lr.peak, lr.final, lr.rewinds) == (8e-5, 2e-5, (8000,))
    else:
        assert list(ladder) == list(lr.rewinds) == list(range(2000, 26_001, 4000))
        assert (lr.peak, lr.final) == (5e-5, 5e-6)


@pytest.mark.parametrize(("stem", "sparsity"), [("sst2_minilm_80", 0.8), ("sst2_minilm_90", 0.9)])
def test_minilm_follows_gmp_star(stem: str, sparsity: float) -> None:
    config = load(CONFIGS / f"{stem}.yaml")
    ladder, lr = schedules(config)
    assert (config.train.epochs, config.train.batch_size, config.task.max_length) == (10, 32, 64)
    assert list(ladder) == list(range(2000, 8001, 100))
    assert (ladder[2000], config.pruning.sparsity) == (Fraction(1, 2), sparsity)
    assert (lr.peak, lr.final, lr.rewinds) == (2e-4, 1e-6, (2000, 4000, 6000, 8000))
    assert (config.distillation.hardness, config.distillation.temperature) == (1.0, 5.5)
    assert config.model.freeze == ["embeddings"]
    assert config.deepspeed.student["bf16"]["enabled"] is True
