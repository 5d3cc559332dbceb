"""transformers' Trainer on DeepSpeed, as `bench train` compares with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distprune import allocator, dist, settings, turns
from distprune.training.setup import load_task

WARM_UP = 10
"""Optimizer steps that are not counted."""


def examples_per_s_apart(overrides: list[str], section: dict[str, Any]) -> float:
    """Train in new processes, without what distprune sets in its own. Collective: every rank calls it."""
    mine = {name: text for name, text in os.environ.items() if not name.startswith(("TORCHELASTIC", allocator.SWITCH))}
    mine |= {"MASTER_PORT": str(turns.on_main(dist.free_port)), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", __name__, json.dumps([overrides, section])]
    done = subprocess.run(command, env=mine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


class _Timer(TrainerCallback):  # type: ignore[misc]
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def examples_per_s(overrides: list[str], section: dict[str, Any]) -> float:
    """Train in this process. Collective: every rank calls it.

    Args:
        overrides: distprune's settings that say the model, the data, the batch and the learning rate.
        section: DeepSpeed's options.
    """
    world, config = dist.detect(), settings.load(None, overrides)
    folder = Path(config.model.path)
    task = load_task(config, folder)
    model = task.auto_class.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.train.batch_size // world.size,
        num_train_epochs=1,
        learning_rate=config.lr.peak,
        bf16=bool(section.get("bf16", {}).get("enabled")),
        deepspeed=section | {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": "auto"},
        train_sampling_strategy="group_by_length",
        dataloader_drop_last=True,
        use_cpu=world.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    timer = _Timer()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=DataCollatorWithPadding(task.tokenizer),
        callbacks=[timer],
    )
    trainer.train()
    trainer.accelerator.free_memory()
    unset_hf_deepspeed_config()
    steps = len(timer.ends) - WARM_UP
    return steps * config.train.batch_size / (timer.ends[-1] - timer.ends[WARM_UP - 1])


if __name__ == "__main__":
    dist.init()
    print(examples_per_s(*json.loads(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # as distprune's own processes end (`__main__.entry`)
