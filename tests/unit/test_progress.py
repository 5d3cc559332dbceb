"""The progress of a run, as plain lines and as a bar."""

import io
import re
import sys

import pytest
from rich.console import Console

from distprune.monitor.progress import Bar, Lines, for_stdout, line

TRAIN = {"step": 1, "epoch": 0.5, "split": "train", "loss": 0.25, "lr": 1e-4, "sparsity": 0.5}
VALIDATION = {"step": 2, "epoch": 1.0, "split": "validation", "accuracy": 0.75, "sparsity": 0.5}


def test_lines_are_plain_and_few(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(total_steps=2000) as lines:
        for step in range(1, 2001):
            lines.move(step, {"loss": 0.31234, "sparsity": 0.455, "lr": 1.2e-4, "examples_per_s": 213.4})
        lines.log(VALIDATION)
        lines.log(TRAIN)
    printed = capsys.readouterr().out
    assert not re.search(r"[^\n -~]", printed), "control characters"
    *progress, validation = printed.splitlines()
    assert len(progress) == 21
    assert progress[1] == ("step 100/2000 (5%)  loss 0.3123  sparsity 45.5%  lr 1.2e-04  213 examples/s  left 0:00:00")
    assert progress[-1].startswith("step 2000/2000 (100%)")
    assert validation == "validation at step 2, epoch 1.00  accuracy 0.7500  sparsity 50.0%"


def test_time_left_counts_from_the_step_where_this_process_began(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 110.0])
    monkeypatch.setattr("distprune.monitor.progress.time.monotonic", lambda: next(now))
    lines = Lines(total_steps=1000)
    lines.move(500, {})
    lines.move(600, {"loss": 1.0})
    first, second = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert second == "step 600/1000 (60%)  loss 1.0000  left 0:00:40"


@pytest.mark.parametrize(
    ("value", "said"), [(0.25, "loss 0.2500"), (3e-6, "loss 3.0e-06"), (0.0, "loss 0.0000"), (1489.0, "loss 1489.0000")]
)
def test_a_small_loss_is_not_shown_as_none(value: float, said: str) -> None:
    assert line({"loss": value}) == said


def test_values_that_are_not_given_again_stay(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(total_steps=10)
    lines.move(1, {"accuracy": 0.5, "loss": 2.0})
    lines.move(2, {"loss": 1.0})
    assert "accuracy 0.5000  loss 1.0000" in capsys.readouterr().out.splitlines()[1]


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    with Bar(2000, Console(file=output, force_terminal=True, width=120)) as bar:
        bar.move(500, {"loss": 0.25})
        bar.log(VALIDATION)
        bar.move(1000, {"sparsity": 0.5})
    shown = output.getvalue()
    assert "1000/2000" in shown
    assert "loss 0.2500  sparsity 50.0%" in shown
    assert "validation at step 2, epoch 1.00  accuracy 0.7500" in shown

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(for_stdout(1), Bar)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert isinstance(for_stdout(1), Lines)


def test_bar_does_not_take_resumed_steps_for_speed() -> None:
    bar = Bar(2000, Console(file=io.StringIO()))
    bar.move(1900, {})
    assert bar._bar.tasks[0].speed is None
    assert bar._bar.tasks[0].completed == 1900
