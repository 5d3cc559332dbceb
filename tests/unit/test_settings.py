from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from distprune import settings
from distprune.checks.deepspeed import OWNED
from distprune.config import Config, describe
from distprune.errors import UserError

PRUNED = [
    "model.path=m",
    "teacher.path=t",
    "distillation.hardness=1",
    "pruning.sparsity=0.9",
    "pruning.initial=0.5",
    "lr.rewind_every=2",
]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(write) -> None:
    path = write("train: {epochs: 3, batch_size: 16}\nlr: {peak: 1e-3}\n")
    config = settings.load(
        path, ["train.batch_size=8", "task.text=[a,b]", "pruning.start=500 steps", "train.batch_size=4"]
    )
    assert config.train.epochs == 3.0
    assert config.train.batch_size == 4
    assert config.lr.peak == 1e-3
    assert config.task.text == ["a", "b"]
    assert config.pruning.start == "500 steps"
    assert config.train.seed == Config().train.seed


def test_a_number_is_a_time_in_epochs(write) -> None:
    assert settings.load(write("pruning: {start: 2, every: 0.1}"), []).pruning.every == "0.1"


def test_deepspeed_options_merge_and_null_takes_back() -> None:
    student = settings.load(None, ["deepspeed.student.bf16.enabled=true"]).deepspeed.student
    assert student == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    assert settings.load(None, ["teacher.path=x", "teacher.path=null"]).teacher.path is None


def test_nothing_and_an_empty_file_give_the_defaults(write) -> None:
    assert settings.load(None, []) == settings.load(write("# nothing\n"), [])
    assert asdict(settings.load(None, [])) == asdict(Config())


def test_environment_variables_are_resolved(write, monkeypatch) -> None:
    monkeypatch.setenv("STUDENT", "/models/x")
    path = write("model: {path: '${oc.env:STUDENT}'}")
    assert settings.load(path, []).model.path == "/models/x"
    monkeypatch.delenv("STUDENT")
    assert "model.path" in refused(settings.load, path, [])


def test_base_files_are_merged_first_and_in_order(write) -> None:
    write("train: {epochs: 3, batch_size: 16, seed: 1}", "parts/task.yaml")
    write("base: task.yaml\ntrain: {batch_size: 8, seed: 2}", "parts/more.yaml")
    write("train: {seed: 3}", "recipe.yaml")
    train = settings.load(write("base: [parts/more.yaml, recipe.yaml]\ntrain: {log_every: 5}"), []).train
    assert (train.epochs, train.batch_size, train.seed, train.log_every) == (3.0, 8, 3, 5)


def test_a_base_may_be_reached_twice_but_not_from_itself(write) -> None:
    write("train: {seed: 1}", "a.yaml")
    write("base: a.yaml", "b.yaml")
    assert settings.load(write("base: [a.yaml, b.yaml]"), []).train.seed == 1
    write("base: run.yaml", "a.yaml")
    assert "builds on itself" in refused(settings.load, write("base: a.yaml"), [])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pruning: {sparsty: 0.9}", ["run.yaml", "pruning.sparsty", "0.9", "did you mean pruning.sparsity?"]),
        ("sparsity: 0.9", ["no key sparsity", "did you mean pruning.sparsity?"]),
        ("prunin: {sparsity: 0.9}", ["no key prunin", "did you mean pruning?"]),
        ("path: x", ["did you mean model.path?"]),
        ("zzz: 1", ["no key zzz", "'distprune config' prints all keys"]),
        ("lr: {peak: high}", ["lr.peak is 'high'; allowed: a number"]),
        ("train: {batch_size: 1.5}", ["train.batch_size is 1.5; allowed: a whole number"]),
        ("train: {patience: soon}", ["train.patience is 'soon'; allowed: a whole number or null"]),
        ("train: {deterministic: perhaps}", ["train.deterministic is 'perhaps'; allowed: true or false"]),
        ("task: {text: sentence}", ["task.text is 'sentence'; allowed: a list of texts"]),
        ("task: {text: {a: b}}", ["task.text is {'a': 'b'}; allowed: a list of texts"]),
        ("optimizer: {betas: [a]}", ["optimizer.betas is ['a']; allowed: a list of numbers"]),
        ("model: {path: null}", ["model.path is None; allowed: text"]),
        ("pruning: {sparsity: {x: 1}}", ["pruning.sparsity is {'x': 1}; allowed: a number"]),
        ("deepspeed: {student: 2}", ["deepspeed.student is 2; allowed: a section"]),
        ("task: {labels: [false, true]}", ["task.labels is [False, True]; allowed: true and false in quotes"]),
        ("checkpoint: {epochs: 5}", ["checkpoint.epochs is 5; allowed: true or false"]),
        ("task: {label: true}", ["task.label is True; allowed: true and false in quotes"]),
        ("lr: 5", ["lr is 5; allowed: a section with the keys peak, final"]),
        ("lr:", ["lr is None; allowed: a section"]),
        ("[1, 2]", ["holds [1, 2]; allowed: sections"]),
        ("lr: [1", ["cannot be read as YAML"]),
        ("lr: {peak: 1}\nlr: {peak: 2}", ["cannot be read as YAML", "duplicate"]),
        ("? [a]\n: 1", ["cannot be read as YAML", "unhashable key"]),
        ("base: {a: b}", ["base is {'a': 'b'}"]),
        ("base: [1]", ["base is [1]"]),
        ("base: gone.yaml", ["gone.yaml does not exist"]),
    ],
)
def test_files_that_cannot_be_merged_are_refused(write, text: str, parts: list[str]) -> None:
    message = refused(settings.load, write(text), [])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("pruning.sparsity", "sets nothing; allowed: key=value"),
        ("=3", "sets nothing; allowed: key=value"),
        ("pruning.sparsty=0.9", "there is no key pruning.sparsty (set to 0.9); did you mean pruning.sparsity?"),
        ("pruning.sparsity=", "pruning.sparsity is None; allowed: a number"),
        ("pruning.sparsity=[1", "no YAML"),
        ("task.text[0]=x", "there is no key task.text[0]"),
        ("base=x.yaml", "there is no key base"),
    ],
)
def test_overrides_that_cannot_be_merged_are_refused(override: str, part: str) -> None:
    message = refused(settings.load, None, [override])
    assert repr(override) in message
    assert part in message


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(settings.load, str(tmp_path / "gone.yaml"), [])
    assert "cannot be read" in refused(settings.load, str(tmp_path), [])


