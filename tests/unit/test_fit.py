"""What a model must have in common with a run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from distprune.config import Config
from distprune.errors import UserError
from distprune.models.weights import skeleton
from distprune.pruning.targets import freeze
from distprune.training.fit import check_zeros
from tests.distributed.engines import write_model

WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("rows", [0, 3])
def test_zeros_that_a_run_would_not_keep_are_not_said_to_stay(tmp_path: Path, rows: int) -> None:
    """Rows for padding are no such zeros."""
    directory, config = write_model(tmp_path / "model"), Config()
    config.pruning.start_sparse = True
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[WORDS][torch.arange(rows) + 1] = 0.0
    tensors[WORDS][0] = 0.0
    save_file(tensors, file, {"format": "pt"})
    model, _ = skeleton(directory, AutoModelForSequenceClassification, {})
    assert model.get_submodule(WORDS.removesuffix(".weight")).padding_idx == 0
    if rows == 0:
        check_zeros(config, model, directory)
        return
    with pytest.raises(UserError, match=rf"^{10 * rows} of \d+ weights of {WORDS} are zero, and it is not among what"):
        check_zeros(config, model, directory)
    config.pruning.components = [*config.pruning.components, "token_embedding"]
    check_zeros(config, model, directory)
    config.pruning.components.remove("token_embedding")
    config.pruning.start_sparse = False
    check_zeros(config, model, directory)
    config.pruning.start_sparse = True
    freeze(model, ["embeddings"])
    check_zeros(config, model, directory)
