"""The numbers in tables of docs/results are those of the rows; which method a line names is not compared."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from scipy.stats import t as student_t

FOLDER = Path(__file__).parents[2] / "docs/results"
SPREAD = r"-?\d+\.\d+ ± \d+\.\d+"


@dataclass(frozen=True)
class Group:
    """A method's accuracies at one point, by seed, and those of the dense model of the same file."""

    point: dict[str, Any]
    of: dict[int, float]
    dense: dict[int, float]

    def at(self, key: str, value: float) -> bool:
        return key in self.point and self.point[key] == value

    def at_target(self, percent: str) -> bool:
        return self.at("pruning.sparsity", float(percent.removesuffix(" %")) / 100)

    def below(self, others: dict[int, float]) -> str:
        points = [100 * (others[seed] - value) for seed, value in self.of.items() if seed in others]
        return f"{mean(points):.1f} ± {student_t.ppf(0.975, len(points) - 1) * stdev(points) / len(points) ** 0.5:.1f}"

    @property
    def mean(self) -> str:
        values = list(self.of.values())
        return f"{mean(values):.4f} ± {stdev(values):.4f}"


@dataclass(frozen=True)
class Line:
    """A line of a page's table, by the titles of its columns."""

    page: str
    cells: dict[str, str]
    groups: list[Group]
    before: dict[str, str] | None

    def fitting(self, cells: dict[str, str]) -> list[Group]:
        """Return the groups with the accuracies of a line's seeds."""
        shown = accuracies(cells)
        return [group for group in self.groups if shown.items() <= {s: f"{v:.4f}" for s, v in group.of.items()}.items()]


def accuracies(cells: dict[str, str]) -> dict[int, str]:
    """Return the accuracies of a line that are said seed by seed."""
    found = {}
    for title, cell in cells.items():
        seeds = [int(seed) for seed in re.findall(r"\b4\d\b", title)]
        values = re.findall(r"0\.\d{4}", cell)
        if len(seeds) == len(values) and re.fullmatch(r"(accuracy of )?(seeds? )?4\d(, 4\d)*", title):
            found |= dict(zip(seeds, values, strict=True))
    return found


def groups_of(path: Path) -> list[Group]:
    """Return the groups of a file of a sweep's rows, or of the seeds of sst2_minilm.jsonl."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, tuple[dict[str, Any], dict[int, float]]] = {}
    for row in lines:
        if "point" in row:
            point, seed, value = row["point"], row["point"].get("train.seed", 0), row["final_metric"]
        elif row.get("table") == "seeds":
            target = {"pruning.sparsity": row["sparsity_target"]} if row["sparsity_target"] else {}
            point, seed, value = target, row["seed"], row["accuracy"]
        else:
            continue
        point = {key: value for key, value in point.items() if key != "train.seed"}
        found.setdefault(f"{row['method']} {sorted(point.items())}", (point, {}))[1][seed] = value
    dense = found.get("dense []", ({}, {}))[1]
    return [Group(point, of, dense) for point, of in found.values()]


def lines_of(page: Path) -> Iterator[Line]:
    """Yield the lines of a page's tables, with the groups of the files of rows that the page links to."""
    text = page.read_text(encoding="utf-8")
    files = sorted(set(re.findall(r"\]\((\w+\.jsonl)\)", text)))
    groups = list(chain.from_iterable(groups_of(FOLDER / name) for name in files))
    titles: list[str] = []
    before: dict[str, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            titles, before = [], None
        elif not titles:
            titles = cells
        elif set(cells[0]) != {"-"}:
            said = dict(zip(titles, cells, strict=True))
            yield Line(page.name, said, groups, before)
            before = said


LINES = [line for page in sorted(FOLDER.glob("*.md")) for line in lines_of(page) if line.groups]


def only(lines: list[Line], wanted: Callable[[Line], object]) -> Any:
    """Return a parametrisation over the lines that are wanted."""
    chosen = [line for line in lines if wanted(line)]
    assert chosen
    return pytest.mark.parametrize("line", chosen, ids=lambda line: f"{line.page}: {next(iter(line.cells.values()))}")


@only(LINES, lambda line: accuracies(line.cells))
def test_accuracies_means_and_differences_to_dense_are_those_of_rows(line: Line) -> None:
    fitting = line.fitting(line.cells)
    if re.fullmatch(r"\d+ %", target := line.cells.get("sparsity", "")):
        fitting = [each for each in fitting if each.at_target(target)]
    assert fitting, "no rows have these accuracies"
    said = line.cells.get("mean ± deviation") or line.cells.get("mean", "")
    assert not re.match(r"\d", said) or said in {each.mean[: len(said)] for each in fitting}
    below = next((cell for title, cell in line.cells.items() if title.startswith("below dense")), "")
    assert not re.search("± ", below) or below in {each.below(each.dense) for each in fitting}


@only(LINES, lambda line: line.before and re.fullmatch(SPREAD, line.cells.get("points over the step before", "")))
def test_steps_of_the_waterfall_are_differences_of_rows(line: Line) -> None:
    found = {each.below(other.of) for each in line.fitting(line.before or {}) for other in line.fitting(line.cells)}
    assert line.cells["points over the step before"] in found


@only(LINES, lambda line: any(re.fullmatch(r"\d+ %", title) for title in line.cells))
def test_cells_of_a_target_are_those_of_rows(line: Line) -> None:
    for title, cell in line.cells.items():
        if re.fullmatch(r"\d+ %", title) and re.fullmatch(SPREAD, cell):
            at = [each for each in line.groups if len(each.of) > 1 and each.at_target(title)]
            assert cell in {each.mean for each in at} | {each.below(each.dense) for each in at}


@only(LINES, lambda line: any(re.fullmatch(r"\de-\d|\d\.\de-\d", title) for title in line.cells))
def test_cells_of_a_learning_rate_are_those_of_rows(line: Line) -> None:
    for title, cell in line.cells.items():
        if re.fullmatch(r"\de-\d|\d\.\de-\d", title) and re.fullmatch(r"0\.\d{4}", cell):
            at = [each for each in line.groups if each.at("lr.peak", float(title))]
            assert cell in {f"{value:.4f}" for each in at for value in each.of.values()}
