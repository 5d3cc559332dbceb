"""Mistakes and accidents: one sentence on every rank, before any step where it can be known, and nothing saved."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MPNetConfig, MPNetForSequenceClassification

from distprune import dist
from distprune.engine import set_learning_rate
from distprune.errors import UserError
from distprune.evaluate import forward
from distprune.pruning.pruner import Pruner
from distprune.shards import shards_of
from tests.distributed.engines import write_model
from tests.distributed.runs import DENSE, run, run_patched, stage
from tests.world import Worlds

LAYER = "bert.encoder.layer.1.output.dense"
MISTAKES: dict[str, tuple[str, str]] = {
    "missing file": ("task.train=gone.jsonl", "gone.jsonl does not exist"),
    "missing model": ("model.path=gone/", "'gone/' is not a directory"),
    "missing teacher": ("teacher.path=gone/", "'gone/' is not a directory"),
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
        "model.path={root}/mpnet; teacher.path={root}/mpnet; model.activation_checkpointing=true",
        "model.activation_checkpointing is True; allowed: false for a MPNetForSequenceClassification",
    ),
    "model's configuration": ("model.path={root}/no-config", "no-config/config.json is not a model's configuration"),
    "teacher's configuration": (
        "teacher.path={root}/no-config",
        "no-config/config.json is not a model's configuration",
    ),
    "task": ("task.name=poetry", "task.name 'poetry' is unknown"),
    "metric": ("task.metrics=[pearson]", "metric 'pearson' does not suit classification"),
    "teacher's label count": ("teacher.path={root}/three-labels", "the teacher has 3 labels and the task 2"),
    "teacher's tokenizer": ("teacher.path={root}/other-words", "the teacher's vocabulary"),
    "option of DeepSpeed": (
        "deepspeed.student.zero_optimisation.stage=3",
        "option of deepspeed.student 'zero_optimisation' is unknown (did you mean 'zero_optimization'?)",
    ),
    "option within DeepSpeed's": (
        "deepspeed.student.zero_optimization.reduce_bucket_sizes=5",
        "deepspeed.student is not what DeepSpeed accepts",
    ),
    "layout that is not known, in a dense run": (
        "deepspeed.student.zero_optimization.zero_hpz_partition_size=2; pruning.sparsity=0",
        "zero_hpz_partition_size is not supported",
    ),
    "tokenizer larger than the embeddings": ("model.tokenizer={root}/more-words", "up to the model's vocab_size"),
    "example longer than the positions": ("model.path={root}/few-positions", "up to the model's 8"),
    "run directory that is a file": ("train.output={root}/range.jsonl", "is not empty"),
    "run directory in use": ("train.output={root}", "is not empty"),
}


@pytest.fixture(scope="module")
def mistaken(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with data and teachers that do not fit."""
    root = tmp_path_factory.mktemp("mistaken")
    (root / "empty.jsonl").touch()
    (root / "range.jsonl").write_text('{"sentence": "a film", "label": 2}\n')
    write_model(root / "three-labels", num_labels=3)
    words = AutoTokenizer.from_pretrained(task / "model")
    words.add_tokens(["another"])
    write_model(root / "other-words")
    words.save_pretrained(root / "other-words")
    words.save_pretrained(root / "more-words")
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
    first, second = world(2).run(run, task, tmp_path / "run", *override.format(root=mistaken).split("; "))
    assert isinstance(first, str), "the run went through"
    assert first == second
    assert part in first
    assert "\n" not in first
    assert not (tmp_path / "run").exists(), "the corrected run may have its directory"


def differing_mistake() -> str:
    """Make one mistake on the last rank alone."""

    def action() -> int:
        if dist.detect().rank == dist.detect().size - 1:
            raise UserError("here")
        return 1

    try:
        return str(dist.agree(action))
    except UserError as error:
        return str(error)


def test_a_mistake_that_one_rank_finds_stops_all(world: Worlds) -> None:
    assert world(2).run(differing_mistake) == ["here", "here"]


def step_without_masking(pruner: Pruner, *_: Any) -> None:
    """Stands in for the pruner's hook: takes note of the step, and zeroes nothing."""
    pruner.carried = True


def run_without_masking(task: Path, output: Path) -> str:
    """Run with the hook that keeps pruned weights zero switched off."""
    try:
        run_patched("distprune.pruning.pruner.Pruner._after_optimizer_step", step_without_masking, task, output)
    except AssertionError as error:
        return str(error)
    return "the run went through"


def test_a_pruned_weight_that_came_back_is_never_saved(world: Worlds, task: Path, tmp_path: Path) -> None:
    said = world(2).run(run_without_masking, task, tmp_path / "run")
    assert all("came back" in sentence for sentence in said)
    assert not (tmp_path / "run" / "final").exists()


def unsupported(_: Any) -> bool:
    return False


def test_a_type_that_the_device_cannot_do_is_refused(world: Worlds, task: Path, tmp_path: Path) -> None:
    target = "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported"
    option = "deepspeed.student.fp16.enabled=true"
    said = world(2).run(run_patched, target, unsupported, task, tmp_path / "run", option, *stage(0, 0))
    assert len(set(said)) == 1
    assert "deepspeed.student.fp16.enabled is True, which this cpu does not support; allowed: float32, " in said[0]


class PoisonWeights:
    """Stands in for `set_learning_rate`: on the last rank, makes a weight NaN in the sixth step."""

    calls = 0

    def __call__(self, engine: Any, rate: float) -> None:
        set_learning_rate(engine, rate)
        self.calls += 1
        if self.calls == 6 and dist.detect().rank == dist.detect().size - 1:
            for shard in shards_of(engine, [f"{LAYER}.weight"]).shards:
                shard.master[shard.owned][-1] = math.nan


class PoisonOutputs:
    """Stands in for `forward`: on the last rank, makes a module put out infinity from the sixth call on."""

    calls = 0

    def __call__(self, engine: Any, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 6 and dist.detect().rank == dist.detect().size - 1:
            module = engine.module.get_submodule(LAYER)
            module.register_forward_hook(lambda _, __, output: output + math.inf)
        return forward(engine, batch)


@pytest.mark.parametrize("number", range(4))
def test_a_nan_stops_every_rank_with_the_step_and_the_layer(
    world: Worlds, task: Path, tmp_path: Path, number: int
) -> None:
    options = (*DENSE, *stage(number))
    target, poison = "distprune.train.set_learning_rate", PoisonWeights()
    said = world(2).run(run_patched, target, poison, task, tmp_path / "weights", *options)
    assert len(set(said)) == 1
    step = 6 if number else 5  # at stage 0 the optimizer's weights are those of the forward pass
    assert f"the loss is not finite at step {step}: the weights of {LAYER}.weight are not finite" in said[0]
    target, poison = "distprune.train.forward", PoisonOutputs()
    said = world(2).run(run_patched, target, poison, task, tmp_path / "outputs", *options)
    assert len(set(said)) == 1
    assert f"the loss is not finite at step 5: the output of {LAYER} is not finite" in said[0]


def test_a_nan_weight_is_not_pruned(world: Worlds, task: Path, tmp_path: Path) -> None:
    options = ("pruning.start=6 steps", "distillation.hardness=0")
    said = world(2).run(
        run_patched, "distprune.train.set_learning_rate", PoisonWeights(), task, tmp_path / "run", *options
    )
    assert len(set(said)) == 1
    assert said[0].startswith(f"at step 6 {LAYER}.weight holds NaN")
