"""What plain words of YAML are, by themselves and in configurations."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distprune import settings, yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("yes", "no", "on", "2:4", "0123", "1_000", "2026-01-01", "0x10", "1.2.3", "e5")),
        *((word, True) for word in ("true", "True")),
        *((word, None) for word in ("null", "~", "")),
        *((word, 1e-4) for word in ("1e-4", "1.0e-4", "0.0001", ".0001")),
        ("-3", -3),
        ("5.", 5.0),
        ("'12'", "12"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_words_are_what_version_1_2_says(text: str, value: Any) -> None:
    found = yaml12.parse(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "[1", "? [a]\n: 1", "&a [*a]", "1" * 5000, "[" * 5000])
def test_what_is_no_yaml_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        yaml12.parse(text)


def test_plain_words_of_a_file_are_texts(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("pruning: {structure: 2:4}\ntask: {labels: [no, yes]}\nmodel: {revision: 0123}")
    config = settings.load(str(file), [])
    assert (config.pruning.structure, config.task.labels, config.model.revision) == ("2:4", ["no", "yes"], "0123")
    assert settings.load(None, ["task.labels=[on, off]"]).task.labels == ["on", "off"]


@pytest.mark.parametrize("text", ["2:4", "0123456", "1e5", "12:30", "on", "1_000", "null "])
def test_a_text_on_the_command_line_stays_as_it_is(text: str) -> None:
    expected = None if text.strip() == "null" else text
    assert settings.load(None, [f"model.revision={text}"]).model.revision == expected
