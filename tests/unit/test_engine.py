"""What distprune adds to DeepSpeed's own start; engines themselves need ranks and are tested in tests/distributed."""

import deepspeed
import pytest

from distprune.engines import build
from distprune.errors import UserError


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError, ValueError])
def test_what_deepspeed_refuses_at_its_start_is_one_sentence(monkeypatch, kind):
    def refuse(**_: object) -> None:
        raise kind("ZeRO does not go\n  with the pipeline")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(UserError, match=r"^DeepSpeed refuses the options of deepspeed\.teacher: ZeRO does not go with"):
        build._initialize("deepspeed.teacher", object(), {})


def test_a_defect_in_its_start_keeps_its_traceback(monkeypatch):
    def fail(**_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(deepspeed, "initialize", fail)
    with pytest.raises(TypeError):
        build._initialize("deepspeed.student", object(), {})


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_reduced_in_place_where_deepspeed_all_reduces_them(stage):
    options = build.with_defaults({"zero_optimization": {"stage": stage}})
    in_place = options["zero_optimization"].get("reduce_scatter") is False
    assert in_place == (stage in (1, 2)), "ZeRO-3's reduce-scatter is a real one"
    assert options.get("prescale_gradients", False) == in_place


def test_a_section_of_the_user_keeps_its_own_options():
    given = {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}
    options = build.with_defaults(given)
    assert options["zero_optimization"]["reduce_scatter"]
    assert "prescale_gradients" not in options, "DeepSpeed refuses both together"
    assert options["steps_per_print"] == 10
    assert given == {"zero_optimization": {"stage": 2, "reduce_scatter": True}, "steps_per_print": 10}
