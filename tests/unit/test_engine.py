"""What distprune adds to DeepSpeed's own start; engines themselves need ranks and are tested in tests/distributed."""

import deepspeed
import pytest

from distprune import engine
from distprune.errors import UserError


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError, ValueError])
def test_what_deepspeed_refuses_at_its_start_is_one_sentence(monkeypatch, kind):
    def refuse(**_: object) -> None:
        raise kind("ZeRO does not go\n  with the pipeline")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(UserError, match=r"^DeepSpeed refuses the options of deepspeed\.teacher: ZeRO does not go with"):
        engine._initialize("deepspeed.teacher", object(), {})


def test_a_defect_in_its_start_keeps_its_traceback(monkeypatch):
    def fail(**_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(deepspeed, "initialize", fail)
    with pytest.raises(TypeError):
        engine._initialize("deepspeed.student", object(), {})
