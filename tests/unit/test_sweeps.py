"""A sweep's file, and the runs that it asks for."""

from pathlib import Path

import pytest

from distprune.commands.sweep import run as sweep
from distprune.errors import UserError
from distprune.sweeps.spec import read_sweep
from tests.unit.sweep_files import runs, settings_of, write_sweep


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_every_method_has_a_run_for_each_combination_behind_the_models_that_it_gets(file: Path) -> None:
    found = runs(file)
    assert [run.name for run in found] == [
        "dense/train.seed=1",
        "dense/train.seed=2",
        *(f"after/train.seed={seed},pruning.sparsity={sparsity}" for seed in (1, 2) for sparsity in (0.5, 0.9)),
    ]
    assert [run.models for run in found[2:]] == [{"model.path": f"dense/train.seed={seed}"} for seed in (1, 1, 2, 2)], (
        "that of the same seed"
    )
    out = Path("out")
    assert found[-1].arguments(out) == [
        'wandb.group="sweep"',
        "train.epochs=4",
        'recipe.name="one_shot"',
        "train.seed=2",
        "pruning.sparsity=0.9",
        'model.path="out/dense/train.seed=2/final"',
        'train.output="out/after/train.seed=2,pruning.sparsity=0.9"',
        'wandb.name="after/train.seed=2,pruning.sparsity=0.9"',
    ]


def test_settings_are_what_is_not_as_it_is_by_default_and_not_where_files_are(file: Path) -> None:
    local = "task.hub=null task.train=/a/train.csv task.validation=/a/dev.csv"
    first, *same = (
        settings_of(runs(file, *local.replace("/a", folder).split(), *more)[-1], Path(output))
        for folder, output, more in (("/a", "here", ()), ("/b", "there", ("wandb.mode=offline", "checkpoint.keep=9")))
    )
    assert [first] == same
    assert first == {
        "recipe.name": "one_shot",
        "model.path": "dense/train.seed=2",
        "task.train": "train.csv",
        "task.validation": "dev.csv",
        "train.epochs": 4.0,
        "train.seed": 2,
        "lr.rewind_every": "2 epochs",
        "pruning.sparsity": 0.9,
        "pruning.initial": 0.9,
        "pruning.start": "0 steps",
        "pruning.end": "0 steps",
    }
    for more in ("train.batch_size=8", "lr.peak=1e-3", "task.train=/a/other.csv", "task.hub=x"):
        assert settings_of(runs(file, *local.split(), more)[-1]) != first
    more = [settings_of(runs(file, *local.split(), f"task.more_validation=[{name}]")[-1]) for name in ("/a/c", "/b/c")]
    assert more[0] == more[1] == first | {"task.more_validation": ["c"]}
    models = [settings_of(runs(file, f"model.path={path}")[0]) for path in ("/a/x/final", "/b/x/final", "/a/y/final")]
    assert models[0] == models[1]
    assert models[1] != models[2], "every run's model is called final"
    of_sweeps = [settings_of(runs(file, f'model.path="/a/{name}/lr.peak=1/final"')[0]) for name in ("dense", "gmp")]
    assert of_sweeps[0] != of_sweeps[1], "and every method's run at a point as the others'"
    on_hub = [settings_of(runs(file, f"task.train={split}")[0]) for split in ("a", "c")]
    assert on_hub[0] != on_hub[1], "splits are no files"


