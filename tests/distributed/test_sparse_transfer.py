"""Pruning upstream as a masked language model, then fine-tuning on a task: the zeros of the first are in the second."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from tests.distributed.runs import run
from tests.unit.task_files import make_masked_tokenizer
from tests.world import Worlds

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """Return a folder with a dense model, sentences with labels, and the configuration of a run on them."""
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices("abcdefghij", k=rng.randint(2, 9))), "label": n % 2} for n in range(48)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    tokenizer = make_masked_tokenizer()
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"""
model: {{path: {tmp_path}/model}}
task: {{train: {tmp_path}/train.jsonl, validation: {tmp_path}/validation.jsonl, text: [text], max_length: 16}}
train: {{epochs: 2, batch_size: 8, eval_every: 1 epochs}}
lr: {{peak: 1.0e-3}}
distillation: {{hardness: 0}}
deepspeed: {{student: {{zero_optimization: {{stage: 2}}}}}}
""")
    return tmp_path


@pytest.mark.slow
def test_the_zeros_of_an_upstream_model_stay_in_sparse_transfer(world: Worlds, upstream: Path) -> None:
    prune = ["task.name=masked_lm", "recipe.name=gmp", "recipe.epochs=1", "train.epochs=3", "pruning.sparsity=0.7"]
    pruned = world(2).run(run, upstream, upstream / "pruned", *prune)[0]
    assert pruned["sparsity_masked"] == pytest.approx(0.7, abs=1e-3)
    transfer = [f"model.path={upstream}/pruned/final", "recipe.name=sparse_transfer"]
    moved = world(2).run(run, upstream, upstream / "moved", *transfer)[0]
    assert moved["masked_weights"] == pruned["masked_weights"]
    before, after = (load_file(upstream / name / "final/model.safetensors") for name in ("pruned", "moved"))
    encoder = [name for name in before if ".layer." in name and before[name].dim() == 2]
    assert len(encoder) == 12
    assert sum(int((after[name] == 0).sum()) for name in encoder) == moved["zeros_in_file"]
    for name in encoder:
        assert torch.equal(before[name] == 0, after[name] == 0), "the zeros are where they were"
        assert not torch.equal(before[name], after[name]), "and the others were trained"