def test_yaml_holds_every_key_and_round_trips(write) -> None:
    config = settings.load(None, PRUNED)
    text = settings.to_yaml(config)
    assert settings.load(write(text), []) == config
    assert {f"{name}.{key}" for name, keys in yaml.safe_load(text).items() for key in keys} == set(describe())


@budget(max_examples=25)
@given(
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1e3),
    st.text(st.characters(codec="utf-8", exclude_characters="$\\\x85", exclude_categories=["C", "Z"])),
    st.lists(st.sampled_from(["1e-3", "null", "yes", "a: b", "1", "#x", "- y", "'q'", ""])),
)
def test_yaml_keeps_odd_values(tmp_path_factory, sparsity, peak, name, labels) -> None:
    config = settings.load(None, [])
    config.pruning.sparsity, config.lr.peak, config.train.output, config.task.labels = sparsity, peak, name, labels
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_text(settings.to_yaml(config))
    assert settings.load(str(path), []) == config


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
        ["optimizer.clip=0", "train.patience=1", "task.limit=1", "model.dropout=0"],
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
        (["task.labels=[a,a]"], "task.labels"),
        (["task.labels=[a,b]", "task.regression=true"], "task.labels"),
        (["task.subset=sst2"], "task.subset"),
        (["task.holdout=1"], "task.holdout"),
        (["task.holdout=-0.1"], "task.holdout"),
        (["task.max_length=0"], "task.max_length"),
        (["task.limit=0"], "task.limit"),
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
        (["train.epochs=0"], "train.epochs"),
        (["train.epochs=.inf"], "train.epochs"),
        (["train.batch_size=0"], "train.batch_size"),
        (["train.accumulation=0"], "train.accumulation"),
        (["train.accumulation=3"], "train.accumulation"),
        (["train.eval_batch_size=0"], "train.eval_batch_size"),
        (["train.eval_every=0 steps"], "train.eval_every"),
        (["train.eval_every=often"], "train.eval_every"),
        (["train.log_every=0"], "train.log_every"),
        (["train.seed=-1"], "train.seed"),
        (["train.seed=9223372036854775808"], "train.seed"),
        (["train.select=first"], "train.select"),
        (["train.patience=0"], "train.patience"),
        (["optimizer.betas=[0.9]"], "optimizer.betas"),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas"),
        (["optimizer.eps=0"], "optimizer.eps"),
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
        "wandb",
        "tensorboard",
        "csv_monitor",
        "comet",
        "bfloat16",
    ],
)
def test_options_that_distprune_sets_are_refused_with_the_key_to_use(engine: str, option: str) -> None:
    key = f"deepspeed.{engine}.{option}"
    message = refused(settings.validate, settings.load(None, [*PRUNED, f"{key}=1"]))
    assert message == f"{key} is 1; allowed: nothing; use {OWNED[option]} instead"
