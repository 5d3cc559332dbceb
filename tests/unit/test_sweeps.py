"""A sweep's file and its results, without a run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distprune import dist, settings
from distprune.checkpoints import run_directory
from distprune.commands.sweep import run as sweep
from distprune.errors import UserError
from distprune.sweeps import execute, results
from distprune.sweeps.spec import read_sweep
from tests.unit.sweep_files import row, runs, settings_of, write_sweep


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_every_method_has_a_run_for_each_combination_behind_the_models_that_it_gets(file: Path) -> None:
    found = runs(file)
    assert [run.name for run in found] == [
        "dense/train.seed=1",
        "dense/train.seed=2",
        *(f"after/train.seed={seed},pruning.sparsity={sparsity}" for seed in (1, 2) for sparsity in (0.5, 0.9)),
    ]
    assert [run.models for run in found[2:]] == [{"model.path": f"dense/train.seed={seed}"} for seed in (1, 1, 2, 2)], (
        "that of the same seed"
    )
    out = Path("out")
    assert found[-1].arguments(out) == [
        'wandb.group="sweep"',
        "train.epochs=4",
        'recipe.name="one_shot"',
        "train.seed=2",
        "pruning.sparsity=0.9",
        'model.path="out/dense/train.seed=2/final"',
        'train.output="out/after/train.seed=2,pruning.sparsity=0.9"',
        'wandb.name="after/train.seed=2,pruning.sparsity=0.9"',
    ]


def test_settings_are_what_is_not_as_it_is_by_default_and_not_where_files_are(file: Path) -> None:
    local = "task.hub=null task.train=/a/train.csv task.validation=/a/dev.csv"
    first, *same = (
        settings_of(runs(file, *local.replace("/a", folder).split(), *more)[-1], Path(output))
        for folder, output, more in (("/a", "here", ()), ("/b", "there", ("wandb.mode=offline", "checkpoint.keep=9")))
    )
    assert [first] == same
    assert first == {
        "recipe.name": "one_shot",
        "model.path": "dense/train.seed=2",
        "task.train": "train.csv",
        "task.validation": "dev.csv",
        "train.epochs": 4.0,
        "train.seed": 2,
        "lr.rewind_every": "2 epochs",
        "pruning.sparsity": 0.9,
        "pruning.initial": 0.9,
        "pruning.start": "0 steps",
        "pruning.end": "0 steps",
    }
    for more in ("train.batch_size=8", "lr.peak=1e-3", "task.train=/a/other.csv", "task.hub=x"):
        assert settings_of(runs(file, *local.split(), more)[-1]) != first
    more = [settings_of(runs(file, *local.split(), f"task.more_validation=[{name}]")[-1]) for name in ("/a/c", "/b/c")]
    assert more[0] == more[1] == first | {"task.more_validation": ["c"]}
    models = [settings_of(runs(file, f"model.path={path}")[0]) for path in ("/a/x/final", "/b/x/final", "/a/y/final")]
    assert models[0] == models[1]
    assert models[1] != models[2], "every run's model is called final"
    of_sweeps = [settings_of(runs(file, f'model.path="/a/{name}/lr.peak=1/final"')[0]) for name in ("dense", "gmp")]
    assert of_sweeps[0] != of_sweeps[1], "and every method's run at a point as the others'"
    on_hub = [settings_of(runs(file, f"task.train={split}")[0]) for split in ("a", "c")]
    assert on_hub[0] != on_hub[1], "splits are no files"


def test_values_come_through_the_command_line_as_they_are(file: Path) -> None:
    text = file.read_text().replace("{pruning.sparsity: [0.5, 0.9]}", '{pruning.structure: ["2:4", unstructured]}')
    file.write_text(text.replace("{recipe.name: one_shot}", "{recipe.name: one_shot, pruning.sparsity: 0.5}"))
    found = [run for run in runs(file) if run.method == "after"]
    assert [run.load(Path("out")).pruning.structure for run in found] == ["2:4", "unstructured"] * 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train.epochs: 4", "train.epoch: 4", r"there is no key train.epoch .*did you mean train.epochs\?"),
        ("train.epochs: 4", "train.epochs: 0", r"dense/train.seed=1: train.epochs is 0.0; allowed: more than 0"),
        ("[0.5, 0.9]", "[]", "the grid of after has no values of pruning.sparsity; allowed: at least one"),
        ("[0.5, 0.9]", "[0.5, 0.5]", "has a value of pruning.sparsity twice; allowed: each once"),
        ("[0.5, 0.9]", "[0.5, 1.5]", r"after/.*=1.5: pruning.sparsity is 1.5; allowed"),
        ("model.path: dense", "model.path: dens", r"'dens' is unknown \(did you mean 'dense'\?\)"),
        ("model.path: dense", "model.path: after", "after wait for each other's models"),
        (
            "{recipe.name: dense}",
            "{}\n    grid: {lr.peak: [1, 2]}",
            r"the grid of the baseline dense has \['lr.peak'\], and that of after has not",
        ),
        ("baseline: dense", "baseline: danse", r"baseline 'danse' is unknown \(did you mean 'dense'\?\)"),
        ("baseline: dense", "ranks: 0", "ranks is 0; allowed: at least 1"),
        ("baseline: dense", "rank: 2", "is no sweep: .*rank"),
        ("set: {train.epochs: 4}", "set: {train.epochs: 4}\nranks: two", "is no sweep: .*two"),
        ("{recipe.name: dense}", "{train.seed: 3}", "train.seed is in the grid of dense, and set beside it"),
        ("config: run.yaml", "config: other.yaml", "other.yaml does not exist"),
        ("baseline: dense", "results: a.csv", r"results is 'a.csv'; allowed: a name that ends in .jsonl"),
        ("model.path: dense", "train.output: dense", r"key of models in after 'train.output' is unknown"),
        ("  after:", "  ../after:", "a method is called '../after'; allowed: letters"),
        ("train.epochs: 4", "task.hub: null", "dense/train.seed=1: task.train is 'train', which is not there"),
        ("[0.5, 0.9]", "[0.5, 5.0e-1]", "twice"),
        ("{pruning.sparsity: [0.5, 0.9]}", "{task.validation: [a/m, a_m]}", "two runs have the name 'after/.*a_m'"),
        ("baseline: dense", "results: /sys/no.jsonl", "'/sys/no.jsonl' cannot be written"),
        ("baseline: dense", "compare: {after: [dens]}", r"method of compare 'dens' is unknown \(did you mean 'dense'"),
        (
            "baseline: dense",
            "compare: {after: [dense]}",
            r"after is compared with dense, whose grid has \['train.seed'\]; allowed: another method whose grid has "
            r"\['pruning.sparsity', 'train.seed'\]",
        ),
        ("baseline: dense", "compare: {after: [after]}", "after is compared with after"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(file: Path, old: str, new: str, message: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    assert not list((file.parent / "runs").glob("*/*")), "not even a folder or a log"


def test_results_go_on_from_their_lines_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, found = file.parent / "runs", runs(file)
    stored = output / "results.jsonl"
    for each in found[1:-1]:
        results.append(stored, row(each, 0.5, output))
    sweep(str(file), [], [], dry_run=True, only_table=False)
    first, *to_run = capsys.readouterr().out.splitlines()
    assert first == "6 runs, 4 with a result, 3 to run"
    assert to_run == [found[0].name, found[1].name, found[-1].name], "the model of the last is not here any more"
    results.append(stored, row(found[0], 0.5, output))
    results.append(stored, row(found[-1], 0.5, output))
    sweep(str(file), [], [], dry_run=True, only_table=False)
    assert capsys.readouterr().out == "6 runs, 6 with a result, 0 to run\n"


def test_some_runs_are_carried_out_with_what_they_need(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(str(file), [], ["after/*seed=2*", "after/*=1,*=0.9"], dry_run=True, only_table=False)
    first, *to_run = capsys.readouterr().out.splitlines()
    assert first == "3 runs, 0 with a result, 5 to run"
    found = [each.name for each in runs(file)]
    assert to_run == [name for name in found if name != "after/train.seed=1,pruning.sparsity=0.5"]
    with pytest.raises(UserError, match=r"--only 'befor\*' fits no run; there are e.g. dense/train.seed=1, "):
        sweep(str(file), [], ["after/*", "befor*"], dry_run=True, only_table=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "line 2 is no result of a run; allowed: without that line"),
        (lambda text: text + "{}\n", "line 3 is no result of a run"),
        (lambda text: text + text.splitlines()[0] + "\n", "line 3 is a second result of dense/train.seed=1"),
        (lambda text: text.replace('"train.epochs": 4.0', '"train.epochs": 5.0'), "train.epochs 5.0 -> 4.0; allowed"),
    ],
)
def test_results_that_do_not_fit_are_refused(file: Path, change: Any, message: str) -> None:
    output = file.parent / "runs"
    stored = output / "results.jsonl"
    for each in runs(file)[:2]:
        results.append(stored, row(each, 0.5, output))
    stored.write_text(change(stored.read_text()))
    with pytest.raises(UserError, match=message):
        sweep(str(file), [], [], dry_run=True, only_table=False)


def test_a_model_that_several_runs_have_is_refused(file: Path) -> None:
    text = file.read_text().replace("baseline: dense", "")
    file.write_text(text.replace("{recipe.name: dense}", "{}\n    grid: {lr.peak: [1, 2]}"))
    with pytest.raises(UserError, match="fits 2 runs of dense; allowed: one"):
        runs(file)


def test_a_directory_of_another_run_is_refused(file: Path) -> None:
    output, (first, *_) = file.parent / "runs", runs(file)
    directory = output / first.name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("model: {path: other}\ntask: {hub: a, validation: b}\ntrain: {seed: 7}\n")
    with pytest.raises(
        UserError, match=r"holds a run with other settings, .* -> .*; allowed: another output, or without it"
    ):
        sweep(str(file), [], [], dry_run=True, only_table=False)


def test_a_table_is_made_of_what_there_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="has no result of this sweep yet"):
        sweep(str(file), [], [], dry_run=False, only_table=True)
    output = file.parent / "runs"
    results.append(output / "results.jsonl", row(runs(file)[0], 0.75, output))
    sweep(str(file), [], [], dry_run=False, only_table=True)
    with pytest.raises(UserError, match=r"train.batch_size the default -> 8; allowed"):
        sweep(str(file), ["train.batch_size=8"], [], dry_run=False, only_table=True)
    assert "| dense |  | 0.7500 |" in capsys.readouterr().out
    assert (output / "results.md").exists()
    assert json.loads((output / "results.jsonl").read_text())["final_metric"] == 0.75


def test_a_table_takes_up_what_jobs_of_their_own_have_carried_out(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(each for each in runs(file) if each.method == "dense")
    folder = file.parent / "runs" / run.name
    folder.mkdir(parents=True)
    config = run.load(file.parent / "runs")
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    (folder / "summary.json").write_text(json.dumps(dict.fromkeys(results.OF_SUMMARY, 0) | {"metric_name": "accuracy"}))
    (folder / "metrics.jsonl").write_text("")
    config.train.batch_size += 1
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    with pytest.raises(UserError, match=r"holds a run with other settings, train\.batch_size"):
        sweep(str(file), [], [], dry_run=False, only_table=True)
    config.train.batch_size -= 1
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    sweep(str(file), [], [], dry_run=False, only_table=True)
    assert "| dense |  | 0.0000 |" in capsys.readouterr().out
    assert [
        row["run"] for row in map(json.loads, (file.parent / "runs" / "results.jsonl").read_text().splitlines())
    ] == [run.name]


def test_a_sweep_starts_its_ranks_itself(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="was started as 2 ranks; allowed: one, which starts them"):
        sweep(str(file), [], [], dry_run=False, only_table=False)


def test_the_key_that_was_given_is_named_before_those_that_follow_from_it(file: Path) -> None:
    run = next(each for each in runs(file) if each.method == "dense")
    results.append(file.parent / "runs" / "results.jsonl", row(run, 0.75, file.parent / "runs"))
    with pytest.raises(UserError, match=r"lr.peak the default -> 0.0002; allowed"):  # which lr.final follows
        sweep(str(file), ["lr.peak=2e-4"], [], dry_run=True, only_table=False)
    assert results._difference({}, {"a.b": 2, "a.a": 1}, ["a.a"]) == "a.b the default -> 2"


def test_a_run_that_goes_on_without_its_sweep_is_not_begun_again(file: Path) -> None:
    first = next(each for each in runs(file) if each.method == "dense")
    folder = file.parent / "runs" / first.name
    folder.mkdir(parents=True)
    run_directory.lock(folder)
    with pytest.raises(UserError, match=f"{first.name} is still under way in process {os.getpid()} on"):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    run_directory.unlock(folder)
    assert run_directory.holder_of(folder) is None


def test_a_run_whose_name_looks_like_a_pattern_is_found_by_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = file.read_text().replace("pruning.sparsity: [0.5, 0.9]", "pruning.components: [[attention]]")
    file.write_text(text.replace("set: {recipe.name: one_shot}\n    grid", "grid"))
    name = 'after/train.seed=1,pruning.components=["attention"]'
    sweep(str(file), [], [name], dry_run=True, only_table=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["dense/train.seed=1", name]


def test_a_sweeps_runs_are_a_group_in_wandb_unless_another_is_given(file: Path) -> None:
    groups = [runs(file, *given)[0].load(Path("out")).wandb.group for given in ((), ("wandb.group=mine",))]
    assert groups == ["sweep", "mine"]


class Process:
    """A rank that has ended, once it has been asked ``after`` times."""

    def __init__(self, returncode: int, after: int = 0):
        self.ends_with, self.after, self.returncode = returncode, after, None

    def poll(self) -> int | None:
        self.after -= 1
        self.returncode = self.ends_with if self.after < 0 else None
        return self.returncode


@pytest.mark.parametrize(
    ("told", "ranks", "status", "stopped"),
    [
        (False, [Process(-9, after=2), Process(1)], 1, False),  # rank 0 waited for rank 1, and was killed
        (True, [Process(75), Process(75)], 75, True),
        (True, [Process(-9), Process(-9)], -9, True),
        (True, [Process(2), Process(2)], 2, False),  # a mistake, found after it was told to stop
        (True, [Process(0), Process(0)], 0, False),
    ],
)
def test_a_run_has_the_status_of_the_rank_that_failed_first(
    file: Path, told: bool, ranks: list[Any], status: int, stopped: bool
) -> None:
    job = execute.Job(runs(file)[0], 0, file, ranks, told)
    while not job.has_ended():
        pass
    assert (job.status, job.has_stopped) == (status, stopped)


def test_a_value_of_the_wrong_kind_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("methods: {a: {grid: {pruning.sparsity: 0.8}}}\n")
    with pytest.raises(UserError, match=r"no sweep: methods.a.grid.pruning.sparsity: Value 0.8 \(float\)") as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert "full_key" not in str(caught.value)


@pytest.mark.parametrize(("given", "devices"), [("", "2,3"), ("4,5,6,7", "6,7")])
def test_a_run_has_its_share_of_gpus_and_cores(monkeypatch: pytest.MonkeyPatch, given: str, devices: str) -> None:
    monkeypatch.setattr(dist, "on_gpu", lambda: True)
    monkeypatch.setattr(execute.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(execute.os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = execute._share_of_the_machine(ranks=2, at_once=2, place=1)
    assert share == {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": devices}
