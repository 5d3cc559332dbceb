"""The page about runs: what it says, that it needs nothing beside itself, and that a browser shows it."""

import csv
import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import BertConfig

from distprune.__main__ import main
from distprune.commands import report
from distprune.config import Config
from distprune.errors import UserError
from distprune.models import files
from distprune.reports.figures import curves, weights
from distprune.reports.page import _further, page
from distprune.reports.runs import differences, read_runs, times

MATRIX = "bert.encoder.layer.0.output.dense.weight"
OTHER = "bert.encoder.layer.1.output.dense.weight"


def write_weights(directory: Path, keep: float) -> None:
    directory.mkdir()
    BertConfig().save_pretrained(directory)
    matrices = {
        name: torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate((MATRIX, OTHER))
    }
    save_file({name: each * (each.abs() > keep) for name, each in matrices.items()}, directory / "model.safetensors")


def write_run(directory: Path, model: Path, ended: bool = True, **values: Any) -> Path:
    """Write what a run leaves: 40 steps of 8 examples at 16 a second, evaluated twice."""
    directory.mkdir(parents=True)
    config = Config()
    config.model.path, config.train.batch_size, config.train.output = str(model), 8, str(directory)
    for key, value in values.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    records = []
    for step in range(10, 50, 10):
        parts = {"loss": 1 / step, "task_loss": 2 / step, "distillation_loss": 0.0, "threshold": 0.1}
        shared = {"step": step, "epoch": step / 20, "sparsity": 0.5}
        records.append({**shared, "split": "train", "lr": 1e-4, "examples_per_s": 16.0, **parts})
        if step % 20 == 0:
            layers = {f"sparsity/{MATRIX}": 0.7, f"sparsity/{OTHER}": 0.3}
            records.append({**shared, "split": "validation", "accuracy": 0.5 + step / 100, **layers})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if ended:
        write_weights(directory / "final", keep=0.5)
        counts = {"masked_weights": 600, "prunable_weights": 1200, "sparsity_masked": 0.5, "encoder_sparsity": 0.5}
        layers = {MATRIX: {"masked": 420, "weights": 600}, OTHER: {"masked": 180, "weights": 600}}
        metric = {"metric_name": "accuracy", "final_metric": 0.9, "dense_metric": 0.95, "method": "by <magnitude>"}
        rest = {"model_sparsity": 0.25, "steps": 40, "world_size": 2, "wall_time_s": 26.0, "layers": layers}
        summary = counts | metric | rest | {"environment": {"torch": "2.13.0", "git": None}}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the directories of two finished runs that differ, and of one under way without its model."""
    folder = tmp_path_factory.mktemp("runs")
    write_weights(folder / "model", keep=0.0)
    first = write_run(folder / "a" / "run", folder / "model")
    second = write_run(folder / "b" / "run", folder / "model", pruning__sparsity=0.9, lr__peak=2e-4)
    third = write_run(folder / "c", folder / "nowhere", ended=False)
    return [str(first), str(second), str(third)]


@pytest.fixture(scope="module")
def html(runs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page about them."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", *runs, "--html", str(path)]) == 0
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "cannot be read: while parsing"), ("train: {batch_size: 8}", "has no model.path; allowed")],
)
def test_a_configuration_that_no_run_has_written_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_runs([str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_runs_are_read_and_named_apart(runs: list[str]) -> None:
    first, second, third = read_runs(runs)
    assert [run.name for run in (first, second)] == ["a/run", "b/run"]
    assert third.summary == {}
    assert first.layers == {MATRIX: 0.7, OTHER: 0.3}
    assert differences([first, second]) == {
        "train.output": [json.dumps(each) for each in runs[:2]],
        "lr.peak": ["0.0001", "0.0002"],
        "pruning.sparsity": ["0.0", "0.9"],
    }
    assert list(times(first).values()) == [20.0, 6.0], "40 steps of 8 examples at 16 a second, of 26 seconds"
    parts = {"training steps": 19.5, "prunings": 2.5, "evaluations": 4.0}
    assert times(replace(first, summary=first.summary | {"seconds_of": parts})) == parts, "where the summary says it"


def test_the_page_says_what_the_runs_are_and_needs_nothing_beside_itself(html: Path) -> None:
    text = html.read_text()
    for sentence in ("0.9500", "under way", "by &lt;magnitude&gt;", "pruning.sparsity", "2.13.0", "20.0", "nowhere"):
        assert sentence in text, sentence
    assert set(re.findall(r'\b(?:src|href)="([^":,]+[:,])', text)) == {"data:"}
    assert "<script" not in text
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 1 + 3 + 2, "curves, a heat map of each run, weights of those that have ended"
    assert all(matplotlib.image.imread(BytesIO(b64decode(each))).std() > 0.01 for each in images)


def test_histograms_are_those_of_all_weights_together(runs: list[str]) -> None:
    (axes,) = weights(read_runs(runs)[0]).axes
    matrices = [torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    every = torch.cat([each.flatten() for each in matrices]).numpy()
    edge = np.quantile(np.abs(every), 0.9995)
    for patch, kept in zip(axes.patches, (every, every[np.abs(every) > 0.5]), strict=True):
        expected, edges = np.histogram(kept, 120, (-edge, edge))
        found = patch.get_data()
        assert found.values.tolist() == expected.tolist()
        assert found.edges == pytest.approx(edges, abs=1e-5)


def test_picture_and_table_lie_beside_it(html: Path) -> None:
    assert matplotlib.image.imread(html.with_suffix(".png")).shape[:2] == (1080, 1320)
    with html.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 6
    assert [row["accuracy"] for row in rows if row["run"] == "a/run" and row["split"] == "validation"] == ["0.7", "0.9"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here; .ci/run installs it")
def test_a_browser_shows_it(html: Path, tmp_path: Path) -> None:
    """A script that only this test adds has the browser say what it has laid out."""
    asks = """<script>addEventListener("load", () => {
        const seen = [...document.querySelectorAll("section")].map(each => [each.id, each.innerText,
            [...each.querySelectorAll("img")].map(image => [image.naturalWidth, image.offsetHeight])]);
        document.body.innerHTML = "<pre id=seen></pre>";
        document.getElementById("seen").textContent = JSON.stringify(seen);
    })</script>"""
    page = tmp_path / "page.html"
    page.write_text(html.read_text().replace("</body>", f"{asks}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = ["chromium", *options, page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r'<pre id="seen">(.*)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-500:]
    plain = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    seen = {name: (text, images) for name, text, images in json.loads(plain)}
    assert list(seen) == ["results", "curves", "layers", "weights", "times", "configuration", "environment"]
    assert all(width > 0 and height > 50 for _, images in seen.values() for width, height in images)
    assert [len(images) for _, images in seen.values()] == [0, 1, 3, 2, 0, 0, 0]
    assert "by <magnitude>" in seen["results"][0]
    assert re.search(r"lr\.peak\s+0\.0001\s+0\.0002\s+0\.0001", seen["configuration"][0])


def test_names_are_shown_as_they_are_and_what_is_not_known_yet_is_not(runs: list[str]) -> None:
    first, _, under_way = read_runs(runs)
    figure = curves([replace(first, name="_$a$_$b$"), replace(under_way, name=r"\w$ \w$")])
    figure.draw_without_rendering()
    assert len(figure.legends[0].get_texts()) == 2
    assert figure.axes[0].get_title() == "accuracy on validation"
    assert times(under_way)["evaluations, checkpoints, export"] is None
    layers = {MATRIX: {"masked": 7, "weights": 10}}
    assert replace(first, metrics=[], summary={"layers": layers}).layers == {MATRIX: 0.7}


def test_the_curves_are_those_of_the_records(runs: list[str]) -> None:
    first, *_ = read_runs(runs)
    metric, losses, *others = curves([first]).axes
    steps = [10, 20, 30, 40]
    assert metric.lines[0].get_xydata().tolist() == [[20, 0.7], [40, 0.9]]
    parts = {1: "loss", 2: "task_loss"}
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[at, top / at] for at in steps] for top in parts]
    drawn = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in others}
    constant = {"sparsity": 0.5, "threshold of the score": 0.1, "learning rate": 1e-4, "examples/s": 16.0}
    assert drawn == {title: [[at, value] for at in steps] for title, value in constant.items()}


def test_no_model_is_downloaded_for_it(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(files, "snapshot_download", lambda name, **how: asked.update(how) or runs[0])
    first, *_ = read_runs(runs[:1])
    with pytest.raises(UserError):
        weights(replace(first, config=first.config | {"model.path": "someone/model"}))
    assert asked["local_files_only"]


def test_further_metrics_are_rows_of_the_results(runs: list[str]) -> None:
    first, *others = read_runs(runs)
    more = first.summary | {"metric_name": "accuracy", "final_metrics": {"accuracy": 0.5, "f1": 0.25}}
    every = [replace(first, summary=more), *others]
    assert _further(every) == [("f1 at the end", ["0.2500", *["-"] * len(others)])]
    assert ">f1 at the end<" in page(every, curves(every))


def test_a_summary_of_fewer_keys_is_shown_as_far_as_it_goes(runs: list[str]) -> None:
    first, *_ = read_runs(runs[:1])
    shown = page([replace(first, summary={"steps": 7})], curves([first]))
    assert ">7<" in shown


def test_what_is_no_run_is_refused(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given, html_name, sentence in (
        ([str(tmp_path)], "report.html", "is no run's directory, which has a config.yaml"),
        ([runs[0], runs[0]], "report.html", "allowed: each once"),
        (runs, "report.pdf", "allowed: a name that ends in .html"),
        (runs, "file/report.html", "cannot be written"),
        (runs, f"{runs[0]}/plot.html", "plot.png beside it is the run's own; allowed: another name"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            report.run(given, str(tmp_path / html_name))
