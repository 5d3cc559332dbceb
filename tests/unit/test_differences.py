"""Methods of a sweep compared with each other, seed by seed."""

import json
from pathlib import Path
from statistics import mean

import pytest
from scipy.stats import ttest_rel

from distprune.commands.sweep import run as sweep
from distprune.sweeps import results
from distprune.sweeps.means import differences_of
from distprune.sweeps.results import Row
from tests.unit.sweep_files import row, runs

COMPARED = """
config: run.yaml
output: {folder}/runs
grid: {{train.seed: [1, 2, 3, 4]}}
methods:
  a: {{grid: {{pruning.sparsity: [0.5, 0.9, 0.7]}}}}
  b: {{set: {{lr.peak: 1}}, grid: {{pruning.sparsity: [0.5, 0.7, 0.9]}}}}
compare: {{a: [b]}}
chance: 0.55
"""
A = {0.5: [0.9, 0.8, 0.85, 0.86], 0.7: [0.7, 0.75, 0.71, 0.8], 0.9: [0.6, 0.62, 0.63, 0.65]}
B = {0.5: [0.88, 0.79, 0.83, 0.87], 0.7: [0.7, 0.6, 0.66, 0.5], 0.9: [0.5, 0.4, 0.5, 0.5]}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text("model: {path: m}\ntask: {hub: a, validation: b}\n")
    (tmp_path / "sweep.yaml").write_text(COMPARED.format(folder=tmp_path))
    return tmp_path / "sweep.yaml"


@pytest.fixture
def compared(sweep_file: Path) -> dict[str, Row]:
    metrics = {"a": A, "b": B}
    found = [
        row(each, metrics[each.method][each.point["pruning.sparsity"]][each.point["train.seed"] - 1], sweep_file.parent)
        for each in runs(sweep_file)
    ]
    return {each["run"]: each for each in found}


def test_methods_are_compared_seed_by_seed_and_with_the_first_point(sweep_file: Path, compared: dict[str, Row]) -> None:
    first, high, middle = differences_of(runs(sweep_file), compared, {"a": ["b"]}, chance=0.55)
    assert [each.point["pruning.sparsity"] for each in (first, high, middle)] == [0.5, 0.9, 0.7], "as in the file"
    test = ttest_rel(A[0.5], B[0.5])
    assert first.better == pytest.approx(mean(A[0.5]) - mean(B[0.5]))
    assert first.interval == pytest.approx(first.better - test.confidence_interval(0.95).low)
    assert (first.pairs, first.more, first.more_interval) == (4, None, None)
    assert (high.better, high.pairs, high.diverged, high.other_diverged, high.more) == (None, 0, 0, 4, None)
    kept = slice(0, 3)  # the last seed of b is at chance
    assert (middle.pairs, middle.other_diverged) == (3, 1)
    gains = [[a - b for a, b in zip(A[at][kept], B[at][kept], strict=True)] for at in (0.7, 0.5)]
    test = ttest_rel(*gains)
    assert middle.more == pytest.approx(mean(gains[0]) - mean(gains[1]))
    assert middle.more_interval == pytest.approx(middle.more - test.confidence_interval(0.95).low)


def test_where_lower_is_better_so_is_a_difference(sweep_file: Path, compared: dict[str, Row]) -> None:
    higher, *_ = differences_of(runs(sweep_file), compared, {"a": ["b"]}, chance=None)
    for each in compared.values():
        each["metric_name"] = "nll"
    lower, *_ = differences_of(runs(sweep_file), compared, {"a": ["b"]}, chance=None)
    assert lower.better == pytest.approx(-higher.better)


