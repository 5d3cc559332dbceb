"""A sweep's results and run directories, without a run."""

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from distprune import settings
from distprune.commands import sweep as command
from distprune.commands.sweep import run as sweep
from distprune.errors import UserError
from distprune.sweeps import results
from distprune.sweeps.execute import Outcome
from distprune.sweeps.spec import Run
from tests.unit.sweep_files import row, runs, write_finished, write_sweep

SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.jsonl"))
    if '"point"' in path.read_text().partition("\n")[0]  # a sweep's
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_results_go_on_from_their_lines_alone(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, found = file.parent / "runs", runs(file)
    stored = output / "results.jsonl"
    for each in found[1:-1]:
        results.append(stored, row(each, 0.5, output))
    sweep(str(file), [], [], dry_run=True, only_table=False)
    first, *to_run = capsys.readouterr().out.splitlines()
    assert first == "6 runs, 4 with a result, 3 to run"
    assert to_run == [found[0].name, found[1].name, found[-1].name], "the model of the last is not here any more"
    results.append(stored, row(found[0], 0.5, output))
    results.append(stored, row(found[-1], 0.5, output))
    sweep(str(file), [], [], dry_run=True, only_table=False)
    assert capsys.readouterr().out == "6 runs, 6 with a result, 0 to run\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "line 2 is no result of a run; allowed: without that line"),
        (lambda text: text + "{}\n", "line 3 is no result of a run"),
        (lambda text: text + text.splitlines()[0] + "\n", "line 3 is a second result of dense/train.seed=1"),
        (lambda text: text.replace('"train.epochs": 4.0', '"train.epochs": 5.0'), "train.epochs 5.0 -> 4.0; allowed"),
        (lambda text: text.replace('"final_metric": 0.5', '"final_metric": NaN'), "line 1 is no result of a run"),
        (lambda text: text.replace('"steps": 100', '"steps": null'), "line 1 is no result of a run"),
        (lambda text: text.replace('"models": {}', '"models": []'), "line 1 is no result of a run"),
        (
            lambda text: text.replace('"method": "dense"', '"method": "after"'),
            "of another method, point or models than",
        ),
    ],
)
def test_results_that_do_not_fit_are_refused(file: Path, change: Any, message: str) -> None:
    output = file.parent / "runs"
    stored = output / "results.jsonl"
    for each in runs(file)[:2]:
        results.append(stored, row(each, 0.5, output))
    stored.write_text(change(stored.read_text()))
    with pytest.raises(UserError, match=message):
        sweep(str(file), [], [], dry_run=True, only_table=False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_results_that_are_shipped_can_be_gone_on_with(path: Path) -> None:
    """They are of several versions: what later ones have added, older lines lack."""
    assert results.read_rows(path)


def test_a_directory_of_another_run_is_refused(file: Path) -> None:
    output, (first, *_) = file.parent / "runs", runs(file)
    directory = output / first.name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("model: {path: other}\ntask: {hub: a, validation: b}\ntrain: {seed: 7}\n")
    with pytest.raises(
        UserError, match=r"holds a run with other settings, .* -> .*; allowed: another output, or without it"
    ):
        sweep(str(file), [], [], dry_run=True, only_table=False)


def test_a_directory_of_a_run_from_another_model_is_refused(file: Path) -> None:
    """Its configuration tells whose model it had, and not what the sweep gives the run now."""
    directory = _written(file, "after")
    text = (directory / "config.yaml").read_text()
    sweep(str(file), [], [], dry_run=True, only_table=False)
    assert "dense/train.seed=1/final" in text
    (directory / "config.yaml").write_text(text.replace("dense/train.seed=1/final", "dense/train.seed=2/final"))
    with pytest.raises(UserError, match=r"model.path \"dense/train.seed=2\" -> \"dense/train.seed=1\"; allowed"):
        sweep(str(file), [], [], dry_run=True, only_table=False)


def _written(file: Path, method: str) -> Path:
    """Return the directory of a method's first run, with the configuration that the run writes."""
    run, output = next(each for each in runs(file) if each.method == method), file.parent / "runs"
    (output / run.name).mkdir(parents=True)
    (output / run.name / "config.yaml").write_text(settings.to_yaml(run.load(output)))
    return output / run.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metric_name": "acc', "cannot be read"),
        ("[]", "is no summary of a run"),
        ("{}", "has no 'metric_name'; allowed: without that run's directory"),
    ],
)
def test_a_summary_that_is_not_whole_is_refused_before_anything_runs(file: Path, text: str, message: str) -> None:
    directory = _written(file, "dense")
    (directory / "summary.json").write_text(text)
    with pytest.raises(UserError, match=message):
        sweep(str(file), [], [], dry_run=True, only_table=False)


