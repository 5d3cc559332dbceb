"""Mistakes and accidents: one sentence on every rank, before any step where it can be known, and nothing saved."""

import contextlib
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, MPNetConfig, MPNetForSequenceClassification

from distprune import dist
from distprune.errors import UserError
from distprune.monitor import Monitor
from distprune.pruning.pruner import Pruner
from distprune.training.setup import prepare
from tests.distributed.engines import write_model
from tests.distributed.runs import DENSE, RATE, TAUGHT, FullDisk, OnLastRank, run, run_patched, stage
from tests.distributed.test_not_finite import poison_weights
from tests.world import Worlds

LAYER = "bert.encoder.layer.1.output.dense"
MISTAKES: dict[str, tuple[str, str]] = {
    "missing file": ("task.train=gone.jsonl", "gone.jsonl does not exist"),
    "missing model": ("model.path=gone/", "'gone/' is not a directory"),
    "missing teacher": ("teacher.path=gone/; {taught}", "'gone/' is not a directory"),
    "wrong column": ("task.text=[sentense]", "did you mean 'sentence'?"),
    "label out of range": ("task.validation={root}/range.jsonl", "label 2 in column 'label'"),
    "empty split": ("task.validation={root}/empty.jsonl", "empty.jsonl"),
    "sparsity": ("pruning.sparsity=1.0", "pruning.sparsity is 1.0; allowed: at least 0 and less than 1"),
    "schedule": ("pruning.end=25 steps", "pruning.end is '25 steps', step 25 of 24"),
    "regex that matches nothing": ("pruning.include=[nothing]", "'nothing' matches no parameter"),
    "batch that ranks cannot split": ("train.batch_size=13", "must be a multiple of the 2 ranks"),
    "fewer examples than a batch": ("train.batch_size=200", "only 96 training examples"),
    "warm-up": ("lr.warmup=9 steps", "lr.warmup is '9 steps'"),
    "target that is frozen": ("model.freeze=[encoder]", "model.freeze keeps it fixed"),
    "nothing left to train": ("model.freeze=['.*']", "model.freeze is ['.*'], which matches every parameter"),
    "checkpointing that the model cannot do": (
        "model.path={root}/mpnet; model.activation_checkpointing=true",
        "model.activation_checkpointing is True; allowed: false for a MPNetForSequenceClassification",
    ),
    "model's configuration": ("model.path={root}/no-config", "no-config/config.json is not a model's configuration"),
    "teacher's configuration": (
        "teacher.path={root}/no-config; {taught}",
        "no-config/config.json is not a model's configuration",
    ),
    "task": ("task.name=poetry", "task.name 'poetry' is unknown"),
    "metric": ("task.metrics=[pearson]", "metric 'pearson' does not suit classification"),
    "teacher's label count": ("teacher.path={root}/three-labels; {taught}", "the teacher has 3 labels and the task 2"),
    "model's order of labels": ("model.path={root}/turned; task.labels=[no,yes]", "labels are in the order yes, no"),
    "teacher's tokenizer": ("teacher.path={root}/other-words; {taught}", "the teacher's vocabulary"),
    "option of DeepSpeed": (
        "deepspeed.student.zero_optimisation.stage=3",
        "option of deepspeed.student 'zero_optimisation' is unknown (did you mean 'zero_optimization'?)",
    ),
    "option within DeepSpeed's": (
        "deepspeed.student.zero_optimization.reduce_bucket_sizes=5",
        "option of deepspeed.student.zero_optimization 'reduce_bucket_sizes' is unknown (did you mean",
    ),
    "layout that is not known, in a dense run": (
        "deepspeed.student.zero_optimization.zero_hpz_partition_size=2; pruning.sparsity=0",
        "zero_hpz_partition_size is not supported",
    ),
    "tokenizer larger than the embeddings": ("model.tokenizer={root}/more-words", "up to the model's vocab_size"),
    "example longer than the positions": ("model.path={root}/few-positions", "up to the model's 8"),
    "example longer than the teacher's positions": (
        "teacher.path={root}/few-positions; {taught}",
        "up to the model's 8",
    ),
    "model without its tokenizer": (
        "model.path={root}/no-words",
        "no-words' gives no tokenizer: it has special tokens alone, as where the directory lacks the tokenizer's files",
    ),
    "tokenizer": ("model.tokenizer={root}/gone", "gone' gives no tokenizer: "),
    "home of nobody": ("train.output=~nobody.here/run", "'~nobody.here/run' begins with a home that is not known"),
    "run directory that is a file": ("train.output={root}/range.jsonl", "is a file; allowed: a new or empty directory"),
    "run directory on a disk that is read-only": ("train.output=/sys/run", "'/sys/run' cannot be written"),
    "row without text": ("task.train={root}/no-text.jsonl", "have no value in column 'sentence': row 2; allowed: none"),
    "row that is no text": ("task.train={root}/no-unicode.jsonl", "surrogate pair in string is invalid. in row 1"),
    "run directory in use": ("train.output={root}", "is not empty"),
}


