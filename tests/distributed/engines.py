"""Small students under any layout, and the plain single-process references that they are held against."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate, product
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distprune.config import Config, PruningConfig, RegrowthConfig
from distprune.engines.build import build_student
from distprune.pruning.masks import PRUNED
from distprune.synthetic import tokenizer
from distprune.training.setup import build_pruner
from distprune.zero.shards import Shard

GLOBAL_BATCH = 24  # divides by every world size up to 4, and by two accumulation steps of each


VARIANTS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap_comm": True, "reduce_bucket_size": 300},
    "sub-groups": {"sub_group_size": 300},
    # Matrices of attention and what is smaller stay whole, the others are cut.
    "released": {
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 300,
        "stage3_prefetch_bucket_size": 100,
    },
    "persistent": {"stage3_param_persistence_threshold": 110},
    "offload-parameters": {"offload_param": {"device": "cpu"}},
}


def forward(engine: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return a model's logits."""
    logits: Tensor = engine(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return logits


class Layout(NamedTuple):
    """How DeepSpeed holds a student."""

    stage: int
    dtype: str = "fp32"
    offload: bool = False
    variant: str = ""

    def __str__(self) -> str:
        suffixes = "-offload" * self.offload + f"-{self.variant}" * bool(self.variant)
        return f"zero{self.stage}-{self.dtype}{suffixes}"

    @property
    def section(self) -> dict[str, Any]:
        """DeepSpeed's options."""
        # Every parameter is cut up, however small: with its defaults ZeRO-3 would keep all of these whole.
        zero: dict[str, Any] = {"stage": self.stage, "stage3_param_persistence_threshold": 0}
        zero |= VARIANTS.get(self.variant, {})
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        kinds: dict[str, Any] = {
            "fp32": {},
            "bf16": {"bf16": {"enabled": True}},
            "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
        }
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if self.variant == "accumulate-fp32" else {}
        return {"zero_optimization": zero} | kinds[self.dtype] | accumulation


ALL_LAYOUTS = [
    Layout(*each) for each in product((0, 1, 2, 3), ("fp32", "bf16"), (False, True)) if each[0] or not each[2]
]
"""Offload moves ZeRO's partitions, so there is none at stage 0."""

OTHER_LAYOUTS = [
    Layout(1, variant="overlap"),
    Layout(2, variant="overlap"),
    Layout(2, "bf16", variant="accumulate-fp32"),
    Layout(3, variant="sub-groups"),
    Layout(3, "bf16", variant="persistent"),
    Layout(3, "bf16", variant="offload-parameters"),
]
"""Options of DeepSpeed that cut or move the weights, or the gradients, in another way."""

FP16_LAYOUTS = [layout._replace(dtype="fp16") for layout in ALL_LAYOUTS if layout.dtype == "bf16" and layout.stage]
"""At stage 0 DeepSpeed does not scale fp16's loss, and distprune refuses it."""


def write_model(directory: Path, levels: int | None = None, **sizes: int) -> Path:
    """Write a BERT classifier of two layers whose matrices no world size above 1 divides evenly.

    Args:
        directory: where it goes.
        levels: round the weights to multiples of 1 / levels, so that most of them are tied, some at zero;
            None: leave them all different.
        sizes: overrides of the model's configuration.
    """
    torch.manual_seed(7)
    words = tokenizer()
    shape = {"hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 13}
    shape["max_position_embeddings"] = 64
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,  # large enough for the matrices to matter in the gradient's norm
            **shape | sizes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if levels is not None:
                parameter.copy_((parameter * levels).round() / levels)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def reference_masks(scores: dict[str, Tensor], sparsity: Fraction) -> dict[str, Tensor]:
    """Return which elements go, flat, of whole scores on one process: by torch.kthvalue, ties by global index.

    Args:
        scores: in the order of the parameters; those pruned before are below all others.
        sparsity: part to prune; exactly ``floor(sparsity * elements)`` go.
    """
    every = torch.cat([score.flatten() for score in scores.values()])
    wanted = floor(sparsity * every.numel())
    selected = torch.zeros_like(every, dtype=torch.bool)
    if wanted:
        threshold = torch.kthvalue(every, wanted).values
        selected = every < threshold
        ties = (every == threshold).nonzero().flatten()
        selected[ties[: wanted - int(selected.sum())]] = True
    sizes = [score.numel() for score in scores.values()]
    return dict(zip(scores, selected.split(sizes), strict=True))


def plain_model(directory: Path, dtype: str = "fp32") -> nn.Module:
    """Return the model as transformers loads it, with fp32 weights rounded to ``dtype``, as forward passes use them."""
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(directory)
    return model if dtype == "fp32" else model.bfloat16().float()


def target_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of the encoder's layers, flat, named by hand and not by the code under test."""
    return {
        name: parameter.detach().flatten()
        for name, parameter in model.named_parameters()
        if ".encoder.layer." in name and name.endswith("weight") and parameter.dim() == 2
    }


def random_batch(step: int) -> dict[str, Tensor]:
    """Return a global batch of ``GLOBAL_BATCH`` examples, the same on every rank and in every process."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(4, 50, (GLOBAL_BATCH, 9), generator=generator)
    labels = torch.randint(0, 2, (GLOBAL_BATCH,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def rows(batch: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """Return every ``parts``-th row of a batch, from ``part`` on."""
    return {name: tensor[part::parts] for name, tensor in batch.items()}


def _allow_fp16() -> None:
    """Let DeepSpeed do on any CPU what it does on a GPU: torch computes fp16 there too, only slowly."""
    type(get_accelerator()).is_fp16_supported = lambda _: True


class Student:
    """A student's engine with a pruner, on this rank."""

    def __init__(self, directory: Path, layout: Layout, accumulation: int = 1, **options: Any):
        config = Config()
        config.train.batch_size, config.train.accumulation = GLOBAL_BATCH, accumulation
        config.deepspeed.student = layout.section
        config.lr.peak = options.pop("lr", 1e-2)
        config.optimizer.clip = options.pop("clip", 1.0)
        config.optimizer.weight_decay = options.pop("weight_decay", 0.0)
        config.model.freeze = options.pop("freeze", [])
        config.model.activation_checkpointing = options.pop("checkpointing", False)
        config.pruning = PruningConfig(**options.pop("pruning", {}))
        config.regrowth = options.pop("regrowth", RegrowthConfig())
        assert not options, f"unknown options: {options}"
        if layout.dtype == "fp16":
            _allow_fp16()
        self.accumulation = accumulation
        self.rank, self.world = torch_dist.get_rank(), torch_dist.get_world_size()
        micro_batch = GLOBAL_BATCH // (self.world * accumulation)
        self.engine, _ = build_student(
            config, directory, AutoModelForSequenceClassification, {"num_labels": 2}, micro_batch
        )
        self.pruner = build_pruner(config, self.engine)
        self.names = self.pruner.parameters.names

    def step(
        self, step: int, sparsity: Fraction | None = None, loss_factor: float = 1.0, regrown: float | None = None
    ) -> None:
        """Take an optimizer step as the trainer does, on the batch of that number."""
        for part in range(self.accumulation):
            batch = rows(random_batch(step), self.rank * self.accumulation + part, self.world * self.accumulation)
            loss = F.cross_entropy(forward(self.engine, batch).float(), batch["labels"])
            self.engine.backward(loss * loss_factor)
            if part + 1 < self.accumulation:
                self.engine.step()
        self.pruner.after_backward(sparsity, regrown)
        self.engine.step()

    def masks(self) -> dict[str, Tensor]:
        """Return whole masks, flat, on every rank. Collective."""
        return whole(
            self.names,
            [(s, each.mask[s.owned] == PRUNED) for s, each in zip(self.pruner.shards, self.pruner.slices, strict=True)],
        )

    def masters(self) -> dict[str, Tensor]:
        """Return the whole fp32 weights, flat, on every rank. Collective."""
        return whole(self.names, [(s, s.master[s.owned].cpu()) for s in self.pruner.shards])

    def moments(self, kind: str) -> dict[str, Tensor]:
        """Return the whole first (exp_avg) or second (exp_avg_sq) moments, flat, on every rank. Collective."""
        optimizer = self.engine.basic_optimizer
        return whole(self.names, [(s, s.moments(optimizer)[kind][s.owned].cpu()) for s in self.pruner.shards])

    def forward_weights(self) -> dict[str, Tensor]:
        """Return what the forward pass uses, flat, gathered by DeepSpeed where it is cut up. Collective."""
        import deepspeed

        found = {}
        for name, parameter in self.engine.module.named_parameters():
            if name in self.names:
                with deepspeed.zero.GatheredParameters([parameter]):
                    found[name] = parameter.detach().flatten().clone()
        return found

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers down."""
        self.engine.destroy()


def whole(names: Iterable[str], pieces: list[tuple[Shard, Tensor]]) -> dict[str, Tensor]:
    """Put every rank's owned slices together; each element must come from exactly one rank. Collective."""
    mine = [(shard.name, shard.own_start, piece.numpy()) for shard, piece in pieces]  # arrays: tensors pickle slowly
    every: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(every, mine)
    found: dict[str, Tensor] = {}
    for name in names:
        parts = sorted(((start, piece) for rank in every for n, start, piece in rank if n == name), key=lambda p: p[0])
        ends = list(accumulate((piece.size for _, piece in parts), initial=0))
        # Empty pieces may start anywhere.
        assert all(start == end for (start, piece), end in zip(parts, ends, strict=False) if piece.size), name
        found[name] = torch.from_numpy(np.concatenate([piece for _, piece in parts]))
    return found