def test_a_run_of_an_older_version_goes_on_counting(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its summary has no hashes of its data, and its line the folders of data in paths of two parts."""
    run = next(each for each in runs(file) if each.method == "dense")
    directory = _written(file, "dense")
    (directory / "summary.json").write_text(json.dumps(dict.fromkeys(results.OF_SUMMARY, 0) | {"metric_name": "f1"}))
    (directory / "metrics.jsonl").touch()
    overrides = ["task.hub=null", "task.train=a/b.jsonl", "task.validation=a/c.jsonl"]
    (directory / "config.yaml").write_text(settings.to_yaml(runs(file, *overrides)[0].load(file.parent / "runs")))
    sweep(str(file), overrides, [], dry_run=False, only_table=True)
    stored = file.parent / "runs" / "results.jsonl"
    text = stored.read_text()
    assert '"task.train": "b.jsonl"' in text
    stored.write_text(text.replace('"b.jsonl"', '"a/b.jsonl"'))
    sweep(str(file), overrides, [], dry_run=True, only_table=False)
    assert "6 runs, 1 with a result, 5 to run" in capsys.readouterr().out
    assert json.loads(stored.read_text())["run"] == run.name


def test_a_results_file_that_is_none_is_refused(file: Path) -> None:
    (file.parent / "a.jsonl").mkdir()
    (file.parent / "b.jsonl").write_bytes(b"\xff\xfe")
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(UserError, match=rf"{name} cannot be read: .*; allowed: a file of results"):
            sweep(str(file), [], [], dry_run=True, only_table=False, results_file=str(file.parent / name))


def test_a_line_that_a_full_disk_cuts_off_is_taken_back(file: Path) -> None:
    stored, (first, second, *_) = file.parent / "results.jsonl", runs(file)
    results.append(stored, row(first, 0.5, file.parent))
    before, limits = stored.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
            results.append(stored, row(second, 0.5, file.parent))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored.read_bytes() == before


def test_a_file_system_without_locks_keeps_results_too(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(results.fcntl, "flock", missing)
    stored, (first, *_) = file.parent / "results.jsonl", runs(file)
    results.append(stored, row(first, 0.5, file.parent))
    assert len(stored.read_text().splitlines()) == 1
    assert "results.jsonl cannot be locked" in caplog.text


def test_a_table_names_what_has_failed(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = runs(file)
    output, failed = file.parent / "runs", "after/train.seed=1,pruning.sparsity=0.5"
    results.append(output / "results.jsonl", row(first, 0.75, output))
    monkeypatch.setattr(command, "_run", lambda *_: Outcome({failed: Path("a.log")}, ["after/x"]))
    with pytest.raises(
        UserError, match=rf"1 of 6 runs failed, see their logs: {failed} \(a.log\); not run without them"
    ):
        sweep(str(file), [], [], dry_run=False, only_table=False)
    said = f"Without a result, and in none of the means: {second.name}, {failed}, after/x\n"
    assert said in capsys.readouterr().out
    assert said in (output / "results.md").read_text()


def test_a_table_is_made_of_what_there_is(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="has no result of this sweep yet"):
        sweep(str(file), [], [], dry_run=False, only_table=True)
    output = file.parent / "runs"
    results.append(output / "results.jsonl", row(runs(file)[0], 0.75, output))
    sweep(str(file), [], [], dry_run=False, only_table=True)
    with pytest.raises(UserError, match=r"train.batch_size the default -> 8; allowed"):
        sweep(str(file), ["train.batch_size=8"], [], dry_run=False, only_table=True)
    assert "| dense |  | 0.7500 |" in capsys.readouterr().out
    assert (output / "results.md").exists()
    assert json.loads((output / "results.jsonl").read_text())["final_metric"] == 0.75


def test_a_table_takes_up_what_jobs_of_their_own_have_carried_out(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(each for each in runs(file) if each.method == "dense")
    folder = file.parent / "runs" / run.name
    write_finished(run, file.parent / "runs", 0.0)
    config = run.load(file.parent / "runs")
    config.train.batch_size += 1
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    with pytest.raises(UserError, match=r"holds a run with other settings, train\.batch_size"):
        sweep(str(file), [], [], dry_run=False, only_table=True)
    config.train.batch_size -= 1
    (folder / "config.yaml").write_text(settings.to_yaml(config))
    sweep(str(file), [], [], dry_run=False, only_table=True)
    assert "| dense |  | 0.0000 |" in capsys.readouterr().out
    assert [
        row["run"] for row in map(json.loads, (file.parent / "runs" / "results.jsonl").read_text().splitlines())
    ] == [run.name]


def test_the_key_that_was_given_is_named_before_those_that_follow_from_it(file: Path) -> None:
    run = next(each for each in runs(file) if each.method == "dense")
    results.append(file.parent / "runs" / "results.jsonl", row(run, 0.75, file.parent / "runs"))
    with pytest.raises(UserError, match=r"lr.peak the default -> 0.0002; allowed"):  # which lr.final follows
        sweep(str(file), ["lr.peak=2e-4"], [], dry_run=True, only_table=False)
    assert results.difference({}, {"a.b": 2, "a.a": 1}, ["a.a"]) == "a.b the default -> 2"


def test_a_model_that_ends_elsewhere_when_it_is_trained_again_is_told_of(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = file.parent / "runs"
    dense, after = runs(file)[0], runs(file)[2]
    results.append(output / "results.jsonl", row(dense, 0.75, output))

    def carry_out(left: list[Run], *arguments: Any) -> Outcome:
        for each in left:
            write_finished(each, output, 0.5)
            arguments[3](each)
        return Outcome({}, [])

    monkeypatch.setattr(command, "carry_out", carry_out)
    sweep(str(file), [], [after.name], dry_run=False, only_table=False)
    said = capsys.readouterr().out
    assert f"{dense.name} was trained again, and its line has 0.75: what builds on it builds on this one" in said
    assert said.count("was trained again") == 1
