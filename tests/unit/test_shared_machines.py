"""On machines that many share: what others have put somewhere, or handed over, does nothing of its own."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from distprune.checkpoints import files
from distprune.checkpoints.files import Manifest, read_manifest
from distprune.commands.train import _enter
from distprune.config import Config
from distprune.disk import Damaged, Entry
from distprune.errors import UserError
from distprune.models.card import chosen_by
from distprune.models.files import load_tokenizer, read_config
from distprune.models.weights import skeleton
from distprune.pruning import native


def test_machine_code_is_not_loaded_from_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = native._folder()
    assert native.library.__wrapped__() is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert native.library.__wrapped__() is None
    folder.chmod(0o700)
    for turned in (0o777, 0o1777):
        tmp_path.chmod(turned)
        assert (native.why_none() is None) == bool(turned & 0o1000), "only of a sticky folder others turn nothing"
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to("elsewhere")
    assert f"others may write to {folder}" in str(native.why_none())


@pytest.mark.parametrize("name", ["../.profile", "/etc/passwd", "sub/rank-00000.safetensors", "..", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_damaged(tmp_path: Path, name: str) -> None:
    saving = files.saving_path(tmp_path, 7)
    saving.mkdir()
    (saving / "sub").mkdir()
    target = saving / name
    if not target.exists():
        target.write_text("some")
    entry = Entry(name, target.stat().st_size, "")
    checkpoint = files.complete(tmp_path, Manifest(7, {}, [entry]))
    with pytest.raises(Damaged, match="that does not lie beside it"):
        read_manifest(checkpoint)


def test_code_in_a_models_directory_is_not_offered_to_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    named = {"AutoConfig": "code.Config", "AutoTokenizer": ["code.Tokenizer", None]}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps({"model_type": "of_its_own", "auto_map": named}))
    for call in (lambda: read_config(tmp_path), lambda: load_tokenizer(str(tmp_path))):
        with pytest.raises(UserError, match="custom code"):
            call()
    of_another_task = {"model_type": "vit", "auto_map": {"AutoModelForMaskedLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(of_another_task))
    with pytest.raises(UserError, match="custom code"):
        skeleton(tmp_path, AutoModelForMaskedLM, {})


def test_a_directory_that_cannot_be_entered_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / ".lock").mkdir()  # opens as little as another user's file
    with pytest.raises(UserError, match="cannot be written: "):
        _enter(tmp_path)


def test_what_is_published_names_local_paths_by_their_last_two_parts(tmp_path: Path) -> None:
    config = {name: vars(getattr(Config(), name)) for name in ("pruning", "regrowth", "distillation")}
    config["pruning"]["weights_of"] = str(tmp_path / "round_1" / "final")
    assert chosen_by(config)["pruning"]["weights_of"] == "round_1/final"