def test_values_come_through_the_command_line_as_they_are(file: Path) -> None:
    text = file.read_text().replace("{pruning.sparsity: [0.5, 0.9]}", '{pruning.structure: ["2:4", unstructured]}')
    file.write_text(text.replace("{recipe.name: one_shot}", "{recipe.name: one_shot, pruning.sparsity: 0.5}"))
    found = [run for run in runs(file) if run.method == "after"]
    assert [run.load(Path("out")).pruning.structure for run in found] == ["2:4", "unstructured"] * 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train.epochs: 4", "train.epoch: 4", r"there is no key train.epoch .*did you mean train.epochs\?"),
        ("train.epochs: 4", "train.epochs: 0", r"dense/train.seed=1: train.epochs is 0.0; allowed: more than 0"),
        ("[0.5, 0.9]", "[]", "the grid of after has no values of pruning.sparsity; allowed: at least one"),
        ("[0.5, 0.9]", "[0.5, 0.5]", "has a value of pruning.sparsity twice; allowed: each once"),
        ("[0.5, 0.9]", "[0.5, 1.5]", r"after/.*=1.5: pruning.sparsity is 1.5; allowed"),
        ("model.path: dense", "model.path: dens", r"'dens' is unknown \(did you mean 'dense'\?\)"),
        ("model.path: dense", "model.path: after", "after wait for each other's models"),
        (
            "{recipe.name: dense}",
            "{}\n    grid: {lr.peak: [1, 2]}",
            r"the grid of the baseline dense has \['lr.peak'\], and that of after has not",
        ),
        ("baseline: dense", "baseline: danse", r"baseline 'danse' is unknown \(did you mean 'dense'\?\)"),
        ("baseline: dense", "ranks: 0", "ranks is 0; allowed: at least 1"),
        ("baseline: dense", "rank: 2", "is no sweep: .*rank"),
        ("set: {train.epochs: 4}", "set: {train.epochs: 4}\nranks: two", "is no sweep: .*two"),
        ("{recipe.name: dense}", "{train.seed: 3}", "train.seed is in grid or models of dense, and set beside it"),
        ("config: run.yaml", "config: other.yaml", "other.yaml does not exist"),
        ("baseline: dense", "results: a.csv", r"results is 'a.csv'; allowed: a name that ends in .jsonl"),
        ("model.path: dense", "train.output: dense", r"key of models in after 'train.output' is unknown"),
        ("  after:", "  ../after:", "a method is called '../after'; allowed: letters"),
        ("train.epochs: 4", "task.hub: null", "dense/train.seed=1: task.train is 'train', which is not there"),
        ("[0.5, 0.9]", "[0.5, 5.0e-1]", "twice"),
        ("{pruning.sparsity: [0.5, 0.9]}", "{task.validation: [a/m, a_m]}", "two runs have the name 'after/.*a_m'"),
        ("baseline: dense", "results: /sys/no.jsonl", "'/sys/no.jsonl' cannot be written"),
        ("baseline: dense", "compare: {after: [dens]}", r"method of compare 'dens' is unknown \(did you mean 'dense'"),
        (
            "baseline: dense",
            "compare: {after: [dense]}",
            r"after is compared with dense, whose grid has \['train.seed'\]; allowed: another method whose grid has "
            r"\['pruning.sparsity', 'train.seed'\]",
        ),
        ("baseline: dense", "compare: {after: [after]}", "after is compared with after"),
        ("train.epochs: 4", "train.seed: 4", "train.seed is in grid or models of dense, and set beside it"),
        ("train.epochs: 4", "train: {seed: 4}", "train.seed is in grid or models of dense, and set beside it"),
        ("train.epochs: 4", "train.output: a", "train.output is set; allowed: output"),
        ("train.epochs: 4", "train: {output: a}", "train.output is set; allowed: output"),
        ("train.epochs: 4", "wandb.name: a", "wandb.name is set; allowed: output"),
        ("{pruning.sparsity: [0.5, 0.9]}", "{train.output: [a]}", "train.output is set; allowed: output"),
        (
            "{recipe.name: one_shot}\n    grid: {pruning.sparsity: [0.5, 0.9]}",
            "{lr.peak: 1}\n    grid: {lr: [{peak: 2}, {peak: 3}]}",
            "lr.peak is in grid or models of after, and set beside it",
        ),
        (
            "{recipe.name: one_shot}\n    grid: {pruning.sparsity: [0.5, 0.9]}",
            "{deepspeed.student.bf16.enabled: true}\n    grid: {deepspeed.student.bf16.enabled: [true, false]}",
            "deepspeed.student.bf16.enabled is in grid or models of after",
        ),
        ("{recipe.name: one_shot}", "{model.path: a}", "model.path is in grid or models of after, and set beside it"),
        ("model.path: dense", "model.path: [dense]", r"method of models in after .*dense.* is unknown"),
        ("baseline: dense", "chance: .nan", "chance is nan; allowed: a number, or null"),
        ("baseline: dense", "budget: 0", "budget is 0.0; allowed: epochs, more than 0, or null"),
        (
            "baseline: dense",
            "budget: 4",
            "after/train.seed=1,pruning.sparsity=0.5 has 8 epochs with those of the models that it starts from; "
            "allowed with budget 4: as many",
        ),
        ("baseline: dense", "budget: 10", "has 8 epochs with those of the models that it starts from"),
        (
            "train.epochs: 4}",
            "train.epochs: 4, train.patience: 2, train.select: best}\nbudget: 8",
            "train.seed=1 has train.patience",
        ),
        (
            "{recipe.name: dense}",
            "{recipe.name: dense, train.batch_size: 8}\nbudget: 8",
            "after/train.seed=1,pruning.sparsity=0.5 has train.batch_size 32 and dense/train.seed=1 8",
        ),
        (
            "{recipe.name: dense}",
            "{recipe.name: dense, task.max_length: 8}\nbudget: 8",
            "after/train.seed=1,pruning.sparsity=0.5 has task.max_length 128 and dense/train.seed=1 8",
        ),
        ("{pruning.sparsity: [0.5, 0.9]}", f"{{task.train: [{'a' * 250}]}}", "a run cannot be called 'after/.*aaa"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(file: Path, old: str, new: str, message: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    assert not list((file.parent / "runs").glob("*/*")), "not even a folder or a log"


def test_a_budget_counts_the_models_that_a_run_starts_from_and_not_its_teacher(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        "  taught: {set: {train.epochs: 8, recipe.name: gmp, pruning.sparsity: 0.5}, models: {teacher.path: dense}}\n"
    )
    file.write_text(file.read_text() + more + "budget: 8\n")
    sweep(str(file), [], [], dry_run=True, only_table=False)
    assert capsys.readouterr().out.startswith("8 runs, 0 with a result, 8 to run")


def test_some_runs_are_carried_out_with_what_they_need(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(str(file), [], ["after/*seed=2*", "after/*=1,*=0.9"], dry_run=True, only_table=False)
    first, *to_run = capsys.readouterr().out.splitlines()
    assert first == "3 runs, 0 with a result, 5 to run"
    found = [each.name for each in runs(file)]
    assert to_run == [name for name in found if name != "after/train.seed=1,pruning.sparsity=0.5"]
    with pytest.raises(UserError, match=r"--only 'befor\*' fits no run; there are e.g. dense/train.seed=1, "):
        sweep(str(file), [], ["after/*", "befor*"], dry_run=True, only_table=False)


def test_a_model_that_several_runs_have_is_refused(file: Path) -> None:
    text = file.read_text().replace("baseline: dense", "")
    file.write_text(text.replace("{recipe.name: dense}", "{}\n    grid: {lr.peak: [1, 2]}"))
    with pytest.raises(UserError, match="fits 2 runs of dense; allowed: one"):
        runs(file)


def test_a_run_whose_name_looks_like_a_pattern_is_found_by_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = file.read_text().replace("pruning.sparsity: [0.5, 0.9]", "pruning.components: [[attention]]")
    file.write_text(text.replace("set: {recipe.name: one_shot}\n    grid", "grid"))
    name = 'after/train.seed=1,pruning.components=["attention"]'
    sweep(str(file), [], [name], dry_run=True, only_table=False)
    assert capsys.readouterr().out.splitlines()[1:] == ["dense/train.seed=1", name]


def test_a_sweeps_runs_are_a_group_in_wandb_unless_another_is_given(file: Path) -> None:
    groups = [runs(file, *given)[0].load(Path("out")).wandb.group for given in ((), ("wandb.group=mine",))]
    assert groups == ["sweep", "mine"]


def test_a_value_of_the_wrong_kind_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("methods: {a: {grid: {pruning.sparsity: 0.8}}}\n")
    with pytest.raises(UserError, match=r"no sweep: methods.a.grid.pruning.sparsity: Value 0.8 \(float\)") as caught:
        read_sweep(tmp_path / "sweep.yaml")
    assert "full_key" not in str(caught.value)
