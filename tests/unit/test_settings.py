from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from distprune import settings
from distprune.commands.config import annotate
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
        ("task: {text: [[a]]}", ["task.text is [['a']]; allowed: a list of texts"]),
        ("wandb: {tags: [{a: 1}]}", ["wandb.tags is [{'a': 1}]; allowed: a list of texts"]),
        ("train: {epochs: '???'}", ["train.epochs is '???'; allowed: a number"]),
        ("checkpoint: {epochs: '???'}", ["checkpoint.epochs is '???'; allowed: true or false"]),
        ("deepspeed: {student: {zero_optimization: {stage: '???'}}}", ["deepspeed.student is {", "allowed: a section"]),
        ("checkpoint: {epochs: '1'}", ["checkpoint.epochs is '1'; allowed: true or false"]),
        ("lr: {peak: " + "1" * 400 + "}", ["lr.peak is 1", "allowed: a number"]),
        ("optimizer: {betas: &a [*a]}", ["cannot be read as YAML"]),
        ("lr: {peak: " + "1" * 5000 + "}", ["cannot be read as YAML"]),
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


@pytest.mark.parametrize("text", ["Costs ${price} {q}", r"\${a}", "a$", r"\\\${", "${env:HOME}"])
def test_what_is_resolved_is_not_resolved_again(write, text: str) -> None:
    config = settings.load(None, [])
    config.train.output, config.task.labels = text, [text]
    path = write(settings.to_yaml(config))
    assert settings.load(path, []) == config == settings.load_written(Path(path))
    assert settings.load(write(annotate(config)), []) == config


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
    st.text(st.characters(codec="utf-8", exclude_characters="\x85", exclude_categories=["C", "Z"])),
    st.lists(st.sampled_from(["1e-3", "null", "yes", "a: b", "1", "#x", "- y", "'q'", ""])),
)
def test_yaml_keeps_odd_values(tmp_path_factory, sparsity, peak, name, labels) -> None:
    config = settings.load(None, [])
    config.pruning.sparsity, config.lr.peak, config.train.output, config.task.labels = sparsity, peak, name, labels
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_text(settings.to_yaml(config))
    assert settings.load(str(path), []) == config
