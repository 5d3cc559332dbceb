"""Local data of a sweep's runs, and results that are shared."""

import json
import shutil
from pathlib import Path

import pytest

from distprune import settings
from distprune.errors import UserError
from distprune.models.files import hash_of_weights
from distprune.sweeps import results
from distprune.sweeps.data import check_files
from distprune.sweeps.opened import open_sweep
from distprune.tasks.files import hashes_of
from tests.unit.sweep_files import row, runs, write_sweep


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_results_on_other_data_of_the_same_name_are_refused(file: Path) -> None:
    stored, (first, *_) = file.parent / "runs" / "results.jsonl", runs(file)
    overrides = ["task.hub=null"]
    for folder, text in (("a", "one"), ("b", "two")):
        (file.parent / folder).mkdir()
        overrides += [f"task.{split}={file.parent / folder}/{split}.jsonl" for split in ("train", "validation")]
        for split in ("train", "validation"):
            (file.parent / folder / f"{split}.jsonl").write_text(text)
    with_a, with_b = overrides[:3], [overrides[0], *overrides[3:]]
    opened = open_sweep(str(file), with_a)
    data = hashes_of(opened.configs[first.name].task)
    assert data.keys() == {"task.train train.jsonl", "task.validation validation.jsonl"}
    results.append(stored, row(first, 0.5, opened.output) | {"settings": opened.settings[first.name], "data": data})
    open_sweep(str(file), with_a)
    with pytest.raises(UserError, match=r"measured on another task.train train.jsonl than the one that is there now"):
        open_sweep(str(file), with_b)
    (file.parent / "b" / "train.jsonl").unlink()
    (file.parent / "b" / "validation.jsonl").unlink()
    assert first.name in open_sweep(str(file), with_b).rows, "another machine, without the data"


def test_a_finished_run_on_data_that_have_changed_is_refused(file: Path) -> None:
    output, (first, *_) = file.parent / "runs", runs(file)
    for split in ("train", "validation"):
        (file.parent / f"{split}.jsonl").write_text("one")
    overrides = ["task.hub=null", *(f"task.{split}={file.parent}/{split}.jsonl" for split in ("train", "validation"))]
    opened = open_sweep(str(file), overrides)
    config = opened.configs[first.name]
    (output / first.name).mkdir(parents=True)
    (output / first.name / "config.yaml").write_text(settings.to_yaml(config))
    summary = dict.fromkeys(results.OF_SUMMARY, 0) | {"data": hashes_of(config.task)}
    (output / first.name / "summary.json").write_text(json.dumps(summary))
    opened.check_directories([first])
    (file.parent / "train.jsonl").write_text("other")
    with pytest.raises(UserError, match=r"holds a run on another task.train train.jsonl than the one"):
        opened.check_directories([first])


def test_results_of_a_model_of_the_same_name_whose_files_have_changed_are_refused(file: Path) -> None:
    """But a sweep's own models: those are trained again where they are missing."""
    stored, model = file.parent / "runs" / "results.jsonl", file.parent / "m"
    model.mkdir()
    (model / "model.safetensors").write_text("weights")
    overrides = [f"model.path={model}"]
    opened = open_sweep(str(file), overrides)
    for run in opened.runs:
        hashes = {"model.path": "of another file" if run.models else hash_of_weights(model)}
        line = row(run, 0.5, opened.output) | {"settings": opened.settings[run.name], "model_files": hashes}
        results.append(stored, line)
    assert len(open_sweep(str(file), overrides).rows) == len(opened.runs)
    (model / "pytorch_model.bin").write_text("is not read")
    (model / "gone").symlink_to(model / "nowhere")
    assert len(open_sweep(str(file), overrides).rows) == len(opened.runs)
    (model / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"dense/.* was measured with other files of model.path than those that are"):
        open_sweep(str(file), overrides)
    shutil.rmtree(model)
    assert open_sweep(str(file), overrides).rows, "another machine, without the model"


def test_a_run_directory_is_read_as_it_was_written_and_not_by_the_rules_of_today(file: Path) -> None:
    """A run that was derived by another rule is no run of today's sweep."""
    run = next(run for run in runs(file) if run.method == "after")
    opened = open_sweep(str(file), [])
    directory = opened.output / run.name
    directory.mkdir(parents=True)
    config = opened.configs[run.name]
    (directory / "config.yaml").write_text(settings.to_yaml(config))
    opened.check_directories([run])
    config.pruning.end = "1 epochs"
    assert "pruning.end" in config.recipe.derived
    (directory / "config.yaml").write_text(settings.to_yaml(config))
    with pytest.raises(UserError, match=r'holds a run with other settings, pruning.end "1 epochs" -> '):
        open_sweep(str(file), []).check_directories([run])


def test_a_run_has_one_line_also_where_two_sweeps_carry_it_out(file: Path) -> None:
    stored, first = file.parent / "shared.jsonl", runs(file)[0]
    opened = open_sweep(str(file), [], str(stored))
    for metric in (0.5, 0.75):
        results.append(stored, row(first, metric, opened.output))
    opened.read()
    assert opened.rows[first.name]["final_metric"] == 0.5


def test_validation_data_that_a_holdout_replaces_need_not_be_there(file: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    data = (f"task.hub=null task.train={tmp_path}/train.jsonl").split()
    (run, *_) = runs(file, *data, "task.validation=gone.jsonl")
    with pytest.raises(UserError, match=r"task.validation is 'gone.jsonl', which is not there"):
        check_files(run, run.load(tmp_path))
    (run, *_) = runs(file, *data, "task.validation=gone.jsonl", "task.holdout=0.1")
    check_files(run, run.load(tmp_path))


def test_the_hash_is_of_what_a_model_is_read_from(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "config.json").write_text("{}")
    before = hash_of_weights(tmp_path)
    (tmp_path / "consolidated.safetensors").write_text("weights")
    (tmp_path / "README.md").write_text("of another tool")
    assert hash_of_weights(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("others")
    assert hash_of_weights(tmp_path) != before
