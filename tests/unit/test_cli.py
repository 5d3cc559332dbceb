import gc
import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from distprune import __version__, settings
from distprune.__main__ import imported, main
from distprune.config import describe
from distprune.errors import UserError

RUN = """
model: {path: student}
task: {train: train.jsonl, validation: validation.jsonl, text: [text], holdout: 0.25}
train: {epochs: 6, batch_size: 4}
lr: {peak: 1e-3, final: 0, rewind_every: 2 epochs}
pruning: {sparsity: 0.9, initial: 0.5, start: 2 epochs, end: 4 epochs, every: 0.5 epochs}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a configuration and 40 examples."""
    for name in ("RANK", "SLURM_PROCID", "DISTPRUNE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    lines = [json.dumps({"text": f"number {n}", "label": n % 2}) + "\n" for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return tmp_path


BENCH = {"threads": 1, "json_path": None}


@pytest.fixture
def calls(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the commands that need an engine were called with."""
    seen: list[dict] = []
    for name in ("train", "eval", "oneshot", "schedule", "export", "bench", "analyze", "plan"):
        command = SimpleNamespace(run=lambda **options: seen.append(options))
        monkeypatch.setitem(sys.modules, f"distprune.commands.{name}", command)
    return seen


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["train", "run.yaml"], {"config_path": "run.yaml", "overrides": []}),
        (["train", "run.yaml", "a.b=1", "c=2"], {"config_path": "run.yaml", "overrides": ["a.b=1", "c=2"]}),
        (["--local_rank=3", "train", "run.yaml", "a=1"], {"config_path": "run.yaml", "overrides": ["a=1"]}),
        (["train", "run.yaml", "--local_rank=3", "a=1"], {"config_path": "run.yaml", "overrides": ["a=1"]}),
        (["eval", "m", "run.yaml", "a=1"], {"model_dir": "m", "config_path": "run.yaml", "overrides": ["a=1"]}),
        (
            ["schedule", "run.yaml", "a=1", "--examples", "7", "b=2"],
            {"config_path": "run.yaml", "overrides": ["a=1", "b=2"], "examples": 7, "png": "schedule.png"},
        ),
        (
            ["schedule", "--png", "x=1.png", "run.yaml"],
            {"config_path": "run.yaml", "overrides": [], "examples": None, "png": "x=1.png"},
        ),
        (
            ["oneshot", "m", "out", "a=1", "b=2"],
            {"model_dir": "m", "out": "out", "config_path": None, "overrides": ["a=1", "b=2"]},
        ),
        (
            ["oneshot", "m", "out", "run.yaml", "a=1"],
            {"model_dir": "m", "out": "out", "config_path": "run.yaml", "overrides": ["a=1"]},
        ),
        (["export", "m", "out"], {"source": "m", "out": "out", "shrinking": False, "packing": False}),
        (["export", "m", "out", "--shrink"], {"source": "m", "out": "out", "shrinking": True, "packing": False}),
        (["export", "c", "out", "--packed"], {"source": "c", "out": "out", "shrinking": False, "packing": True}),
        (
            ["bench", "select", "--sizes", "1e3", "2e3", "--alone"],
            {"benchmark": "select", "sizes": [1e3, 2e3], "alone": True, "dtype": "fp32", "repeat": 5} | BENCH,
        ),
        (
            ["analyze", "components", "run.yaml", "--sparsities", "0.6", "0.9", "--layers"],
            {"subject": "components", "config_path": "run.yaml", "overrides": [], "sparsities": [0.6, 0.9]}
            | {"layers": True, "png": "components.png", "json_path": None},
        ),
        (
            ["analyze", "teacher", "run.yaml", "a=1", "--json", "t.json"],
            {"subject": "teacher", "config_path": "run.yaml", "overrides": ["a=1"], "rows": 2000, "temperatures": []}
            | {"png": "teacher.png", "json_path": "t.json"},
        ),
        (
            ["plan", "x.yaml", "--world", "4", "a.b=1"],
            {"config_path": "x.yaml", "overrides": ["a.b=1"], "world": 4, "examples_per_s": None},
        ),
        (
            ["bench", "step", "--stage", "3", "--repeat", "2"],
            {"benchmark": "step", "model": "bert-base", "stage": 3, "batch_size": 32, "length": 128}
            | {"dtype": "bf16", "repeat": 2}
            | BENCH,
        ),
    ],
)
def test_commands_get_their_arguments(calls: list[dict], arguments: list[str], options: dict) -> None:
    assert main(arguments) == 0
    assert calls == [options]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: COMMAND"),
        (["trian", "run.yaml"], "invalid choice: 'trian'"),
        (["train"], "required: CONFIG"),
        (["train", "run.yaml", "--fast"], "unknown arguments: --fast"),
        (["schedule", "run.yaml", "--examples", "many"], "invalid int value: 'many'"),
        (["schedule", "run.yaml", "--examples", "7", "word"], "unknown arguments: word"),
        (["config", "gone.yaml"], "gone.yaml does not exist"),
        (["config", "run.yaml", "pruning.sparsty=0.9"], "did you mean pruning.sparsity?"),
        (["config", "run.yaml", "lr.peak=0"], "lr.peak is 0.0; allowed: more than 0"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_status_2(calls, capsys, arguments: list[str], part: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("distprune: error: ")
    assert part in error
    assert error.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_rank_0_prints_but_every_rank_fails(workplace, monkeypatch, capsys, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert main(["config", "gone.yaml"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(variable, "0")
    assert main(["config", "gone.yaml"]) == 2
    assert "gone.yaml" in capsys.readouterr().err


def test_where_the_end_cannot_be_noted_it_is_as_it_is(workplace, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DISTPRUNE_ENDED", "/dev/full")
    assert main(["config"]) == 0
    assert "No space left" in capsys.readouterr().err


def test_debug_shows_where_a_mistake_was_found(workplace, monkeypatch) -> None:
    monkeypatch.setenv("DISTPRUNE_DEBUG", "1")
    with pytest.raises(UserError, match=r"gone\.yaml"):
        main(["config", "gone.yaml"])


def test_other_errors_keep_their_traceback(calls, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distprune.commands.train", SimpleNamespace(run=lambda **_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.yaml"])


def test_version_is_printed(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"distprune {__version__}\n"


def test_config_prints_every_key_with_its_meaning_and_can_be_read_again(workplace, capsys) -> None:
    assert main(["config", "run.yaml", "wandb.tags=[a,b]", "train.batch_size=8"]) == 0
    text = capsys.readouterr().out
    (workplace / "again.yaml").write_text(text)
    expected = settings.load("run.yaml", ["wandb.tags=[a,b]", "train.batch_size=8"])
    assert settings.load("again.yaml", []) == expected
    lines = text.splitlines()
    for path, meaning in describe().items():
        comment = lines.index(f"  # {meaning}", lines.index(_header(lines, path.split(".")[0])))
        assert lines[comment + 1].startswith(f"  {path.split('.')[1]}:")


def _header(lines: list[str], section: str) -> str:
    return next(line for line in lines if line.startswith(f"{section}:"))


def test_config_without_a_file_prints_the_defaults_with_overrides(workplace, capsys) -> None:
    assert main(["config", "lr.peak=0.5"]) == 0
    (workplace / "again.yaml").write_text(capsys.readouterr().out)
    assert settings.load("again.yaml", []) == settings.load(None, ["lr.peak=0.5"])


def test_config_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'deepspeed', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys; from distprune.__main__ import main; main(['config']); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("ending", ["", "raise ValueError"])
def test_garbage_is_not_collected_while_a_command_is_imported_and_is_thereafter(workplace, monkeypatch, ending) -> None:
    monkeypatch.syspath_prepend(workplace)
    name, before = f"seen_{len(ending)}", gc.get_freeze_count()
    (workplace / f"{name}.py").write_text(f"import gc, sys\nsys.collecting = gc.isenabled()\n{ending}\n")
    with pytest.raises(ValueError) if ending else nullcontext():  # noqa: PT011
        imported(name)
    assert not vars(sys).pop("collecting")
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--png", "no/such/folder/x.png"], "'no/such/folder/x.png' cannot be written"),
        (["--png", "x.nonsense"], "'x.nonsense' cannot be written"),
        (["--examples", "-5"], "--examples is -5; allowed: at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_drawn_is_one_sentence(workplace, capsys, arguments: list[str], part: str) -> None:
    assert main(["schedule", "run.yaml", *arguments]) == 2
    assert part in capsys.readouterr().err


def test_schedule_counts_the_data_prints_a_table_and_draws(workplace, capsys) -> None:
    assert main(["schedule", "run.yaml"]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    # 30 examples in batches of 4 are 7 steps an epoch.
    assert cells == [
        ["0.00", "0", "1.00e-03", "0.00%", ""],
        ["1.00", "7", "5.00e-04", "0.00%", ""],
        ["2.00", "14", "1.00e-03", "50.00%", "rewind, pruning 1 of 5"],
        ["2.57", "18", "7.14e-04", "73.12%", "pruning 2 of 5"],
        ["3.00", "21", "5.00e-04", "85.00%", "pruning 3 of 5"],
        ["3.57", "25", "2.14e-04", "89.38%", "pruning 4 of 5"],
        ["4.00", "28", "1.00e-03", "90.00%", "rewind, pruning 5 of 5"],
        ["5.00", "35", "5.00e-04", "90.00%", ""],
        ["6.00", "42", "0.00e+00", "90.00%", "end"],
    ]
    said = "7 steps per epoch (2 of 30 examples, which fill no batch, are left out of each), 42 steps; schedule.png"
    assert said in out
    assert sorted(path.name for path in workplace.iterdir()) == ["run.yaml", "schedule.png", "train.jsonl"]
    picture = imread("schedule.png")
    assert picture.shape[0] > 500
    assert picture.std() > 0.05


def test_a_schedule_from_0_without_rewinds_fills_its_picture(workplace) -> None:
    plain = ["lr.rewind_every=null", "pruning.initial=0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="distprune")
        assert main(["schedule", "run.yaml", *plain]) == 0
    rows = (imread("schedule.png")[..., :3] < 0.99).any(axis=(1, 2))
    gaps = np.diff(np.flatnonzero(rows))
    assert gaps.max() < len(rows) / 5, "no part of it is empty"


def test_schedule_and_config_say_what_a_recipe_has_set_and_why(workplace, capsys) -> None:
    recipe = ["recipe=gmp", "recipe.epochs=1", "pruning.sparsity=0.9", "pruning.initial=0.25", "teacher.path=t"]
    recipe += ["lr.peak=1.5e-4", "lr.final=0"]
    (workplace / "short.yaml").write_text("model: {path: m}")
    assert main(["schedule", "short.yaml", *recipe, "--examples", "640"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "recipe gmp" in shown
    assert "pruning.end │ 5 epochs │ ahead of the last replica" in shown
    assert "pruning.initial │ 0.25 │ given; the recipe has 0.5" in shown
    assert "lr.final │ 0 │ given; the recipe has 1.5e-06" in shown
    assert main(["config", "short.yaml", *recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("  end: 5 epochs") - 1].endswith("[set by the recipe gmp]")
    assert not lines[lines.index("  initial: 0.25") - 1].endswith("]")


def test_schedule_takes_the_number_of_examples(workplace, capsys) -> None:
    arguments = ["schedule", "run.yaml", "--examples", "4000", "--png", "a.png", "pruning.every=0.01 epochs"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "1000 steps per epoch, 6000 steps; a.png" in out
    assert "pruning 201 of 201" in out
    assert len([line for line in out.splitlines() if "│" in line]) <= 42  # thinned


def test_schedule_of_a_dense_run_has_one_panel(workplace, capsys) -> None:
    assert main(["schedule", "run.yaml", "--examples", "400", "pruning.sparsity=0"]) == 0
    assert "pruning" not in capsys.readouterr().out
    assert imread("schedule.png").shape[0] < 700


def test_schedule_that_does_not_fit_the_data_is_refused(workplace, capsys) -> None:
    assert main(["schedule", "run.yaml", "--examples", "400", "pruning.end=600 steps"]) == 2
    assert "pruning.end is '600 steps', step 600 of 600" in capsys.readouterr().err
    assert not Path("schedule.png").exists()
