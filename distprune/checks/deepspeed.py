"""DeepSpeed's options: those that distprune sets itself, and layouts that it does not know."""

from typing import Any

from distprune.checks.check import Check
from distprune.config import Config, value_of

# DeepSpeed's options that distprune sets, with the keys that it sets them from.
OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.clip",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_allreduce_op": "the ranks' mean, as it is, and lr.peak",
    "gradient_predivide_factor": "the ranks' mean, as it is, and lr.peak",
    "optimizer": "optimizer.*",
    "scheduler": "lr.*",
    "wandb": "wandb.*",
    "tensorboard": "wandb.*, beside the metrics.jsonl of every run",
    "csv_monitor": "wandb.*, beside the metrics.jsonl of every run",
    "comet": "wandb.*, beside the metrics.jsonl of every run",
    "bfloat16": "bf16, its name today",
    "amp": "bf16 or fp16",
    "activation_checkpointing": "model.activation_checkpointing",
    "checkpoint": "checkpoint.*",
}

# Others that DeepSpeed reads: distprune's engines, data and loop would not use them, or not know what they do.
UNUSED = (
    *("autotuning", "compile", "compression_training", "curriculum_learning", "data_efficiency", "datastates_ckpt"),
    *("dataloader_drop_last", "eigenvalue", "elasticity", "expert_parallel", "graph_harvesting", "hybrid_engine"),
    *("nebula", "pipeline", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    *("use_data_before_expert_parallelism", "weight_quantization"),
)

READ_SECTIONS = (
    "bf16",
    "fp16",
    "data_types",
    "torch_autocast",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
)


def _unset(key: str, instead: str) -> Check:
    return Check(key, f"nothing; use {instead} instead", lambda c: value_of(c, key) is None)


def _absent(key: str, reason: str) -> Check:
    return Check(key, f"nothing: {reason}", lambda c: value_of(c, key) is None)


def _off(key: str) -> Check:
    off: tuple[Any, ...] = (None, False, {}, {"enabled": False})
    return Check(key, "nothing: distprune has no use for it", lambda c: value_of(c, key) in off)


def _section(key: str) -> Check:
    return Check(key, "a section of options", lambda c: isinstance(value_of(c, key, {}), dict))


def _switch(key: str) -> Check:
    return Check(key, "true or false", lambda c: isinstance(value_of(c, key, False), bool))


def _offload(key: str) -> Check:
    return Check(f"{key}.device", "cpu or none", lambda c: value_of(c, f"{key}.device", "none") in ("cpu", "none"))


def _engine(root: str, stages: tuple[int, ...]) -> tuple[Check, ...]:
    """Return the checks of one engine's DeepSpeed options.

    Args:
        root: dotted key of the engine's section.
        stages: ZeRO stages that it may have.
    """
    zero, accumulated = f"{root}.zero_optimization", f"{root}.data_types.grad_accum_dtype"

    def enabled(config: Config, name: str) -> bool:
        return bool(value_of(config, f"{root}.{name}.enabled", False))

    def known_wrapper(config: Config) -> bool:
        """Whether DeepSpeed uses an optimizer whose slices are known; at stage 1 it would be BF16_Optimizer."""
        single = value_of(config, accumulated) == "fp32"
        return not (value_of(config, f"{zero}.stage", 0) in (0, 1) and enabled(config, "bf16") and single)

    return (
        *(_unset(f"{root}.{name}", instead) for name, instead in OWNED.items()),
        *(_section(f"{root}.{name}") for name in READ_SECTIONS),
        *(_switch(f"{root}.{name}.enabled") for name in ("bf16", "fp16", "torch_autocast")),
        *(_off(f"{root}.{name}") for name in UNUSED),
        _absent(f"{root}.tensor_parallel", "its ranks would need the same rows, and each has its own"),
        _absent(f"{zero}.zenflow", "it updates weights where pruned ones would come back"),
        Check(
            f"{zero}.stage",
            f"one of {', '.join(map(str, stages))}",
            lambda c: type(value_of(c, f"{zero}.stage", 0)) is int and value_of(c, f"{zero}.stage", 0) in stages,
        ),
        _offload(f"{zero}.offload_optimizer"),
        Check(
            f"{zero}.offload_optimizer.device",
            "none at ZeRO stage 0, which has no partitions to move",
            lambda c: (
                value_of(c, f"{zero}.stage", 0) != 0
                or value_of(c, f"{zero}.offload_optimizer.device", "none") == "none"
            ),
        ),
        _offload(f"{zero}.offload_param"),
        Check(
            f"{root}.fp16.enabled",
            "false at ZeRO stage 0, where DeepSpeed does not scale the loss; true at stages 1 to 3",
            lambda c: not (enabled(c, "fp16") and value_of(c, f"{zero}.stage", 0) == 0),
        ),
        Check(
            f"{root}.fp16.enabled",
            "true for one of fp16 and bf16 only",
            lambda c: not (enabled(c, "fp16") and enabled(c, "bf16")),
        ),
        # With float16 DeepSpeed scales the loss without saying so: it clips scaled gradients, and skips steps unseen.
        Check(
            f"{root}.torch_autocast.dtype",
            "bfloat16; float16 by fp16.enabled",
            lambda c: (
                not enabled(c, "torch_autocast")
                or value_of(c, f"{root}.torch_autocast.dtype") in ("bfloat16", "bf16", "torch.bfloat16")
            ),
        ),
        Check(
            f"{root}.data_types",
            "a section with grad_accum_dtype, fp32, fp16 or bf16",
            lambda c: (
                value_of(c, f"{root}.data_types", {}).keys() <= {"grad_accum_dtype"}
                and value_of(c, accumulated) in (None, "fp32", "fp16", "bf16")
            ),
        ),
        Check(accumulated, "bf16 at ZeRO stages 0 and 1 with bf16 weights; use stage 2 for fp32", known_wrapper),
    )


DEEPSPEED = (
    *_engine("deepspeed.student", (0, 1, 2, 3)),
    *_engine("deepspeed.teacher", (0, 3)),
    Check(
        "deepspeed.teacher.fp16.enabled",
        "false; a teacher runs in fp32, or in bf16 with bf16.enabled",
        lambda c: not value_of(c, "deepspeed.teacher.fp16.enabled", False),
    ),
)
