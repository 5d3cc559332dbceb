"""Model directories: found, described, and their tensors read by name, one at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any, Protocol

import xxhash
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from distprune import dist
from distprune.checkpoints.files import is_checkpoint
from distprune.checkpoints.pieces import Pieces
from distprune.disk import hash_of, partial_of
from distprune.errors import UserError, written
from distprune.paths import expanded

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_TWICE = "consolidated*.safetensors"
"""Weights a second time, as other tools read them."""
SHRUNK = "shrunk.json"
"""What a shrunk model's directory holds: the sizes of its matrices."""
_HASHED = ("*.safetensors", "*.safetensors.index.json", "config.json", SHRUNK)
"""What a model's weights and shape are read from, and nothing that other tools may leave beside it."""
_LEGACY = {"gamma": "weight", "beta": "bias"}
_LEGACY_MODULES = {"embed_out": "lm_head"}

AUTO_CLASSES = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForMultipleChoice": AutoModelForMultipleChoice,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForCausalLM": AutoModelForCausalLM,
    "LMHeadModel": AutoModelForCausalLM,
}
"""By what the names of models' classes hold."""


class Source(Protocol):
    """The tensors of a model in files, by name."""

    directory: Path
    file_of: dict[str, Path]

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU."""

    def shape(self, name: str) -> list[int]:
        """Return the shape of one tensor, without reading it."""


def open_source(directory: Path, shrunk_allowed: bool = False) -> Source:
    """Return the tensors of a Hugging Face directory, or of a checkpoint.

    Raises:
        UserError: where they cannot be read, or are those of a shrunk model that is not allowed.
    """
    return Pieces(directory) if is_checkpoint(directory) else ModelFiles(directory, shrunk_allowed)


def resolve(path: str, revision: str | None, download: bool = True) -> Path:
    """Return the directory of a model: itself, or the hub's snapshot in the local cache.

    Args:
        path: a directory or a hub id.
        revision: of a hub id.
        download: whether the hub is asked for what is not in the cache.

    Raises:
        UserError: where it is neither a directory nor a hub id that can be reached, or a checkpoint, or a directory of
            which a revision is asked for.
    """
    local = expanded(path)
    if local.is_dir():
        if not (local / "config.json").exists():
            final = local / "final"
            hint = f"{final}, the model of that run" if final.exists() else "a Hugging Face model directory or hub id"
            raise UserError(f"{path} holds no config.json; allowed: {hint}")
        if is_checkpoint(local):
            raise UserError(f"{path!r} is a checkpoint; allowed: a model directory, as distprune export makes")
        if revision is not None:
            raise UserError(f"{path} is a directory, of which there is no revision {revision!r}; allowed: null")
        return local
    if local.exists() or path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"model path {path!r} is not a directory; allowed: a Hugging Face model directory or hub id")
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=_FILES,
                ignore_patterns=["*/*", _TWICE],
                local_files_only=not download,
            )
        )
    except Exception as error:
        raise UserError(
            f"model {path!r} is not a local directory, and the hub did not give it: {error}".splitlines()[0]
        ) from error


def hash_of_weights(directory: Path) -> str:
    """Return a hash of the files that a model's weights and shape are read from.

    Raises:
        UserError: one of them cannot be read.
    """
    weights = xxhash.xxh3_128()
    for path in hashed_files(directory):
        try:
            weights.update(f"{path.name} {hash_of(path)};".encode())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}; allowed: files that this user may read") from error
    return weights.hexdigest()


def hashed_files(directory: Path) -> list[Path]:
    """Return the files that `hash_of_weights` is of, in its order."""
    found = {path for pattern in _HASHED for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.match(_TWICE))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a model directory or on the hub.

    Raises:
        UserError: where there is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(expanded(path), trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(
            f"{path!r} gives no tokenizer: {reason}; allowed: a directory or hub id with tokenizer files"
        ) from error
    # Without its files transformers makes one of special tokens alone, or with a word boundary, from config.json.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = tokenizer.get_vocab().keys() - special - {*tokenizer.all_special_tokens}
    if len(words) < 2:
        raise UserError(
            f"{path!r} gives no tokenizer: it has special tokens alone, as where the directory lacks the tokenizer's "
            "files; allowed: model.tokenizer, or tokenizer.save_pretrained(DIRECTORY)"
        )
    return tokenizer


def begin_directory(source: Path, target: Path) -> Path:
    """Return an empty directory beside a new one; it is given that one's name once it is complete.

    Args:
        source: what the new one is made of.
        target: the new one.

    Raises:
        UserError: the new one exists, is within the source, or cannot be made.
    """
    if target.exists():
        raise UserError(f"{str(target)!r} exists; allowed: a new directory")
    partial = partial_of(target)
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{str(target)!r} is within {str(source)!r}, of which it is made; allowed: outside of it")
    if partial.exists():
        raise UserError(
            f"{str(partial)!r} exists, as a command that runs or was cut off leaves it; allowed: another directory, or "
            "without it"
        )
    with written(target):
        partial.mkdir(parents=True)
    return partial


@contextmanager
def gone_if_it_fails(directory: Path) -> Iterator[None]:
    """Remove a directory that is written within a ``with`` where that fails; on rank 0, as others may still write."""
    try:
        yield
    except BaseException:
        if dist.is_main():
            shutil.rmtree(directory, ignore_errors=True)
        raise


@contextmanager
def new_directory(source: Path, target: Path) -> Iterator[Path]:
    """Give what is written within a ``with`` the new directory's name in the end; it goes where that fails.

    Yields:
        The directory of `begin_directory`.

    Raises:
        UserError: as `begin_directory` does.
    """
    partial = begin_directory(source, target)
    with gone_if_it_fails(partial):
        yield partial
        with written(target):
            partial.rename(target)


@dataclass
class ModelFiles:
    """The tensors of a model directory, by name, read lazily from one mapped file at a time."""

    directory: Path
    shrunk_allowed: bool = False
    file_of: dict[str, Path] = field(init=False)
    _open: tuple[Path, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.file_of = {}
        for file in self._files():
            with opened(file) as reader:
                self.file_of |= dict.fromkeys(reader.keys(), file)

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU."""
        tensor: Tensor = self._reader(name).get_tensor(name)
        return tensor

    def part(self, name: str, start: int, end: int) -> Tensor:
        """Return the elements ``[start, end)`` of one flattened tensor, on the CPU; only their rows are read."""
        rows = self._reader(name).get_slice(name)
        columns = prod(rows.get_shape()[1:])
        first = start // columns
        read: Tensor = rows[first : ceil(end / columns)]
        return read.flatten()[start - first * columns : end - first * columns]

    def shape(self, name: str) -> list[int]:
        """Return the shape of one tensor, without reading it."""
        with opened(self.file_of[name]) as reader:
            shape: list[int] = reader.get_slice(name).get_shape()
        return shape

    def _reader(self, name: str) -> Any:
        file = self.file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, opened(file))
        return self._open[1]

    def _files(self) -> list[Path]:
        """Return the files that there must be: those of the index, or the only one."""
        if (self.directory / SHRUNK).exists() and not self.shrunk_allowed:
            raise UserError(
                f"{self.directory} holds a shrunk model, which distprune eval alone takes; allowed: the directory that "
                "it was made of"
            )
        single, index = self.directory / "model.safetensors", self.directory / "model.safetensors.index.json"
        if not index.exists() and not single.exists():
            if any(self.directory.glob("packed-model*")):
                raise UserError(
                    f"{self.directory} holds a packed model; allowed: the directory that distprune export makes of it"
                )
            raise UserError(
                f"{self.directory} holds no model.safetensors (nor its index); save the model with "
                "transformers' save_pretrained, which writes that format"
            )
        if not index.exists():
            return [single]
        try:
            return sorted({self.directory / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors files: {error!r}") from error


def opened(file: Path) -> Any:
    """Return a reader of a file of tensors, for a ``with`` or to be kept.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from error


def match_names(wanted: list[str], available: list[str], base_prefix: str) -> dict[str, str]:
    """Pair a model's tensor names with a checkpoint's.

    A checkpoint may be of the bare base model or of one with a head, so the base model's prefix may be missing or
    extra; old checkpoints call a norm's weight and bias gamma and beta, and those of GPT-NeoX the head embed_out.

    Args:
        wanted: the model's names.
        available: the checkpoint's names.
        base_prefix: the model's ``base_model_prefix``.

    Returns:
        The checkpoint's name of each model name that has one.
    """
    prefix = base_prefix + "."
    stored: dict[str, str] = {}
    for name in available:
        stem, _, last = name.rpartition(".")
        modern = f"{_LEGACY_MODULES.get(stem, stem)}.{_LEGACY.get(last, last)}" if stem else name
        stored[modern.removeprefix(prefix)] = name
    return {name: stored[bare] for name in wanted if (bare := name.removeprefix(prefix)) in stored}


def read_config(directory: Path, options: dict[str, Any] | None = None) -> PretrainedConfig:
    """Return a model's configuration, with some values replaced.

    Raises:
        UserError: where config.json is no configuration that transformers knows.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False, **(options or {}))
    except Exception as error:  # transformers raises many kinds, some over several lines
        reason = " ".join(str(error).split())
        raise UserError(f"{directory / 'config.json'} is not a model's configuration: {reason}") from error
    return config


def auto_class_of(directory: Path) -> Any:
    """Return the transformers auto class that a run would load a directory's model with."""
    names = "".join(read_config(directory).architectures or [])
    return next((auto_class for part, auto_class in AUTO_CLASSES.items() if part in names), AutoModel)
