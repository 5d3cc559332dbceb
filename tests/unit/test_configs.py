"""Every shipped configuration is one that trains, and its schedule is the recipe's."""

import re
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest

from distprune import settings
from distprune.config import Config
from distprune.durations import parse
from distprune.pruning.schedule import sparsity_ladder
from distprune.training.lr import LrSchedule, lr_schedule

CONFIGS = Path(__file__).parents[2] / "configs"
# Bases of runs: tasks, and what the runs of a folder share.
TASK_PARTS = sorted((CONFIGS / "tasks").glob("*.yaml"))
PARTS = [*TASK_PARTS, *CONFIGS.glob("*/model.yaml"), CONFIGS / "small" / "minilm.yaml"]
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
RUNS = sorted(set(CONFIGS.glob("**/*.y*ml")) - {*PARTS, *SWEEPS})
PRUNED_BERT = [path for path in RUNS if re.fullmatch(r"(sst2|mnli|qqp|squad)_\d+_\d+ep", path.stem)]
EPOCH = 1000
GRID = [0.2, 0.36, 0.488, 0.59, 0.672, 0.738, 0.791, 0.8325, 0.866, 0.893]


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
def test_part_has_no_unknown_key(path: Path) -> None:
    load(path)


# As the data sets' cards on the hub name them: the columns that are read, in the order in which a model reads them.
PAIR = ["sentence1", "sentence2"]
OF_THE_HUB = {
    "cola": ("nyu-mll/glue", "cola", ["sentence"], [], "label"),
    "commonsense_qa": ("tau/commonsense_qa", None, ["question"], ["choices.text"], "answerKey"),
    "mnli": ("nyu-mll/glue", "mnli", ["premise", "hypothesis"], [], "label"),
    "mrpc": ("nyu-mll/glue", "mrpc", PAIR, [], "label"),
    "qnli": ("nyu-mll/glue", "qnli", ["question", "sentence"], [], "label"),
    "qqp": ("nyu-mll/glue", "qqp", ["question1", "question2"], [], "label"),
    "race": ("ehovy/race", "all", ["article", "question"], ["options"], "answer"),
    "rte": ("nyu-mll/glue", "rte", PAIR, [], "label"),
    "squad": ("rajpurkar/squad", None, ["question", "context"], [], "answers"),
    "squad_v2": ("rajpurkar/squad_v2", None, ["question", "context"], [], "answers"),
    "sst2": ("nyu-mll/glue", "sst2", ["sentence"], [], "label"),
    "stsb": ("nyu-mll/glue", "stsb", PAIR, [], "label"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", ["sentence"], ["option1", "option2"], "answer"),
    "winogrande_mlm": ("allenai/winogrande", "winogrande_xl", ["sentence"], ["option1", "option2"], "answer"),
    "wnli": ("nyu-mll/glue", "wnli", PAIR, [], "label"),
}


def test_tasks_read_the_columns_that_the_hub_has() -> None:
    tasks = {path.stem: load(path).task for path in TASK_PARTS}
    assert {
        stem: (task.hub, task.subset, task.text, task.choices, task.label) for stem, task in tasks.items()
    } == OF_THE_HUB
    splits = {stem: (task.train, task.validation, task.more_validation) for stem, task in tasks.items()}
    assert splits.pop("mnli") == ("train", "validation_matched", ["validation_mismatched"])
    assert set(map(str, splits.values())) == {"('train', 'validation', [])"}
    assert [stem for stem, task in tasks.items() if task.regression] == ["stsb"]
    assert tasks["winogrande"].labels == tasks["winogrande_mlm"].labels == ["1", "2"]


@pytest.mark.parametrize("path", TASK_PARTS, ids=name)
def test_a_task_and_a_target_make_a_run(path: Path) -> None:
    config = settings.load_valid(
        str(path), ["recipe=gmp", "pruning.sparsity=0.9", "model.path=m", "teacher.path=t", "train.batch_size=8"]
    )
    ladder, _ = schedules(config)
    assert ladder[max(ladder)] == Fraction(9, 10)


def test_the_tasks_of_glue_have_their_official_metrics() -> None:
    metrics = {path.stem: load(path).task.metrics for path in TASK_PARTS if load(path).task.hub == "nyu-mll/glue"}
    assert metrics == {
        "cola": ["matthews"],
        "sst2": ["accuracy"],
        "mrpc": ["f1", "accuracy"],
        "stsb": ["pearson", "spearman"],
        "qqp": ["accuracy", "f1"],
        "mnli": ["accuracy"],
        "qnli": ["accuracy"],
        "rte": ["accuracy"],
        "wnli": ["accuracy"],
    }
    mnli = load(CONFIGS / "tasks" / "mnli.yaml").task
    assert (mnli.validation, mnli.more_validation) == ("validation_matched", ["validation_mismatched"])
    assert load(CONFIGS / "tasks" / "stsb.yaml").task.regression


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
    tasks = ("sst2", "mnli", "qqp", "squad")
    stems = {f"{task}_{sparsity}_{epochs}ep" for task in tasks for sparsity in (80, 90, 97) for epochs in (10, 30)}
    assert {path.stem for path in PRUNED_BERT} == stems
    others = {f"{task}_{kind}" for task in tasks for kind in ("dense", "gmp")}
    assert {path.stem for path in RUNS if path.parent.name == "bert_base"} - stems == others


@pytest.mark.parametrize("path", PRUNED_BERT, ids=name)
def test_bert_base_follows_the_recipe_that_its_name_says(path: Path) -> None:
    task, percent, epochs = re.fullmatch(r"(\w+)_(\d+)_(\d+)ep", path.stem).groups()
    config = load(path)
    ladder, lr = schedules(config)
    assert config.model.path == "google-bert/bert-base-uncased"
    assert config.task == load(CONFIGS / "tasks" / f"{task}.yaml").task
    answers = task == "squad"
    assert (config.train.batch_size, config.task.max_length) == ((16, 384) if answers else (32, 128))
    assert (config.train.seed, config.train.epochs) == (42, int(epochs))
    assert (config.optimizer.weight_decay, config.lr.warmup) == (0.0, "0 epochs")
    assert (config.distillation.hardness, config.distillation.temperature) == (1.0, 2.0)
    assert config.deepspeed.student["zero_optimization"]["stage"] == 2
    assert config.deepspeed.teacher["zero_optimization"]["stage"] == 3
    assert (min(ladder.values()), max(ladder.values())) == (Fraction(7, 10), Fraction(int(percent), 100))
    if epochs == "10":
        assert list(ladder) == list(range(2000, 8001, 500))
        assert (lr.peak, lr.final, lr.rewinds) == (8e-5, 3e-5 if answers else 2e-5, (8000,))
    else:
        assert list(ladder) == list(lr.rewinds) == list(range(2000, 26_001, 4000))
        assert (lr.peak, lr.final) == ((8e-5, 8e-6) if answers else (5e-5, 5e-6))


@pytest.mark.parametrize("kind", ["gmp", "smc_gmp"])
@pytest.mark.parametrize("task", ["commonsense_qa", "winogrande", "race"])
def test_roberta_large_runs_on_the_grid_of_smc_bench(task: str, kind: str) -> None:
    path = CONFIGS / "roberta_large" / f"{task}_{kind}.yaml"
    (sweep,) = re.findall(r"--sweep pruning.sparsity=(\S+)", path.read_text())
    assert [float(each) for each in sweep.split(",")] == GRID
    for sparsity in GRID:
        config = settings.load_valid(str(path), [f"pruning.sparsity={sparsity}"])
        ladder, _ = schedules(config)
        assert ladder[max(ladder)] == Fraction(str(sparsity))
        assert config.model.path == "FacebookAI/roberta-large"
    assert config.distillation.hardness == (kind == "gmp")
    assert ("head" in config.pruning.components) == (kind == "smc_gmp")


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
