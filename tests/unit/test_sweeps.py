"""A sweep's file, its results and its means, without a run."""

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from scipy.stats import ttest_rel

from distprune import settings
from distprune.checkpoints import run_directory
from distprune.commands.sweep import run as sweep
from distprune.errors import UserError
from distprune.sweeps import results
from distprune.sweeps.means import means_of
from distprune.sweeps.results import Row
from distprune.sweeps.spec import Run, read_sweep, runs_of
from distprune.sweeps.table import as_csv, draw, markdown

FILE = """
config: run.yaml
output: {folder}/runs
baseline: dense
set: {{train.epochs: 4}}
grid: {{train.seed: [1, 2]}}
methods:
  after:
    set: {{recipe.name: one_shot}}
    grid: {{pruning.sparsity: [0.5, 0.9]}}
    models: {{model.path: dense}}
  dense:
    set: {{recipe.name: dense}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ntask: {hub: a, validation: b}\n")
    (tmp_path / "sweep.yaml").write_text(FILE.format(folder=tmp_path))
    return tmp_path / "sweep.yaml"


def runs(file: Path, *overrides: str) -> list[Run]:
    return runs_of(read_sweep(file), file, overrides)


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
        "train.epochs=4",
        'recipe.name="one_shot"',
        "train.seed=2",
        "pruning.sparsity=0.9",
        'model.path="out/dense/train.seed=2/final"',
        'train.output="out/after/train.seed=2,pruning.sparsity=0.9"',
        'wandb.name="after/train.seed=2,pruning.sparsity=0.9"',
    ]


def settings_of(run: Run, output: Path = Path("out")) -> dict[str, Any]:
    return run.settings(run.load(output))


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
        ("{recipe.name: dense}", "{}\n    grid: {lr.peak: [1, 2]}", "fits 2 runs of dense; allowed: one"),
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


def row(run: Run, metric: float, output: Path, **more: Any) -> Row:
    shared = {"metric_name": "accuracy", "steps": 100, "sparsity_masked": run.point.get("pruning.sparsity", 0.0)}
    shared |= {"model_sparsity": 0.1, "examples_per_s": 50.0, "final_metric": metric}
    shared = dict.fromkeys(results.OF_SUMMARY) | shared
    named = {"run": run.name, "method": run.method, "point": run.point, "models": run.models}
    return {**named, "settings": settings_of(run, output), **shared, **more}


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


def test_a_directory_of_another_run_is_refused(file: Path) -> None:
    output, (first, *_) = file.parent / "runs", runs(file)
    directory = output / first.name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("model: {path: other}\ntask: {hub: a, validation: b}\ntrain: {seed: 7}\n")
    with pytest.raises(
        UserError, match=r"holds a run with other settings, .* -> .*; allowed: another output, or without it"
    ):
        sweep(str(file), [], [], dry_run=True, only_table=False)


DENSE, AFTER = {1: 0.9, 2: 0.94, 3: 0.91}, {1: 0.85, 2: 0.86, 3: 0.5}


@pytest.fixture
def rows(file: Path) -> dict[str, Row]:
    file.write_text(file.read_text().replace("[1, 2]", "[1, 2, 3]").replace("[0.5, 0.9]", "[0.9]"))
    metric = {"dense": DENSE, "after": AFTER}
    found = [row(each, metric[each.method][each.point["train.seed"]], file.parent) for each in runs(file)]
    return {each["run"]: each for each in found}


def test_means_are_over_seeds_that_converged_and_differences_are_paired(rows: dict[str, Row]) -> None:
    dense, after = means_of(rows, "dense", chance=0.5)
    assert (dense.metric, dense.deviation) == (
        pytest.approx(mean(DENSE.values())),
        pytest.approx(stdev(DENSE.values())),
    )
    assert (dense.below, dense.diverged, dense.total_steps) == (None, 0, 100)
    assert (after.seeds, after.diverged) == (3, 1)
    assert after.metric == pytest.approx(0.855)
    low, high = ttest_rel([0.9, 0.94], [0.85, 0.86]).confidence_interval(0.95)
    assert after.below == pytest.approx((low + high) / 2)
    assert after.interval == pytest.approx((high - low) / 2)
    assert (after.steps, after.total_steps) == (100, 200), "with those of the dense model that it started from"
    (_, all_seeds) = means_of(rows, "dense", chance=None)
    assert (all_seeds.diverged, all_seeds.metric) == (0, pytest.approx(mean(AFTER.values())))
    (_, none) = means_of(rows, None, chance=0.99)
    assert (none.metric, none.deviation, none.below, none.diverged) == (None, None, None, 3)
    assert after.pairs == 2


def test_pairs_have_converged_on_both_sides_and_lower_may_be_better(rows: dict[str, Row]) -> None:
    rows["dense/train.seed=1"]["final_metric"] = None
    dense, after = means_of(rows, "dense", chance=0.4)
    assert (dense.diverged, after.diverged, after.pairs) == (1, 0, 2)
    assert after.below == pytest.approx(((0.94 - 0.86) + (0.91 - 0.5)) / 2)
    for each in rows.values():
        each["metric_name"] = "nll"
    dense, after = means_of(rows, "dense", chance=0.92)
    assert (dense.diverged, after.diverged, after.pairs) == (2, 0, 1)
    assert after.below == pytest.approx(0.5 - 0.91), "it is better"


def test_the_table_is_markdown_csv_and_a_plot(rows: dict[str, Row]) -> None:
    means = means_of(rows, "dense", chance=0.5)
    lines = markdown(means, "dense").splitlines()
    assert lines[0].startswith("| method | at | accuracy | worse than dense | pairs | seeds | diverged | steps |")
    assert lines[3].startswith(
        "| after | pruning.sparsity 0.9 | 0.8550 ± 0.0071 | 0.0650 ± 0.1906 | 2 | 3 | 1 | 100 | 200 |"
    )
    header, *records = as_csv(means).splitlines()
    assert header.split(",")[:3] == ["method", "point", "metric_name"]
    assert len(records) == 2
    (axes,) = draw(means, "dense", "sweep").axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert drawn["after"] == ([means[1].sparsity], [means[1].metric])
    (spread,) = [each for each in axes.collections if isinstance(each, LineCollection)]
    low, high = spread.get_segments()[0][:, 1]
    assert (low + high, high - low) == pytest.approx((2 * means[1].metric, 2 * means[1].deviation)), "one point's band"
    assert drawn["dense 0.917"][1] == [pytest.approx(mean(DENSE.values()))] * 2


def test_where_no_seed_converged_the_plot_has_a_cross(rows: dict[str, Row]) -> None:
    means = means_of(rows, "dense", chance=0.87)
    (axes,) = draw(means, "dense", "sweep").axes
    (line,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert line.get_label() == "after: no seed converged"
    assert list(line.get_xdata()) == [means[1].sparsity]


def test_methods_of_one_colour_have_different_marks(rows: dict[str, Row]) -> None:
    _, after = means_of(rows, None, chance=0.5)
    (axes,) = draw([replace(after, method=f"method {number}") for number in range(20)], None, "sweep").axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == 20


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


def test_a_run_that_goes_on_without_its_sweep_is_waited_for(file: Path) -> None:
    first = next(each for each in runs(file) if each.method == "dense")
    folder = file.parent / "runs" / first.name
    folder.mkdir(parents=True)
    run_directory.lock(folder)
    with pytest.raises(UserError, match=f"{first.name} is still under way in process {os.getpid()} on"):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    run_directory.unlock(folder)
    assert run_directory.holder_of(folder) is None


def test_a_table_without_a_baseline_compares_with_none(rows: dict[str, Row]) -> None:
    title, _, first, *_ = markdown(means_of(rows, None, chance=0.5), None).splitlines()
    assert title.startswith("| method | at | accuracy | seeds | diverged | steps |")
    assert title.count("|") == first.count("|")


def test_a_value_of_the_wrong_kind_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("methods: {a: {grid: {pruning.sparsity: 0.8}}}\n")
    with pytest.raises(UserError, match=r"no sweep: methods.a.grid.pruning.sparsity: Value 0.8 \(float\)") as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert "full_key" not in str(caught.value)
