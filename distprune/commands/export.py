"""``distprune export``: a checkpoint as a model; a model packed, as it was, or without zero heads and neurons."""

import copy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultipleChoice, PreTrainedModel

from distprune import dist
from distprune.checkpoints.files import is_checkpoint
from distprune.errors import UserError
from distprune.models.files import auto_class_of, load_tokenizer, new_directory, open_source, read_config, resolve
from distprune.models.from_checkpoint import export_checkpoint
from distprune.models.packed import is_packed, pack_directory, unpack_directory
from distprune.models.shrunk import load_shrunk, save_shrunk, shrink
from distprune.models.weights import most_tokens
from distprune.paths import expanded
from distprune.timing import seconds

_BATCH, _LENGTH, _REPEAT = 8, 128, 7
_TOLERANCE = 1e-5


def run(source: str, out: str, shrinking: bool = False, packing: bool = False) -> None:
    """Write a directory in another form, and print the bytes of its weights before and after.

    Collective, where it is a checkpoint: every rank calls it.
    """
    directory, target = expanded(source).resolve(), expanded(out)  # a run moves its link latest
    checkpoint = is_checkpoint(directory)
    if packing and not checkpoint:
        raise UserError(f"--packed is for checkpoints, which {source!r} is none; a model directory is packed without")
    if shrinking and checkpoint:
        raise UserError(f"--shrink is for model directories, and {source!r} is a checkpoint; export it first")
    if checkpoint:
        _export_checkpoint(directory, target, packing)
        return
    if dist.detect().size > 1:
        raise UserError(
            f"{source!r} is no checkpoint, and {dist.detect().size} ranks were started; allowed: one of them"
        )
    if shrinking:
        _shrink(resolve(source, None), target)
        return
    packed = is_packed(directory)
    before, after = (unpack_directory if packed else pack_directory)(directory, target)
    done = "unpacked" if packed else "packed"
    print(f"{done} {before:,} bytes into {after:,} ({after / before:.3f} of them) -> {target}")


def _export_checkpoint(directory: Path, target: Path, packing: bool) -> None:
    """Collective: every rank calls it."""
    if dist.detect().size > 1:
        dist.init()
    sizes = export_checkpoint(directory, target, packing)
    if dist.is_main():
        part = sizes["files"] / sizes["tensors"]
        print(f"wrote {sizes['files']:,} bytes ({part:.3f} of the {sizes['tensors']:,} in fp32) -> {target}")
    dist.shutdown()


def _shrink(directory: Path, target: Path) -> None:
    """Take out zero heads and neurons, prove in fp32 that the outputs are the same, and compare bytes and latency."""
    open_source(directory)  # refuses what is packed or shrunk
    auto_class, config = auto_class_of(directory), read_config(directory)
    number = getattr(config, "num_attention_heads", None)
    if number is None:
        raise UserError(f"{directory / 'config.json'} tells no num_attention_heads, which --shrink needs")
    whole = _load(directory, auto_class)
    small = copy.deepcopy(whole)
    removed = shrink(small, number)
    if removed.all_heads + removed.all_neurons == 0:
        raise UserError(f"{str(directory)!r} has no heads and neurons that --shrink knows; allowed: see docs/tasks.md")
    with new_directory(directory, target) as partial_dir:
        save_shrunk(small, load_tokenizer(str(directory)), partial_dir)
        small = load_shrunk(partial_dir, auto_class)
        first, second = (sum(parameter.nbytes for parameter in model.parameters()) for model in (whole, small))
        print(
            f"took out {removed.heads} of {removed.all_heads} heads, {removed.neurons} of {removed.all_neurons} neurons"
        )
        print(f"{first:,} bytes of weights before, {second:,} after ({second / first:.3f})")
        try:
            _compare(whole.float(), small.float(), chooses=auto_class is AutoModelForMultipleChoice)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"transformers cannot run a {type(whole).__name__} with fewer heads in a layer ({reason}); allowed: "
                "the directory as it is, or pruning.structure=neurons"
            ) from error
    print(f"-> {target}; in Python distprune.models.shrunk.load_shrunk({str(target)!r}) loads it")


def _load(directory: Path, auto_class: Any) -> PreTrainedModel:
    """Return the model of a directory, every weight of it, and no other, from its files.

    Raises:
        UserError: they have others, or it cannot be built.
    """
    try:
        model, report = auto_class.from_pretrained(directory, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # transformers raises many kinds, some over several lines
        reason = " ".join(str(error).split())
        raise UserError(f"{directory} cannot be loaded by {auto_class.__name__}: {reason}") from error
    for words, names in (("lacks", report["missing_keys"]), ("has more than the", report["unexpected_keys"])):
        if names:
            raise UserError(
                f"{directory} {words} weights of a {type(model).__name__}: {', '.join(sorted(names)[:5])}; allowed: a "
                "model that was fine-tuned for a task, as a run's final/"
            )
    whole: PreTrainedModel = model.eval()
    return whole


@torch.no_grad()
def _compare(whole: PreTrainedModel, small: PreTrainedModel, chooses: bool) -> None:
    """Prove that the outputs in fp32 are the same, and print how long each takes."""
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, most_tokens(whole) or _LENGTH)
    ids = torch.randint(2, whole.config.vocab_size, (_BATCH, length), generator=generator)
    if chooses:
        ids = ids[:, None]  # [examples, choices, tokens]

    def output(model: PreTrainedModel) -> Tensor:
        first: Tensor = model(input_ids=ids)[0]
        return first

    expected, found = output(whole), output(small)
    if not expected.isfinite().all():
        raise UserError(f"the outputs of the {type(whole).__name__} are not finite; allowed: finite weights")
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < _TOLERANCE, f"the outputs differ by {difference:.2g} of the largest"
    cpu = torch.device("cpu")
    pairs = [[seconds(partial(output, model), cpu) for model in (whole, small)] for _ in range(_REPEAT)]
    before, after = (1e3 * median(pair[column] for pair in pairs) for column in (0, 1))
    print(f"the same outputs, to {difference:.1g} of the largest")
    print(f"{before:.1f} ms for {_BATCH} x {length} tokens in fp32 before, {after:.1f} ms after ({after / before:.3f})")
