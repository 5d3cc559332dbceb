import json
import math
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from rich.console import Console

from distprune.analysis.components import Part, Place
from distprune.analysis.figures import draw_components
from distprune.config import Config
from distprune.errors import UserError
from distprune.models.card import model_card
from distprune.monitor import Monitor
from distprune.monitor.plots import layers_figure, main_metric, plot_run, save_png
from distprune.monitor.records import cpu_name, environment, read_metrics, write_json
from distprune.quickstart import Row, comparison_table


def train(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "split": "train", "lr": 1e-4 / step, "sparsity": 0.5} | values


def validation(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "split": "validation", "sparsity": 0.5, "accuracy": 0.8} | values


def write_lines(path: Path, lines: list[dict[str, Any] | str]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_what_a_run_logs_is_read_back(tmp_path: Path) -> None:
    with Monitor(tmp_path, Config(), total_steps=2, enabled=True) as monitor:
        monitor.log(train(1, loss=math.nan))
        monitor.log(validation(2))
    assert read_metrics(tmp_path / "metrics.jsonl") == [train(1) | {"loss": None}, validation(2)]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": "3"}\n{"step": 3, "split": "train", "note": "\xff"}\n')
    assert read_metrics(tmp_path / "metrics.jsonl")[2:] == [{"step": 3, "split": "train", "note": "\ufffd"}]


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    before = [train(10), train(20, loss=2.0), validation(20, accuracy=0.1), train(30), validation(30)]
    after = [train(20, loss=1.0), validation(20), train(25)]
    path = write_lines(tmp_path / "metrics.jsonl", [*before, '{"step": 31, "spl', *after])
    assert read_metrics(path) == [train(10), *after]


def test_a_line_that_nests_too_deep_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("[" * 200_000 + "\n" + '{"step": 1, "split": "train"}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train"}]


def test_a_picture_without_a_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*curves' has no suffix, .*; allowed: e\.g\. .*curves\.png"):
        save_png(Figure(), tmp_path / "curves")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl' does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def drawn(path: Path, metrics: list[dict[str, Any]], dense: float | None = 0.9, title: str = "run") -> bytes:
    plot_run(metrics, path, dense, title)
    return path.read_bytes()


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    odd = r"include=\w$,\w$"
    assert drawn(tmp_path / "a.png", [train(5), {**validation(10), odd: 0.5}], title=odd)
    layers_figure({odd: 0.5}).savefig(tmp_path / "layers.png")
    part = Part(Place("attention"), [], 1, 4, 2.0, 1.0, 1.0, 1.0, {0.5: 0.5})
    draw_components([part], 0.9, odd).savefig(tmp_path / "components.png")


def test_plot_has_its_size_and_shows_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    metrics = [train(5), validation(10, f1=0.7), train(15), validation(20, f1=0.7)]
    reference = drawn(path, metrics)
    assert matplotlib.image.imread(path).shape[:2] == (700, 1200)
    assert drawn(path, metrics) == reference, "the same data give the same file"

    changes = {
        "accuracy": drawn(path, [*metrics[:3], validation(20, accuracy=0.7)]),
        "sparsity": drawn(path, [train(5, sparsity=0.1), *metrics[1:]]),
        "learning rate": drawn(path, [train(5, lr=1e-3), *metrics[1:]]),
        "epoch": drawn(path, [*metrics[:3], validation(20, epoch=4.0)]),
        "dense": drawn(path, metrics, dense=0.85),
        "no dense": drawn(path, metrics, dense=None),
        "title": drawn(path, metrics, title="other"),
    }
    assert not [name for name, image in changes.items() if image == reference]
    assert len(set(changes.values())) == len(changes)

    second_metric = [*metrics[:3], validation(20, f1=0.2)]
    assert drawn(path, second_metric) == reference, "the main metric is the first one"


def test_the_main_metric_is_the_first_also_where_it_was_not_finite_at_first() -> None:
    first, second = (
        {"step": step, "split": "validation", "perplexity": perplexity, "nll": nll}
        for step, perplexity, nll in ((10, None, 800.0), (20, 3.0, 1.1))
    )
    assert main_metric([first, second]) == "perplexity"
    assert main_metric([first]) == "nll"


@pytest.mark.parametrize(
    "metrics",
    [[train(5)], [validation(10)], [train(5, lr=None), validation(10, accuracy=None)]],  # type: ignore[arg-type]
    ids=["train only", "validation only", "nothing finite"],
)
def test_a_short_run_is_drawn_too(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    drawn(tmp_path / "plot.png", metrics, dense=None)
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[:2] == (700, 1200)


def bert(layers: int) -> dict[str, float]:
    kinds = ("attention.self.query", "attention.self.key", "intermediate.dense", "output.dense")
    return {f"bert.encoder.layer.{n}.{kind}.weight": 0.9 - n / 50 for n in range(layers) for kind in kinds}


def layer_image(path: Path, sparsity_by_name: dict[str, float]) -> Any:
    layers_figure(sparsity_by_name).savefig(path)
    return matplotlib.image.imread(path)


def test_layers_are_drawn_by_kind_and_the_rest_as_bars(tmp_path: Path) -> None:
    path = tmp_path / "layers.png"
    reference = layer_image(path, bert(12))
    assert layer_image(path, bert(12) | {"bert.encoder.layer.3.output.dense.weight": 0.1}).tobytes() != (
        reference.tobytes()
    )
    assert layer_image(path, bert(11)).shape == reference.shape, "a layer is a column"
    assert layer_image(path, bert(36)).shape[1] > reference.shape[1], "many layers stay readable"
    other_kind = {"bert.encoder.layer.0.attention.self.value.weight": 0.9}
    assert layer_image(path, bert(12) | other_kind).shape[0] > reference.shape[0], "a kind is a row"
    assert layer_image(path, bert(12) | {"classifier.weight": 0.5}).shape[0] > reference.shape[0]
    only_bars = layer_image(path, {"pooler.dense.weight": 0.3, "classifier.weight": 1.0})
    assert only_bars.shape[0] < reference.shape[0]


def test_table_shows_counts_and_sparsity() -> None:
    rows = [Row("dense", 0.861, 0, 0, 312), Row("pruned", 0.8193, 9_000, 10_000, 9_001, "last state")]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison_table(rows, "macro_f1"))
    text = capture.get()
    for shown in ("macro f1", "0.8193", "90.00%", "9,000 / 10,000", "9,001", "last state", "0.8610"):
        assert shown in text


def git(directory: Path, *command: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", *identity, *command], cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_environment_names_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None

    git(tmp_path, "init", "-q")
    assert environment()["git"] is None, "no commit yet"
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "m")
    git(tmp_path, "tag", "v1")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert environment()["git"] == revision
    (tmp_path / "file").write_text("b")
    assert environment()["git"] == f"{revision}-dirty"

    monkeypatch.setenv("PATH", "")
    found = environment()
    assert found["git"] is None, "no git installed"
    assert set(found) == {
        "distprune",
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "python",
        "device",
        "git",
    }
    assert all(found[name] for name in found if name != "git")


def test_a_cpu_is_named_by_its_model_and_what_it_computes_bf16_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    core = "model name\t: A CPU\nflags\t: fpu amx_bf16 avx512_bf16\n"
    assert cpu_name(core * 2) == "A CPU, 2 cores (AVX512, amx_bf16, avx512_bf16)"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"b": 1, "a": [math.nan]})
    assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    null\n  ]\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"b": 1, "a": [None]}
    write_json(path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


KIND = ("AutoModelForSequenceClassification", "text-classification")
SUMMARY = {
    "base_model": "google-bert/bert-base-uncased",
    "teacher": "someone/teacher",
    "task": "nyu-mll/glue",
    "metric_name": "matthews",
    "final_metric": 0.5812,
    "dense_metric": 0.6021,
    "method": "gradual pruning of single weights by magnitude",
    "sparsity_masked": 0.9,
    "masked_weights": 9_000,
    "prunable_weights": 10_000,
    "zeros_in_file": 9_001,
    "encoder_sparsity": 0.8999,
    "model_sparsity": 0.6987,
}


def test_model_card_is_valid_for_the_hub() -> None:
    card = ModelCard(model_card(SUMMARY, *KIND))
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.datasets == ["nyu-mll/glue"]
    assert card.data.tags == ["pruned", "distprune"]
    assert card.data.metrics == ["matthews_correlation"]
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.model_name == "bert-base-uncased-pruned"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("matthews_correlation", 0.5812)
    assert (result.dataset_type, result.task_type) == ("nyu-mll/glue", "text-classification")
    for shown in (
        "0.5812 (dense: 0.6021)",
        "9,000 of 10,000 (90.00%)",
        "9,001",
        "89.99%",
        "69.87%",
        "distilled from `someone/teacher`",
        "AutoModelForSequenceClassification.from_pretrained",
    ):
        assert shown in card.text


def test_model_card_of_a_dense_model_tells_of_no_pruning() -> None:
    card = ModelCard(model_card(SUMMARY | {"masked_weights": 0, "prunable_weights": 0, "zeros_in_file": 0}, *KIND))
    assert card.data.tags == ["distprune"]
    assert card.data.model_name == "bert-base-uncased-fine-tuned"
    assert "0.5812" in card.text
    for word in ("pruned", "sparsity", "magnitude"):
        assert word not in card.text


def test_model_card_of_local_files_names_no_machine(tmp_path: Path) -> None:
    for name in ("teacher/final", "sst2/train.jsonl"):
        (tmp_path / name).mkdir(parents=True)
    local = {
        "base_model": str(tmp_path / "teacher" / "final"),
        "teacher": None,
        "task": str(tmp_path / "sst2" / "train.jsonl"),
        "dense_metric": None,
    }
    content = model_card(SUMMARY | local, auto_class="AutoModelForQuestionAnswering", task_type="question-answering")
    card = ModelCard(content)
    assert str(tmp_path) not in content
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.eval_results[0].dataset_name == "sst2/train.jsonl"
    assert card.data.eval_results[0].task_type == "question-answering"
    assert "distilled" not in card.text
    assert "dense:" not in card.text
    assert "import AutoModelForQuestionAnswering" in card.text


def test_a_directory_that_looks_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert ModelCard(model_card(SUMMARY | {"base_model": "models/mine"}, *KIND)).data.base_model is None
