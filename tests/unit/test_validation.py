"""Which configurations no run can have, and which key says so."""

import pytest

from distprune import settings
from distprune.checks.deepspeed import OWNED
from tests.unit.test_settings import PRUNED, refused

BF16_OFF = "deepspeed.student.bf16.enabled=false"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["pruning.sparsity=0", "pruning.end=99", "pruning.every=0", "pruning.start=never"],  # dense
        ["distillation.hardness=0", "teacher.path=null"],
        ["lr.warmup=100 steps", "lr.rewind_first=8"],
        ["pruning.start=90000 steps", "pruning.end=8"],  # compared where the data are known
        ["deepspeed.student.zero_optimization.stage=0", "deepspeed.teacher.zero_optimization.stage=0"],
        ["deepspeed.student.zero_optimization.stage=1", "deepspeed.student.bf16.enabled=true"],
        ["deepspeed.student.zero_optimization.offload_optimizer.device=cpu"],
        ["deepspeed.student.zero_optimization.offload_param.device=none"],
        [*(f"deepspeed.student.{each}" for each in ("fp16.enabled=true", "zero_optimization.stage=1")), BF16_OFF],
        ["deepspeed.student.wall_clock_breakdown=true"],
        ["optimizer.clip=0", "train.patience=1", "train.select=best", "task.limit=1", "model.dropout=0"],
    ],
)
def test_runs_that_are_possible_pass(overrides: list[str]) -> None:
    settings.validate(settings.load(None, PRUNED + overrides))


