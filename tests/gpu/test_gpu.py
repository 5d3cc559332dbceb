"""Whole runs on a GPU, each in a process of its own: this one, as all tests, is kept on the CPU."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import records, write_task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU on this machine"),
]


def on_gpu(*arguments: str) -> str:
    """Run a module with the GPU in sight; return what it printed."""
    environment = {name: v for name, v in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_masks_are_those_of_the_cpu() -> None:
    assert "the same" in on_gpu("tests.gpu.masks", "cuda")


def test_the_benchmark_of_selection_runs_on_a_gpu(tmp_path: Path) -> None:
    on_gpu("distprune", "bench", "select", "--sizes", "3e6", "--repeat", "1", "--json", str(tmp_path / "select.json"))
    (result,) = json.loads((tmp_path / "select.json").read_text())["results"]
    assert result["device"] == "cuda"


@pytest.mark.parametrize(
    ("dtype", "stage", "offload"),
    [
        (dtype, stage, offload)
        for dtype in ("fp32", "bf16", "fp16")
        for stage, offload in ((0, False), (2, False), (2, True), (3, False), (3, True))
        if (dtype, stage) != ("fp16", 0)  # is refused
    ],
)
def test_a_run_on_a_gpu_ends_at_the_exact_sparsity(tmp_path: Path, dtype: str, stage: int, offload: bool) -> None:
    task, output = write_task(tmp_path, hardness=0.5), tmp_path / "run"
    overrides = [f"train.output={output}", f"deepspeed.student.zero_optimization.stage={stage}"]
    if dtype != "fp32":
        overrides.append(f"deepspeed.student.{dtype}.enabled=true")
    if offload:
        overrides.append("deepspeed.student.zero_optimization.offload_optimizer.device=cpu")
    assert "1 rank on cuda" in on_gpu("distprune", "train", str(task / "run.yaml"), *overrides)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["zeros_in_file"] == summary["masked_weights"] == math.floor(0.9 * summary["prunable_weights"])
    assert all(math.isfinite(record["loss"]) for record in records(output, "train"))
