"""Recipes: what they derive, what is given all the same, and that published schedules come out of them."""

import math
from fractions import Fraction
from pathlib import Path

import pytest

from distprune import settings
from distprune.config import Config
from distprune.durations import parse
from distprune.errors import UserError
from distprune.pruning.schedule import sparsity_ladder
from distprune.recipes import RECIPES, first_step_for, replicas_for
from distprune.training.lr import LrSchedule, lr_schedule

EPOCH = 1000
NEEDED = ["model.path=m", "teacher.path=t"]


def load(recipe: str, *overrides: str) -> Config:
    config = settings.load(None, [*NEEDED, f"recipe={recipe}", *overrides])
    settings.validate(config)
    return config


def schedules(config: Config) -> tuple[dict[int, Fraction], LrSchedule]:
    total = parse(str(config.train.epochs), "train.epochs").steps(EPOCH)
    return sparsity_ladder(config.pruning, EPOCH, total), lr_schedule(config.lr, EPOCH, total)


@pytest.mark.parametrize(
    ("sparsity", "replicas", "first"), [(0.5, 3, 0.2), (0.75, 4, 0.4), (0.8, 5, 0.4), (0.9, 6, 0.5), (0.97, 8, 0.7)]
)
def test_gmp_scales_with_the_target(sparsity: float, replicas: int, first: float) -> None:
    config = load("gmp", f"pruning.sparsity={sparsity}", "lr.peak=1e-4", "recipe.epochs=2")
    ladder, lr = schedules(config)
    assert (config.train.epochs, config.lr.final) == (2 * replicas, pytest.approx(1e-6))
    assert lr.rewinds == tuple(range(2 * EPOCH, 2 * replicas * EPOCH, 2 * EPOCH))
    assert (min(ladder), max(ladder)) == (2 * EPOCH, 2 * (replicas - 1) * EPOCH), "a replica before, and one behind"
    assert (ladder[min(ladder)], ladder[max(ladder)]) == (Fraction(str(first)), Fraction(str(sparsity)))
    assert {later - step for step, later in zip(sorted(ladder), sorted(ladder)[1:], strict=False)} == {EPOCH // 10}
    assert (config.distillation.hardness, config.distillation.temperature) == (1.0, 5.5)


def test_more_is_asked_of_a_higher_target() -> None:
    targets = [*(n / 100 for n in range(1, 100)), 0.9999]
    for rule in (replicas_for, first_step_for):
        values = [rule(target) for target in targets]
        assert values == sorted(values)
    assert all(0 <= first_step_for(target) < target or first_step_for(target) == 0 for target in targets)
    assert replicas_for(1 - 2**-5) == 7, "five halvings, exactly"
    assert all(2 ** (replicas_for(t) - 2) >= 1 / (1 - t) * (1 - 1e-9) for t in targets)


def test_what_is_given_stays() -> None:
    config = load("gmp", "pruning.sparsity=0.9", "pruning.initial=0.3", "distillation.temperature=2", "lr.final=0")
    assert (config.pruning.initial, config.distillation.temperature, config.lr.final) == (0.3, 2.0, 0.0)
    assert {"pruning.initial", "distillation.temperature", "lr.final"}.isdisjoint(config.recipe.derived)
    assert {"train.epochs", "pruning.start", "recipe.replicas"} <= set(config.recipe.derived)
    longer = load("gmp", "pruning.sparsity=0.9", "train.epochs=30")
    assert (longer.pruning.end, longer.lr.rewind_every) == ("28 epochs", "2 epochs")
    assert longer.recipe.replicas is None, "as many as fit"
    assert load("gmp", "pruning.sparsity=0.9", "recipe.replicas=15", "recipe.epochs=1.5").train.epochs == 22.5


def test_a_written_configuration_is_derived_again(tmp_path: Path) -> None:
    first = load("gmp", "pruning.sparsity=0.9", "lr.peak=2e-4")
    (tmp_path / "config.yaml").write_text(settings.to_yaml(first))
    assert settings.load(str(tmp_path / "config.yaml"), []) == first
    other = settings.load(str(tmp_path / "config.yaml"), ["pruning.sparsity=0.97"])
    assert (other.recipe.replicas, other.pruning.initial, other.lr.peak) == (8, 0.7, 2e-4)
    for recipe in ("null", "obert_10"):
        with pytest.raises(UserError, match=r"with recipe.name gmp, and recipe.name is .* the file that it was made"):
            settings.load(str(tmp_path / "config.yaml"), [f"recipe={recipe}"])
    written = (tmp_path / "config.yaml").read_text()
    for name in ("null", "obert_10"):
        (tmp_path / "edited.yaml").write_text(written.replace("  name: gmp", f"  name: {name}"))
        with pytest.raises(UserError, match=r"with recipe.name gmp, and recipe.name is (None|obert_10); allowed"):
            settings.load(str(tmp_path / "edited.yaml"), [])
    (tmp_path / "by_hand.yaml").write_text("recipe: {derived: [lr.peak]}\nlr: {peak: 0.5}\n")
    with pytest.raises(UserError, match=r"with recipe.name unknown, and recipe.name is None"):
        settings.load(str(tmp_path / "by_hand.yaml"), NEEDED)
    (tmp_path / "plain.yaml").write_text(settings.to_yaml(settings.load(None, NEEDED)))
    assert settings.load(str(tmp_path / "plain.yaml"), []) == settings.load(None, NEEDED)
    with pytest.raises(UserError, match=r"with recipe.name None, and recipe.name is gmp"):
        settings.load(str(tmp_path / "plain.yaml"), ["recipe=gmp", "pruning.sparsity=0.9"])


def test_a_recipe_in_a_file_may_be_its_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("recipe: gmp\nmodel: {path: m}\npruning: {sparsity: 0.8}\n")
    assert settings.load(str(tmp_path / "run.yaml"), []) == settings.load(
        None, ["recipe.name=gmp", "model.path=m", "pruning.sparsity=0.8"]
    )


def test_dense_is_as_long_as_it_is_told() -> None:
    assert load("dense").train.epochs == 2
    assert load("dense").lr.rewind_every is None
    assert load("dense", "recipe.epochs=0.1", "train.epochs=0.1").lr.rewind_every is None, "and not one at its end"
    pruned, dense = load("gmp", "pruning.sparsity=0.9"), load("dense", "recipe.replicas=6")
    assert schedules(pruned)[1] == schedules(dense)[1], "the same learning rate, step by step"
    assert (dense.pruning.sparsity, dense.distillation.hardness) == (0.0, 1.0)
    assert settings.load(None, ["recipe=dense", "model.path=m"]).distillation.hardness == 0


def test_one_shot_prunes_before_the_first_step_and_is_as_long_as_the_dense_recipe() -> None:
    config = load("one_shot", "pruning.sparsity=0.79", "recipe.epochs=3")
    ladder, lr = schedules(config)
    assert ladder == {0: Fraction("0.79")}
    assert lr == schedules(load("dense", "recipe.epochs=3"))[1]
    assert (config.train.epochs, config.distillation.hardness) == (3, 0)
    assert load("one_shot", "pruning.sparsity=0.5", "recipe.epochs=3", "recipe.replicas=4").train.epochs == 12


PUBLISHED = {  # oBERT's 30 epochs: percent at epochs 2, 6, ..., 26
    0.8: [70, 74.2, 77.0, 78.8, 79.6, 79.95, 80],
    0.9: [70, 78.4, 84.1, 87.5, 89.3, 89.9, 90],
    0.97: [70, 81.4, 89.0, 93.6, 96.0, 96.9, 97],
}


@pytest.mark.parametrize("sparsity", PUBLISHED)
def test_obert_30_has_the_published_ladder(sparsity: float) -> None:
    ladder, lr = schedules(load("obert_30", f"pruning.sparsity={sparsity}"))
    assert list(ladder) == [EPOCH * epoch for epoch in range(2, 27, 4)]
    assert [100 * float(value) for value in ladder.values()] == pytest.approx(PUBLISHED[sparsity], abs=0.06)
    assert lr.rewinds == tuple(ladder)
    assert (lr.peak, lr.final) == (5e-5, 5e-6)


def test_obert_is_another_one_for_question_answering() -> None:
    answers = ("task.name=question_answering", "pruning.sparsity=0.9")
    for name, peak, final in (("obert_10", 8e-5, 3e-5), ("obert_30", 8e-5, 8e-6)):
        config = load(name, *answers)
        assert (config.lr.peak, config.lr.final) == (peak, pytest.approx(final))
        assert (config.train.batch_size, config.task.max_length) == (16, 384)
        assert (config.pruning.score, config.fisher.block, config.fisher.samples) == ("obs", 50, 1024)
    glue = load("obert_10", "pruning.sparsity=0.9")
    assert (glue.lr.final, glue.train.batch_size, glue.task.max_length) == (2e-5, 32, 128)
    assert schedules(glue)[1].rewinds == (8 * EPOCH,)


def test_smc_gmp_is_the_baseline_to_beat() -> None:
    config = load("smc_gmp", "pruning.sparsity=0.9", "train.epochs=5", "lr.peak=1e-5")
    ladder, lr = schedules(config)
    assert list(ladder) == [1000, 1500, 2000, 2500, 3000, 3500, 4000], "at step 500 it would prune to 0"
    assert float(ladder[1500]) == pytest.approx(0.9 - 0.9 * (1 - 1000 / 3500) ** 3)
    assert ladder[4000] == Fraction("0.9")
    assert (lr.rewinds, lr.warmup, lr.at(lr.bounds[-1])) == ((), 250, 0.0)
    assert "token_embedding" in config.pruning.components
    assert "head" in config.pruning.components
    assert config.distillation.hardness == 0
    for recipe in ("dense", "smc_gmp"):
        as_long = load(recipe, f"pruning.sparsity={0.9 * (recipe != 'dense')}", "recipe.epochs=3", "recipe.replicas=2")
        assert as_long.train.epochs == 6
    assert (as_long.pruning.start, as_long.pruning.end) == ("0.6 epochs", "4.8 epochs")


def test_sparse_transfer_keeps_the_zeros() -> None:
    config = load("sparse_transfer")
    assert (config.train.epochs, config.pruning.start_sparse, config.pruning.sparsity) == (8.0, True, 0.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=gpm"], r"recipe.name 'gpm' is unknown \(did you mean 'gmp'\?\)"),
        (["recipe=gmp"], "pruning.sparsity is 0.0; allowed where recipe.name is gmp: more than 0"),
        (["recipe=gmp", "pruning.sparsity=0.9", "recipe.replicas=2"], "at least 3 replicas"),
        (
            ["recipe=gmp", "pruning.sparsity=0.9", "recipe.replicas=1", "pruning.start=0.5", "pruning.end=1.5"],
            "at least 2 replicas",
        ),
        (["recipe=gmp", "pruning.sparsity=0.9", "recipe.epochs=0"], "recipe.epochs is 0.0; allowed: more than 0"),
        (["recipe=gmp", "pruning.sparsity=0.9", "recipe.epochs=.nan"], "recipe.epochs is nan; allowed: more than 0"),
        (["recipe=gmp", "pruning.sparsity=0.9", "train.epochs=.inf"], "train.epochs is inf; allowed: more than 0"),
        (["recipe=smc_gmp", "pruning.sparsity=0.9", "train.epochs=.inf"], "train.epochs is inf; allowed: more than 0"),
        (["recipe=gmp", "pruning.sparsity=.nan"], "pruning.sparsity is nan; allowed where recipe.name is gmp"),
        (["recipe=gmp", "pruning.sparsity=0.9", "train.epochs=7"], "train.epochs is 7.0 .* whole replicas of recipe"),
        (["recipe=dense", "train.epochs=4", "recipe.replicas=2"], "allowed with recipe.name dense: one of the two"),
        (["recipe=dense", "pruning.sparsity=0.9"], "pruning.sparsity is 0.9; allowed where recipe.name is dense: 0"),
        (["recipe=one_shot"], "pruning.sparsity is 0.0; allowed where recipe.name is one_shot: more than 0"),
        (["recipe=smc_gmp"], "pruning.sparsity is 0.0; allowed where recipe.name is smc_gmp: more than 0"),
        (["recipe=obert_10"], "pruning.sparsity is 0.0; allowed where recipe.name is obert_10: more than 0"),
        (["recipe=dense", "recipe.replicas=0"], "recipe.replicas is 0; allowed: at least 1"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.load_valid(None, [*NEEDED, *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_every_derived_key_exists_and_has_a_reason(name: str) -> None:
    sparsity = 0.0 if name == "dense" else 0.8
    config, given = settings.load_given(None, [*NEEDED, f"recipe={name}", f"pruning.sparsity={sparsity}"])
    for key, derived in RECIPES[name](config, given).items():
        section, leaf = key.split(".")
        assert hasattr(getattr(config, section), leaf)
        assert derived.why
        assert not (isinstance(derived.value, float) and math.isnan(derived.value))