STAGE_1_FP32 = [
    f"deepspeed.student.{option}"
    for option in ("zero_optimization.stage=1", "bf16.enabled=true", "data_types.grad_accum_dtype=fp32")
]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.path=???"], "model.path"),
        (["model.path=''"], "model.path"),
        (["model.dropout=1"], "model.dropout"),
        (["model.freeze=['(']"], "model.freeze"),
        (["distillation.hardness=1.1"], "distillation.hardness"),
        (["distillation.hardness=-0.1"], "distillation.hardness"),
        (["distillation.hardness=nan"], "distillation.hardness"),
        (["distillation.temperature=0"], "distillation.temperature"),
        (["distillation.temperature=.inf"], "distillation.temperature"),
        (["teacher.path=null"], "teacher.path"),
        (["task.text=[]"], "task.text"),
        (["task.text=[a,b,c]"], "task.text"),
        (["task.text=[a,a]"], "task.text"),
        (["task.label=sentence"], "task.label"),
        (["task.validation=train"], "task.validation"),
        (["task.bad_rows=ignore"], "task.bad_rows"),
        (["task.text=[label]", "task.label=gold"], "task.text"),
        (["distillation.layers=[1]"], "distillation.layers"),
        (["distillation.attention=1", "teacher.path=t"], "model.dropout"),
        (["task.name=question_answering", "task.stride=128"], "task.stride"),
        (["task.labels=[a]"], "task.labels"),
        (["task.name=causal_lm", "task.labels=[a,b]"], "task.labels"),
        (["task.name=multiple_choice", "task.regression=true"], "task.regression"),
        (["task.name=question_answering", "task.too_long=skip"], "task.too_long"),
        (["task.choices=[a]"], "task.choices"),
        (["task.name=choice_by_masked_lm", "task.form=['{a}']"], "task.form"),
        (["task.labels=[a,a]"], "task.labels"),
        (["task.labels=[a,b]", "task.regression=true"], "task.labels"),
        (["task.subset=sst2"], "task.subset"),
        (["task.holdout=1"], "task.holdout"),
        (["task.holdout=-0.1"], "task.holdout"),
        (["task.max_length=0"], "task.max_length"),
        (["task.limit=0"], "task.limit"),
        (["deepspeed.student.autotuning.enabled=true"], "deepspeed.student.autotuning"),
        (["deepspeed.student.sparse_gradients=true"], "deepspeed.student.sparse_gradients"),
        (["deepspeed.student.tensor_parallel.autotp_size=2"], "deepspeed.student.tensor_parallel"),
        (["deepspeed.teacher.zero_optimization.zenflow={}"], "deepspeed.teacher.zero_optimization.zenflow"),
        (["regrowth.part=1"], "regrowth.part"),
        (["regrowth.part=-0.1"], "regrowth.part"),
        (["regrowth.part=0.5", "regrowth.every=0"], "regrowth.every"),
        (["regrowth.part=0.5", "regrowth.every=soon"], "regrowth.every"),
        (["regrowth.part=0.5", "pruning.structure=2:4"], "pruning.structure"),
        (["regrowth.part=0.5", "pruning.score=movement"], "pruning.score"),
        (["regrowth.part=0.5", "pruning.weights_of=m"], "pruning.weights_of"),
        (["regrowth.part=0.5", "pruning.sparsity=0"], "pruning.sparsity"),
        (["train.output=''"], "train.output"),
        (['train.output="two\\nlines"'], "train.output"),
        (["train.epochs=0"], "train.epochs"),
        (["train.epochs=.inf"], "train.epochs"),
        (["train.batch_size=0"], "train.batch_size"),
        (["train.accumulation=0"], "train.accumulation"),
        (["train.accumulation=3"], "train.accumulation"),
        (["train.eval_batch_size=0"], "train.eval_batch_size"),
        (["train.eval_every=0 steps"], "train.eval_every"),
        (["train.eval_every=often"], "train.eval_every"),
        (["train.eval_every=500"], "train.eval_every"),
        (["train.log_every=0"], "train.log_every"),
        (["train.seed=-1"], "train.seed"),
        (["train.seed=9223372036854775808"], "train.seed"),
        (["train.select=first"], "train.select"),
        (["train.patience=0"], "train.patience"),
        (["train.patience=2"], "train.patience"),
        (["optimizer.betas=[0.9]"], "optimizer.betas"),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas"),
        (["optimizer.eps=0"], "optimizer.eps"),
        (["optimizer.eps=1e-50"], "optimizer.eps"),
        (["recipe.epochs=3"], "recipe.epochs"),
        (["recipe.replicas=3"], "recipe.replicas"),
        (["recipe=obert_30", "recipe.replicas=3"], "recipe.replicas"),
        (["optimizer.eps=1e39"], "optimizer.eps"),
        (["pruning.include=['a{99999999999}']"], "pruning.include"),
        (["deepspeed.student.zero_optimization.stage=true"], "deepspeed.student.zero_optimization.stage"),
        (["deepspeed.student.zero_optimization.stage=2.0"], "deepspeed.student.zero_optimization.stage"),
        (["fisher.damping=1e-42"], "fisher.damping"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay"),
        (["optimizer.clip=-1"], "optimizer.clip"),
        (["lr.peak=0"], "lr.peak"),
        (["lr.final=-1"], "lr.final"),
        (["lr.final=1"], "lr.final"),
        (["lr.rewind_every=0"], "lr.rewind_every"),
        (["lr.rewind_every=11 epochs"], "lr.rewind_every"),
        (["lr.rewind_first=0 steps"], "lr.rewind_first"),
        (["lr.rewind_first=11"], "lr.rewind_first"),
        (["lr.rewind_first=2", "lr.rewind_every=null"], "lr.rewind_first"),
        (["lr.warmup=2 epochs"], "lr.warmup"),
        (["lr.warmup=10 epochs", "lr.rewind_every=null"], "lr.warmup"),
        (["lr.warmup=3", "lr.rewind_first=3"], "lr.warmup"),
        (["pruning.sparsity=1"], "pruning.sparsity"),
        (["pruning.sparsity=-0.1"], "pruning.sparsity"),
        (["pruning.sparsity=nan"], "pruning.sparsity"),
        (["pruning.every=500"], "pruning.every"),
        (["pruning.initial=1"], "pruning.initial"),
        (["pruning.initial=-0.1"], "pruning.initial"),
        (["pruning.initial=0.95"], "pruning.initial"),
        (["pruning.start=9"], "pruning.start"),
        (["pruning.end=10"], "pruning.end"),
        (["pruning.every=0 epochs"], "pruning.every"),
        (["pruning.every=-1 epochs"], "pruning.every"),
        (["pruning.include=['[']"], "pruning.include"),
        (["pruning.exclude=['[']"], "pruning.exclude"),
        (["wandb.mode=on"], "wandb.mode"),
        (["deepspeed.student.zero_optimization.stage=4"], "deepspeed.student.zero_optimization.stage"),
        (["deepspeed.teacher.zero_optimization.stage=2"], "deepspeed.teacher.zero_optimization.stage"),
        (["deepspeed.student.zero_optimization=3"], "deepspeed.student.zero_optimization"),
        (["deepspeed.student.bf16=true"], "deepspeed.student.bf16"),
        (["deepspeed.student.bf16.enabled=off"], "deepspeed.student.bf16.enabled"),
        (["deepspeed.student.fp16.enabled=1"], "deepspeed.student.fp16.enabled"),
        (
            ["deepspeed.student.fp16.enabled=true", "deepspeed.student.zero_optimization.stage=0", BF16_OFF],
            "deepspeed.student.fp16.enabled",
        ),
        (
            ["deepspeed.student.fp16.enabled=true", "deepspeed.student.bf16.enabled=true"],
            "deepspeed.student.fp16.enabled",
        ),
        (["deepspeed.teacher.fp16.enabled=true"], "deepspeed.teacher.fp16.enabled"),
        (STAGE_1_FP32, "deepspeed.student.data_types.grad_accum_dtype"),
        (
            [*STAGE_1_FP32, "deepspeed.student.zero_optimization.stage=0"],
            "deepspeed.student.data_types.grad_accum_dtype",
        ),
        (["deepspeed.student.data_types.grad_accum_dtype=fp23"], "deepspeed.student.data_types"),
        (["deepspeed.student.data_types.grad_acum_dtype=fp32"], "deepspeed.student.data_types"),
        (
            ["deepspeed.student.zero_optimization.offload_optimizer.device=nvme"],
            "deepspeed.student.zero_optimization.offload_optimizer.device",
        ),
        (
            ["deepspeed.student.torch_autocast={enabled: true, dtype: float16}"],
            "deepspeed.student.torch_autocast.dtype",
        ),
        (["deepspeed.teacher.torch_autocast.enabled=true"], "deepspeed.teacher.torch_autocast.dtype"),
        (
            ["deepspeed.teacher.zero_optimization.offload_param.device=nvme"],
            "deepspeed.teacher.zero_optimization.offload_param.device",
        ),
    ],
)
def test_runs_that_are_impossible_are_refused_by_key(overrides: list[str], key: str) -> None:
    message = refused(settings.validate, settings.load(None, PRUNED + overrides))
    assert message.startswith(f"{key} is ")
    assert "allowed: " in message


@pytest.mark.parametrize("engine", ["student", "teacher"])
@pytest.mark.parametrize(
    "option",
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "managed_gradient_accumulation",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "wandb",
        "tensorboard",
        "csv_monitor",
        "comet",
        "bfloat16",
        "activation_checkpointing",
        "amp",
        "checkpoint",
    ],
)
def test_options_that_distprune_sets_are_refused_with_the_key_to_use(engine: str, option: str) -> None:
    key = f"deepspeed.{engine}.{option}"
    message = refused(settings.validate, settings.load(None, [*PRUNED, f"{key}=1"]))
    assert message == f"{key} is 1; allowed: nothing; use {OWNED[option]} instead"


@pytest.mark.parametrize("off", ["sparse_gradients=false", "autotuning.enabled=false", "data_efficiency={}"])
def test_what_is_switched_off_may_stay(off: str) -> None:
    settings.validate(settings.load(None, [*PRUNED, f"deepspeed.student.{off}"]))