def test_only_seeds_and_points_of_both_are_compared(sweep_file: Path, compared: dict[str, Row]) -> None:
    def pairs_and_more(kept: dict[str, Row]) -> list[tuple[int, bool]]:
        found = differences_of(runs(sweep_file), kept, {"a": ["b"]}, chance=None)
        return [(each.pairs, each.more is not None) for each in found]

    some = {name: each for name, each in compared.items() if each["method"] == "a" or each["point"]["train.seed"] < 3}
    assert pairs_and_more(some) == [(2, False), (2, True), (2, True)]
    without_first = {name: each for name, each in some.items() if each["point"]["pruning.sparsity"] != 0.5}
    assert pairs_and_more(without_first) == [(2, False), (2, True)]
    late = {name: each for name, each in compared.items() if name != "a/train.seed=1,pruning.sparsity=0.5"}
    assert pairs_and_more(late) == [(3, False), (4, True), (4, True)], "the first of the sweep, not of the rows"
    of_another_seed = {name: each for name, each in some.items() if each["method"] == "b"}
    assert pairs_and_more(of_another_seed) == []
    one = {name: each for name, each in compared.items() if each["point"]["train.seed"] == 1}
    first, *_ = differences_of(runs(sweep_file), one, {"a": ["b"]}, chance=None)
    assert (first.better, first.interval) == (pytest.approx(0.02), None)


def test_equal_differences_have_no_interval(sweep_file: Path, compared: dict[str, Row]) -> None:
    for each in compared.values():
        seed = each["point"]["train.seed"]
        each["final_metric"] = 0.7 + 0.03 * seed + (0.1 if each["method"] == "a" else 0)
    first, *_ = differences_of(runs(sweep_file), compared, {"a": ["b"]}, chance=None)
    assert (first.better, first.interval, first.pairs) == (pytest.approx(0.1), None, 4)


def test_without_a_seed_in_the_grid_runs_of_other_seeds_are_no_pair(sweep_file: Path) -> None:
    text = sweep_file.read_text().replace("grid: {train.seed: [1, 2, 3, 4]}\n", "")
    sweep_file.write_text(text)
    rows = {each.name: row(each, 0.9, sweep_file.parent) for each in runs(sweep_file)}
    assert [each.pairs for each in differences_of(runs(sweep_file), rows, {"a": ["b"]}, None)] == [1, 1, 1]
    sweep_file.write_text(text.replace("lr.peak: 1", "lr.peak: 1, train.seed: 7"))
    rows = {each.name: row(each, 0.9, sweep_file.parent) for each in runs(sweep_file)}
    assert not differences_of(runs(sweep_file), rows, {"a": ["b"]}, None)


def test_differences_are_a_table_below_the_means(
    sweep_file: Path, compared: dict[str, Row], capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = compared.pop("b/train.seed=4,pruning.sparsity=0.7")
    for each in compared.values():
        results.append(sweep_file.parent / "runs" / "results.jsonl", each)
    sweep(str(sweep_file), [], [], dry_run=False, only_table=True)
    said, differences, *_ = capsys.readouterr().out.split("\n\n")
    missing, title, *_ = said.splitlines()
    assert missing == f"no result: {left_out['run']}"
    assert title.startswith("| method | at | accuracy |")
    title, _, first, high, middle, *_ = differences.splitlines()
    at = "more than at the first point"
    assert title == f"| method | against | at | better by | {at} | pairs | diverged | of the other |"
    assert first == "| a | b | pruning.sparsity 0.5 | 0.0100 ± 0.0225 |  | 4 | 0 | 0 |"
    assert high == "| a | b | pruning.sparsity 0.9 |  |  | 0 | 0 | 4 |"
    assert middle == "| a | b | pruning.sparsity 0.7 | 0.0667 ± 0.1897 | 0.0500 ± 0.2033 | 3 | 0 | 0 |"
    for what, line, number in (("means", "method,point,metric_name,", 6), ("differences", "method,other,point,", 3)):
        stored = sweep_file.parent / "runs" / f"results.{what}.csv"
        header, *records = stored.read_text().splitlines()
        assert header.startswith(line)
        same = [json.loads(each) for each in stored.with_suffix(".jsonl").read_text().splitlines()]
        assert len(records) == len(same) == number
    assert same[0]["better"] == pytest.approx(0.01)
    assert (same[0]["point"], same[0]["pairs"]) == ("pruning.sparsity=0.5", 4)
