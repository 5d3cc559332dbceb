"""The means of a sweep's results, and their table and plot."""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
from matplotlib.collections import LineCollection
from scipy.stats import ttest_rel

from distprune.monitor.records import csv_text
from distprune.sweeps.means import means_of, record, without_result
from distprune.sweeps.results import Row
from distprune.sweeps.table import draw, markdown
from tests.unit.sweep_files import row, runs, write_sweep

DENSE, AFTER = {1: 0.9, 2: 0.94, 3: 0.91}, {1: 0.85, 2: 0.86, 3: 0.5}


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Row]:
    file = write_sweep(tmp_path)
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
    for each in rows.values():
        each.update(metric_name="mae", lower_is_better=True)
    assert [each.diverged for each in means_of(rows, "dense", chance=0.92)] == [2, 0]
    assert after.below == pytest.approx(0.5 - 0.91), "it is better"


def test_what_seeds_differ_in_is_the_mean_over_them(rows: dict[str, Row]) -> None:
    for number, each in enumerate(each for each in rows.values() if each["method"] == "after"):
        each.update(steps=100 + 30 * number, examples_per_s=10.0 * number or None)
        each.update(score_gradients=10 * number, encoder_sparsity=0.8 + 0.01 * number, packed_bytes=2**20 * number)
        each.update(sparsity_masked=0.9 + 0.01 * number, model_sparsity=0.4 + 0.01 * number)
    _, after = means_of(rows, "dense", chance=0.5)
    assert (after.steps, after.total_steps) == (130, 230)
    assert (after.sparsity, after.model_sparsity) == (pytest.approx(0.91), pytest.approx(0.41))
    assert after.examples_per_s == pytest.approx(15.0), "of those that tell it"
    assert (after.score_gradients, after.encoder_sparsity) == (10, pytest.approx(0.81))
    assert "| 130 | 230 | 0 | 10 | 91.00% | 81.00% | 41.00% | 1.0 | 15.0 |" in markdown([after], "dense")
    rows["after/train.seed=1,pruning.sparsity=0.9"].update(
        score_gradients=None, encoder_sparsity=None, packed_bytes=None
    )
    _, after = means_of(rows, "dense", chance=0.5)
    assert (after.score_gradients, after.encoder_sparsity) == (None, None), "where an older row does not tell"
    assert "| 130 | 230 | 0 |  | 91.00% |  | 41.00% |  | 15.0 |" in markdown([after], "dense")


def test_a_pair_is_of_one_metric_and_of_the_only_row_that_fits(rows: dict[str, Row]) -> None:
    rows["dense/train.seed=1"]["metric_name"] = "f1"
    assert means_of(rows, "dense", chance=None)[-1].pairs == 2
    rows["dense/again"] = rows["dense/train.seed=2"] | {"run": "dense/again"}
    assert means_of(rows, "dense", chance=None)[-1].pairs == 1


def test_the_table_is_markdown_csv_and_a_plot(rows: dict[str, Row]) -> None:
    means = means_of(rows, "dense", chance=0.5)
    lines = markdown(means, "dense").splitlines()
    assert lines[0].startswith("| method | at | accuracy | worse than dense | pairs | seeds | diverged | steps |")
    assert lines[3].startswith(
        "| after | pruning.sparsity 0.9 | 0.8550 ± 0.0071 | 0.0650 ± 0.1906 | 2 | 3 | 1 | 100 | 200 |"
    )
    header, *records = csv_text([record(each) for each in means]).splitlines()
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
    assert line.get_label() == "after: all diverged"
    assert list(line.get_xdata()) == [means[1].sparsity]


def test_what_a_plot_says_lies_within_it(rows: dict[str, Row]) -> None:
    _, after = means_of(rows, None, chance=0.99)
    names = ("smc_gmp_own_rate", "obert_diagonal_after", "movement", "magnitude_before_rigl")
    figure = draw([replace(after, method=name) for name in names], None, "sweep")
    figure.draw_without_rendering()
    (legend,), whole = figure.legends, figure.bbox
    box = legend.get_window_extent()
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    heights = [float(line.get_ydata()[0]) for line in figure.axes[0].get_lines()]
    assert len(set(heights)) == len(names), "no cross lies on another"


def test_points_that_differ_in_more_than_sparsity_are_lines_of_their_own(rows: dict[str, Row]) -> None:
    _, after = means_of(rows, None, chance=0.5)
    points = [{"lr.peak": rate, "pruning.sparsity": s} for rate in (0.1, 0.2) for s in (0.5, 0.9)]
    found = [replace(after, method="$a$_$b$", point=each, sparsity=each["pruning.sparsity"]) for each in points]
    figure = draw(found, None, "$x$")
    figure.draw_without_rendering()
    lines = [(line.get_label(), list(line.get_xdata())) for line in figure.axes[0].get_lines()]
    assert lines == [(rf"\$a\$_\$b\$ lr.peak {rate}", [0.5, 0.9]) for rate in (0.1, 0.2)], "and dollars are dollars"


def test_what_failed_of_a_mean_is_named(tmp_path: Path) -> None:
    found = runs(write_sweep(tmp_path))
    has = {each.name: row(each, 0.9, tmp_path) for each in found if each.point["train.seed"] == 1}
    del has["after/train.seed=1,pruning.sparsity=0.5"]
    assert without_result(found, has) == ["dense/train.seed=2", "after/train.seed=2,pruning.sparsity=0.9"]


def test_methods_of_one_colour_have_different_marks(rows: dict[str, Row]) -> None:
    _, after = means_of(rows, None, chance=0.5)
    (axes,) = draw([replace(after, method=f"method {number}") for number in range(20)], None, "sweep").axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == 20


def test_a_table_without_a_baseline_compares_with_none(rows: dict[str, Row]) -> None:
    title, _, first, *_ = markdown(means_of(rows, None, chance=0.5), None).splitlines()
    assert title.startswith("| method | at | accuracy | seeds | diverged | steps |")
    assert title.count("|") == first.count("|")


def test_steps_of_a_model_that_several_before_started_from_count_once(rows: dict[str, Row]) -> None:
    dense, ticket = rows["dense/train.seed=1"], rows["after/train.seed=1,pruning.sparsity=0.9"]
    early = dense | {"run": "early", "method": "early", "steps": 7}
    dense["models"] = {"model.path": "early"}
    ticket["models"] = {"model.path": "early", "pruning.weights_of": dense["run"], "teacher.path": "dense/train.seed=2"}
    found = {
        mean.method: mean for mean in means_of({"early": early, dense["run"]: dense, ticket["run"]: ticket}, None, None)
    }
    assert found["after"].total_steps == 100 + 100 + 7
    assert found["after"].teacher_steps == 0, "its teacher is not of these rows"
    ticket["models"] |= {"teacher.path": dense["run"]}
    found = means_of({"early": early, dense["run"]: dense, ticket["run"]: ticket}, None, None)
    assert [(each.total_steps, each.teacher_steps) for each in found] == [(7, 0), (107, 0), (207, 107)]
