"""What of a configuration may change when a run goes on, and what would make another run of it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distprune.checkpoints.files import clear_behind, newest_first, newest_step
from distprune.checkpoints.run_directory import changes, is_unfinished
from distprune.config import Config, describe
from distprune.errors import UserError

MAY_CHANGE = {
    *("model.path", "model.revision", "model.tokenizer", "model.activation_checkpointing"),
    *("task.train", "task.validation", "task.more_validation", "teacher.cache", "teacher.rebuild_cache"),
    *("train.output", "train.epochs", "train.eval_batch_size", "train.eval_every", "train.accumulation"),
    *("train.patience", "train.log_every", "train.deterministic", "recipe", "lr", "optimizer", "distillation"),
    *("deepspeed", "checkpoint", "wandb"),
}
"""Keys and whole sections; everything else settles masks, data or the order of the data."""


@pytest.mark.parametrize("key", describe())
def test_a_change_is_said_or_refused(key: str) -> None:
    section, _, name = key.partition(".")
    old = asdict(Config())
    changed = replace(Config(), **{section: replace(getattr(Config(), section), **{name: "another"})})
    if key in ("recipe.derived", "recipe.derived_by"):
        assert changes(old, changed) == [], "what follows from it is said"
    elif MAY_CHANGE & {key, section}:
        assert changes(old, changed) == [f"{key} {old[section][name]!r} -> 'another'"]
    else:
        with pytest.raises(UserError, match=f"{key} is 'another', and was .* when the run began; allowed: the same"):
            changes(old, changed)


def test_a_key_that_follows_from_a_recipe_is_said_to() -> None:
    config = Config()
    config.recipe.derived, config.pruning.start = ["pruning.start"], "3 epochs"
    with pytest.raises(UserError, match=r"pruning.start is '3 epochs' by its recipe, and was"):
        changes(asdict(Config()), config)


def test_a_teacher_may_have_moved_where_the_checkpoint_has_its_hash() -> None:
    config = Config()
    config.teacher.path = "elsewhere"
    assert changes(asdict(Config()), config, knows_teacher=True) == ["teacher.path None -> 'elsewhere'"]


def test_a_directory_whose_first_file_was_cut_off_is_new(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.partial").write_text("task:")
    assert not is_unfinished(tmp_path)


def test_what_an_older_checkpoint_does_not_know_is_as_it_was() -> None:
    old = asdict(Config())
    del old["pruning"]["score"], old["regrowth"]
    assert changes(old, Config()) == []


def test_a_users_copy_of_a_checkpoint_is_none(tmp_path: Path) -> None:
    for name in ("step-00000010", "step-00000020", "step-00000030", "step-00000020.bak", "step-old", "damaged-step-1"):
        (tmp_path / name).mkdir()
    assert [path.name[-2:] for path in newest_first(tmp_path)] == ["30", "20", "10"]
    assert newest_step(tmp_path) == 30
    clear_behind(tmp_path, 20)
    left = {"step-00000010", "step-00000020", "step-00000020.bak", "step-old", "damaged-step-1"}
    assert {path.name for path in tmp_path.iterdir()} == left | {"damaged-step-00000030"}