@pytest.fixture(scope="module")
def mistaken(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with data and teachers that do not fit."""
    root = tmp_path_factory.mktemp("mistaken")
    (root / "empty.jsonl").touch()
    (root / "range.jsonl").write_text('{"sentence": "a film", "label": 2}\n')
    good = '{"sentence": "a film", "label": 1}\n'
    (root / "no-text.jsonl").write_text(good + '{"sentence": null, "label": 0}\n')
    (root / "no-unicode.jsonl").write_text(good + r'{"sentence": "\ud800", "label": 0}' + "\n")
    write_model(root / "three-labels", num_labels=3)
    write_model(root / "turned", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    words = AutoTokenizer.from_pretrained(task / "model")
    words.add_tokens(["another"])
    write_model(root / "other-words")
    words.save_pretrained(root / "other-words")
    words.save_pretrained(root / "more-words")
    for path in write_model(root / "no-words").glob("*token*"):
        path.unlink()
    write_model(root / "few-positions", max_position_embeddings=8)
    write_model(root / "no-config")
    (root / "no-config" / "config.json").write_text('{"hidden_size": 10}')
    AutoTokenizer.from_pretrained(task / "model").save_pretrained(root / "mpnet")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    MPNetForSequenceClassification(MPNetConfig(vocab_size=len(words), **sizes)).save_pretrained(root / "mpnet")
    return root


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_on_every_rank_before_any_step(
    world: Worlds, task: Path, mistaken: Path, tmp_path: Path, kind: str
) -> None:
    override, part = MISTAKES[kind]
    first, second = world(2).run(
        run, task, tmp_path / "run", *override.format(root=mistaken, taught=TAUGHT[0]).split("; ")
    )
    assert isinstance(first, str), "the run went through"
    assert first == second
    assert part.format(root=mistaken) in first
    assert "\n" not in first
    assert not (tmp_path / "run").exists(), "the corrected run may have its directory"


def differing_mistake(kind: type[Exception]) -> str:
    """Make one mistake on the last rank alone."""

    def action() -> int:
        if dist.detect().rank == dist.detect().size - 1:
            raise kind("here")
        return 1

    try:
        return str(dist.agree(action))
    except UserError as error:
        return str(error)
    except ZeroDivisionError:
        return "its own"


def test_a_mistake_that_one_rank_finds_stops_all(world: Worlds) -> None:
    assert world(2).run(differing_mistake, UserError) == ["here", "here"]
    assert world(2).run(differing_mistake, ZeroDivisionError) == ["rank 1 failed: ZeroDivisionError('here')", "its own"]


def run_on_other_data(task: Path, output: Path, other: Path) -> str:
    """Run with other training data on the last rank, as on a node with an old copy."""
    last = dist.detect().rank == dist.detect().size - 1
    return str(run(task, output, *([f"task.train={other}"] if last else [])))


@pytest.mark.parametrize(
    ("kept", "part"), [(90, "examples on rank 0 are (96, 61), and on rank 1 (90, 61)"), (96, "fing")]
)
def test_ranks_that_read_other_data_are_refused(
    world: Worlds, task: Path, tmp_path: Path, kept: int, part: str
) -> None:
    lines = (task / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(reversed(lines[:kept])))
    said = world(2).run(run_on_other_data, task, tmp_path / "run", tmp_path / "other.jsonl")
    assert len(set(said)) == 1
    assert part in said[0]


def run_with_another_seed(task: Path, output: Path) -> str:
    """Run with a configuration that was edited while the ranks started."""
    last = dist.detect().rank == dist.detect().size - 1
    return str(run(task, output, *(["train.seed=7"] if last else [])))


def test_ranks_with_other_configurations_are_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(run_with_another_seed, task, tmp_path / "run")
    assert len(set(said)) == 1
    first, second = said[0].split("and on rank 1")
    assert first.startswith("the settings on rank 0 are ...")
    assert "seed=42" in first
    assert "seed=7" in second
    assert len(said[0]) < 300


class TakenMeanwhile:
    """Stands in for `prepare`: another run takes the directory while this one loads its model."""

    def __init__(self, output: Path):
        self.output = output

    def __call__(self, config: Any, checkpoint: Any) -> Any:
        prepared = prepare(config, checkpoint)
        if dist.is_main():
            self.output.mkdir()
            (self.output / "config.yaml").write_text("another run's")
        return prepared


def test_of_two_runs_with_one_directory_the_second_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    target = "distprune.commands.train.prepare"
    said = world(2).run(run_patched, target, TakenMeanwhile(output), task, output)
    assert len(set(said)) == 1
    assert "is another run's by now; allowed: a new or empty directory" in said[0]
    assert (output / "config.yaml").read_text() == "another run's"


def run_in_a_folder_of_its_own(task: Path, root: Path) -> str:
    """Run where each rank has a disk of its own. Collective."""
    folder = root / str(dist.detect().rank)
    (folder / "run").mkdir(parents=True)
    if dist.detect().rank == 1:  # what a first try has left, of which this node had rank 0
        for name in ("config.yaml", ".lock"):
            (folder / "run" / name).write_text("process 1 on another")
    with contextlib.chdir(folder):
        return str(run(task, Path("run")))


def test_a_run_directory_that_nodes_do_not_share_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(run_in_a_folder_of_its_own, task, tmp_path)
    assert len(set(said)) == 1
    assert "train.output 'run' is not one folder for all nodes; allowed: on a shared disk" in said[0]
    assert not list(tmp_path.rglob("step-*"))


def test_a_model_that_cannot_be_written_stops_every_rank(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(run_patched, "distprune.models.export.save", FullDisk(0), task, tmp_path / "run")
    assert len(set(said)) == 1
    assert "model.safetensors' cannot be written: [Errno 28] No space left on device" in said[0]


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_run_that_failed_in_its_last_second_ends_with_its_best_state(
    world: Worlds, task: Path, tmp_path: Path
) -> None:
    output, options = tmp_path / "run", ("train.select=best",)
    said = world(1).run(run_patched, "distprune.commands.train.plot_run", full_disk, task, output, *options)
    assert "No space left" in said[0]
    best = load_file(output / "final" / "model.safetensors")
    summary = world(1).run(run, task, output, *options)[0]
    again = load_file(output / "final" / "model.safetensors")
    assert all((again[name] == best[name]).all() for name in best)
    assert summary["steps"] == 24
    assert not (output / "best").exists()


class SlowMonitor(Monitor):
    """A monitor that takes its time to close, as wandb may."""

    def __exit__(self, *arguments: Any) -> None:
        if dist.is_main():
            time.sleep(2)
        super().__exit__(*arguments)


def refused_at(task: Path, output: Path) -> tuple[str, float]:
    with patch(RATE, OnLastRank(poison_weights)):
        said = run_patched("distprune.commands.train.Monitor", SlowMonitor, task, output, *DENSE)
    return said, time.monotonic()


def test_no_rank_ends_before_rank_0_can_speak(world: Worlds, task: Path, tmp_path: Path) -> None:
    """A launcher ends all ranks as soon as one has failed."""
    (said, first), (_, second) = world(2).run(refused_at, task, tmp_path / "run")
    assert "is not finite" in said
    assert abs(first - second) < 1


def step_without_masking(pruner: Pruner, *_: Any) -> None:
    """Stands in for the pruner's hook: takes note of the step, and zeroes nothing."""
    pruner.carried = True


def run_without_masking(task: Path, output: Path, *options: str) -> str:
    """Run with the hook that keeps pruned weights zero switched off."""
    try:
        run_patched(
            "distprune.pruning.pruner.Pruner._after_optimizer_step", step_without_masking, task, output, *options
        )
    except AssertionError as error:
        return str(error)
    return "the run went through"


@pytest.mark.parametrize("options", [(), ("checkpoint.epochs=false",)], ids=["in a checkpoint", "at the end"])
def test_a_pruned_weight_that_came_back_is_never_saved(
    world: Worlds, task: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    said = world(2).run(run_without_masking, task, tmp_path / "run", *options)
    assert all("came back" in sentence for sentence in said)
    assert not (tmp_path / "run" / "final").exists()
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def unsupported(_: Any) -> bool:
    return False


def test_a_type_that_the_device_cannot_do_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    target = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported"
    option = "deepspeed.student.fp16.enabled=true"
    said = world(2).run(run_patched, target, unsupported, task, tmp_path / "run", option, *stage(2, 0))
    assert len(set(said)) == 1
    assert "deepspeed.student.fp16.enabled is True, which this cpu does not support; allowed: float32, " in said[0]
