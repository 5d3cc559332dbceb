"""Whole runs on real ranks: the loss, the evaluation, what is chosen and what is written."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import correlation
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from distprune import dist, settings
from distprune.commands.train import _write_reports as write_reports
from distprune.engines.batches import train_batches
from distprune.engines.build import build_frozen
from distprune.engines.evaluate import evaluate
from distprune.tasks.metrics import measure
from distprune.training.setup import load_task, local_model
from tests.distributed.engines import write_model
from tests.distributed.runs import DENSE, TAUGHT, VALIDATION, records, run, run_patched, stage
from tests.world import Worlds, by_world


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in records(output, "train")]


# ------------------------------------------------------------------------------ the loss

STEPS = 50
FIFTY = ("train.epochs=6.25", "lr.rewind_every=null", "lr.warmup=5 steps", "lr.final=0", "train.eval_every=50 steps")


def plain_losses(task: Path, betas: tuple[float, float], eps: float, decay: float) -> list[float]:
    """Fine-tune by a plain PyTorch loop: the same batches and learning rates, nothing else of distprune's."""
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    model = AutoModelForSequenceClassification.from_pretrained(task / "model").train()
    kept = {n for n, _ in model.named_parameters() if n.endswith(".bias") or "LayerNorm" in n}  # from decay
    groups = [[each for n, each in model.named_parameters() if (n in kept) == is_kept] for is_kept in (True, False)]
    decays = [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": decay}]
    optimizer = torch.optim.AdamW(decays, lr=1e-3, betas=betas, eps=eps)
    lengths = [len(tokenizer(row["sentence"])["input_ids"]) for row in rows]
    batches = [batch for epoch in range(7) for batch in train_batches(lengths, 12, 42, epoch).tolist()][:STEPS]
    found = []
    for step, batch in enumerate(batches):
        rate = 1e-3 * (step / 5 if step < 5 else (STEPS - step) / (STEPS - 5))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = tokenizer([rows[index]["sentence"] for index in batch], padding=True, return_tensors="pt")
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = cross_entropy(logits, torch.tensor([rows[index]["label"] for index in batch]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.slow
def test_without_pruning_the_loss_curve_is_that_of_a_plain_loop(world: Worlds, task: Path, tmp_path: Path) -> None:
    expected = plain_losses(task, (0.9, 0.999), 1e-8, 0.0)
    assert min(expected) < 0.8 * expected[0], "the loss must move"
    world(1).run(run, task, tmp_path / "one", *DENSE, *FIFTY, *stage(0))
    assert losses(tmp_path / "one") == pytest.approx(expected, rel=1e-5)
    for number in range(4):
        output = tmp_path / f"stage{number}"
        world(2).run(run, task, output, *DENSE, *FIFTY, *stage(number))
        assert losses(output) == pytest.approx(expected, rel=1e-5), f"stage {number}"


@pytest.mark.slow
def test_the_optimizers_options_are_those_of_a_plain_loop(world: Worlds, task: Path, tmp_path: Path) -> None:
    expected = plain_losses(task, (0.8, 0.9), 1e-3, 0.3)
    options = ("optimizer.betas=[0.8,0.9]", "optimizer.eps=1e-3", "optimizer.weight_decay=0.3")
    world(2).run(run, task, tmp_path / "run", *DENSE, *FIFTY, *options, *stage(2))
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_pruned_and_distilled_run_is_the_same_at_every_world_and_stage(
    world: Worlds, task: Path, tmp_path: Path, size: int
) -> None:
    world(1).run(run, task, tmp_path / "one", *TAUGHT, *stage(0, 0))
    expected = losses(tmp_path / "one")
    thresholds = [record["threshold"] for record in records(tmp_path / "one", "train")]
    for student, teacher in ((0, 0), (1, 3), (2, 3), (3, 3)):
        output = tmp_path / f"{student}-{teacher}"
        world(size).run(run, task, output, *TAUGHT, *stage(student, teacher))
        assert losses(output) == pytest.approx(expected, rel=1e-4)
        assert [record["threshold"] for record in records(output, "train")] == pytest.approx(thresholds, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_and_activation_checkpointing_change_nothing(
    world: Worlds, task: Path, tmp_path: Path, size: int
) -> None:
    for number, student in enumerate((1, 2, 3)):
        plain, other = tmp_path / f"plain{number}", tmp_path / f"other{number}"
        options = (*stage(student), "train.batch_size=24", "pruning.end=8 steps", *TAUGHT * (student == 2))
        world(size).run(run, task, plain, *options)
        world(size).run(run, task, other, *options, "train.accumulation=2", "model.activation_checkpointing=true")
        assert losses(other) == pytest.approx(losses(plain), rel=1e-4)


@pytest.fixture(scope="module")
def as_configured(world: Worlds, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Return the directory of a run on two ranks with a teacher, and what it returned on each."""
    output = tmp_path_factory.mktemp("as-configured") / "run"
    return output, world(2).run(run, task, output, *TAUGHT)


def test_the_learning_rate_and_the_sparsity_are_those_of_the_plan(as_configured: tuple[Path, list[Any]]) -> None:
    lines = records(as_configured[0], "train")
    assert [line["step"] for line in lines] == list(range(1, 25))
    cycle = [1e-3 * (1 - n / 8) + 1e-6 * n / 8 for n in range(8)]
    assert [line["lr"] for line in lines] == pytest.approx(cycle * 3)
    cubic = [0.9 - 0.4 * (1 - n / 3) ** 3 for n in range(4)]
    expected = [0.0] * 4 + [each for each in cubic for _ in range(4)] + [0.9] * 4
    assert [line["sparsity"] for line in lines] == pytest.approx(expected, abs=1e-3)
    assert all(a["threshold"] <= b["threshold"] for a, b in zip(lines[:16], lines[4:20], strict=True))
    for line in lines:
        mixed = 0.5 * line["task_loss"] + 0.5 * line["distillation_loss"]
        assert line["loss"] == pytest.approx(mixed, rel=1e-5)
    assert lines[0]["distillation_loss"] == pytest.approx(0, abs=1e-6), "the student is its own teacher at first"
    assert lines[-1]["distillation_loss"] > 1e-3


# ------------------------------------------------------------------------------ evaluation


def measured(task: Path, *overrides: str) -> dict[str, float]:
    metrics = "task.metrics=[accuracy,macro_f1,matthews]"
    config = settings.load_valid(str(task / "run.yaml"), [metrics, *overrides])
    directory = local_model(config.model.path, None)
    data = load_task(config, directory)
    section = config.deepspeed.teacher
    engine = build_frozen(section, directory, data.auto_class, data.model_options(), 4)
    seen: list[int] = []

    def counting(logits: torch.Tensor, rows: Dataset) -> dict[str, float]:
        labels = torch.tensor(rows["label"][:])
        seen.append(len(labels))
        return {**measure(data.metric_names, logits, labels, regression=False), "sum": float(logits.double().sum())}

    data.metrics = counting  # type: ignore[method-assign]
    found = evaluate(engine, data, 4)
    assert seen == [VALIDATION] * dist.is_main()
    engine.destroy()
    return found


@by_world
def test_evaluation_is_the_same_at_every_world_size(world: Worlds, task: Path, size: int) -> None:
    rows = [json.loads(line) for line in (task / "validation.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    model = AutoModelForSequenceClassification.from_pretrained(task / "model").eval()
    with torch.no_grad():
        logits = torch.cat([model(tokenizer(row["sentence"], return_tensors="pt")["input_ids"]).logits for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    expected = measure(["accuracy", "macro_f1", "matthews"], logits, labels, regression=False)
    for found in world(size).run(measured, task):
        assert found.pop("sum") == pytest.approx(float(logits.double().sum()), rel=1e-4)
        assert found == expected


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_even_the_rounding_of_an_evaluation_is_the_same(world: Worlds, task: Path, size: int, number: int) -> None:
    """In bf16 a logit depends on the padding of its batch: another batch, another accuracy."""
    options = ("deepspeed.teacher.bf16.enabled=true", *stage(2, number))
    (alone,) = world(1).run(measured, task, *options)
    assert world(size).run(measured, task, *options) == [alone] * size


# ------------------------------------------------------------------------------ what is chosen


class Falling:
    """Stands in for an evaluation whose metric falls at each call, so that a dense state looks best."""

    def __init__(self, values: list[float]):
        self.values = values

    def __call__(self, *_: Any) -> dict[str, float]:
        return {"accuracy": self.values.pop(0)}


def test_only_states_at_the_target_sparsity_are_chosen(world: Worlds, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # The target is reached at step 16, so the evaluations after steps 20 and 24 are the first that may be chosen.
    values = [0.95, 0.9, 0.85, 0.8, 0.6, 0.5]
    options = ("train.select=best",)
    summary, _ = world(2).run(run_patched, "distprune.training.train.evaluate", Falling(values), task, output, *options)
    assert (summary["final_step"], summary["final_metric"]) == (20, 0.6)
    assert summary["masked_weights"] == summary["zeros_in_file"] == math.floor(0.9 * summary["prunable_weights"])
    assert not (output / "best").exists()


def test_patience_starts_at_the_target(world: Worlds, task: Path, tmp_path: Path) -> None:
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    options = ("train.patience=2", "train.select=best", "train.epochs=4.5")
    summary, _ = world(2).run(
        run_patched, "distprune.training.train.evaluate", Falling(values), task, tmp_path / "run", *options
    )
    assert summary["steps"] == 28, "best at step 20, two evaluations without a better one"
    assert summary["final_step"] == 20


# ------------------------------------------------------------------------------ what is written


def test_a_run_directory_holds_what_was_promised(task: Path, as_configured: tuple[Path, list[Any]]) -> None:
    output, (summary, other) = as_configured
    assert other == {}
    assert json.loads((output / "summary.json").read_text()) == summary
    names = {"config.yaml", "metrics.jsonl", "summary.json", "final", "plot.png", "layers.png", "checkpoints", ".lock"}
    assert {path.name for path in output.iterdir()} == names
    assert settings.load(str(output / "config.yaml"), []) == settings.load(
        str(task / "run.yaml"), [f"train.output={output}", *TAUGHT]
    )

    assert summary["masked_weights"] == math.floor(0.9 * summary["prunable_weights"])
    assert summary["sparsity_masked"] == summary["masked_weights"] / summary["prunable_weights"]
    tensors = load_file(output / "final" / "model.safetensors")
    zeros = {name: int((tensor == 0).sum()) for name, tensor in tensors.items()}
    matrices = [name for name in zeros if ".encoder.layer." in name and tensors[name].dim() == 2]
    assert summary["zeros_in_file"] == sum(zeros[name] for name in matrices)
    assert summary["encoder_weights"] == sum(tensors[name].numel() for name in matrices)
    assert summary["model_weights"] == sum(tensor.numel() for tensor in tensors.values())
    assert summary["model_sparsity"] == sum(zeros.values()) / summary["model_weights"]
    assert summary["stored_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert summary["packed_bytes"] < summary["stored_bytes"]
    assert summary["zero_stage"] == {"student": 2, "teacher": 3}
    assert (summary["world_size"], len(summary["bytes_per_rank"]["teacher"])) == (2, 2)
    assert {"torch", "deepspeed", "transformers", "git", "device"} <= summary["environment"].keys()
    parts = ["training steps", "evaluations", "prunings", "checkpoints", "writing models"]
    assert list(summary["seconds_of"]) == parts
    assert sum(summary["seconds_of"].values()) == pytest.approx(summary["wall_time_s"], abs=0.3)
    assert summary["score_gradients"] == 0

    record = json.loads((output / "final" / "pruning.json").read_text())
    assert record["masked_weights"] == sum(layer["masked"] for layer in record["layers"].values())
    assert record["pruning"]["sparsity"] == 0.9
    card = (output / "final" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    last = records(output, "validation")[-1]
    assert last["accuracy"] == summary["final_metric"]
    layers = {name: value for name, value in last.items() if name.startswith("sparsity/")}
    assert layers.keys() == {f"sparsity/{name}" for name in matrices}
    assert {"examples_per_s", "memory_mib", "grad_norm", "threshold"} <= records(output, "train")[0].keys()


def slow_reports(*arguments: Any) -> None:
    """Stand in for the last files that rank 0 writes, on a slow disk."""
    time.sleep(3)
    write_reports(*arguments)


def files_at_return(task: Path, output: Path) -> bool:
    run_patched("distprune.commands.train._write_reports", slow_reports, task, output)
    return (output / "summary.json").exists()


@pytest.mark.slow
def test_no_rank_returns_before_everything_is_written(world: Worlds, task: Path, tmp_path: Path) -> None:
    """A launcher may end all ranks as soon as one has ended."""
    assert world(2).run(files_at_return, task, tmp_path / "run") == [True, True]


@pytest.mark.slow
def test_transformers_alone_loads_the_result(as_configured: tuple[Path, list[Any]], tmp_path: Path) -> None:
    final = as_configured[0] / "final"
    code = f"""
import sys
import time
sys.modules["distprune"] = None  # an import of it would fail
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained({str(final)!r})
tokenizer = AutoTokenizer.from_pretrained({str(final)!r})
print(model(**tokenizer("the film was superb .", return_tensors="pt")).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([1, 2])"


def test_without_hardness_no_teacher_is_loaded(world: Worlds, task: Path, tmp_path: Path) -> None:
    summary, _ = world(2).run(run, task, tmp_path / "run", "teacher.path=no/such/model")
    assert summary["teacher"] is None
    assert "teacher" not in summary["bytes_per_rank"]
    assert summary["dense_metric"] == records(tmp_path / "run", "validation")[0]["accuracy"], "the student's, dense"


@pytest.mark.slow
def test_a_regression_keeps_its_best_state_and_a_wandb_run(world: Worlds, task: Path, tmp_path: Path) -> None:
    """The score is a sentence's length, which a small model can learn a little of."""
    for name in ("train", "validation"):
        rows = [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]
        scored = [{"sentence": row["sentence"], "score": len(row["sentence"]) / 50} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    teacher = write_model(tmp_path / "teacher", num_labels=1, hidden_size=16, intermediate_size=24)
    options = [f"task.{name}={tmp_path}/{name}.jsonl" for name in ("train", "validation")]
    options += ["task.regression=true", "task.label=score", "task.metrics=[pearson,spearman]", "wandb.mode=offline"]
    options += [f"model.path={teacher}", f"teacher.path={teacher}", "distillation.hardness=0.1"]
    options += ["train.select=best", "train.patience=1", "train.epochs=5"]
    summary, _ = world(2).run(run, task, tmp_path / "run", *options)
    kept = {line["step"]: line["pearson"] for line in records(tmp_path / "run", "validation") if line["step"] > 16}
    assert summary["final_metric"] == max(kept.values()) == kept[summary["final_step"]]
    assert summary["zeros_in_file"] == math.floor(0.9 * summary["prunable_weights"])

    final = tmp_path / "run" / "final"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    with torch.no_grad():
        said = [float(model.eval()(**tokenizer(row["sentence"], return_tensors="pt")).logits) for row in scored]
    assert summary["final_metric"] == pytest.approx(correlation(said, [row["score"] for row in scored]), abs=1e-4)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1, "one run, of rank 0"


@pytest.mark.slow
def test_bf16_and_offload_run_to_the_target(world: Worlds, task: Path, tmp_path: Path) -> None:
    offload = "deepspeed.student.zero_optimization.offload_optimizer.device=cpu"
    bf16 = ("deepspeed.student.bf16.enabled=true", "deepspeed.teacher.bf16.enabled=true")
    for number, options in enumerate(([*bf16, *stage(3)], [offload, *stage(2)], [*bf16, offload, *stage(3)])):
        summary, _ = world(2).run(run, task, tmp_path / f"run{number}", *TAUGHT, *options)
        assert summary["zeros_in_file"] == math.floor(0.9 * summary["prunable_weights"])
        assert all(math.isfinite(loss) for loss in losses(tmp_path / f"run{number}"))
