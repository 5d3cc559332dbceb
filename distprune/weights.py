"""Models in and out of Hugging Face directories, one tensor at a time.

Rank 0 maps one safetensors file and reads one tensor at a time; DeepSpeed broadcasts it and, at ZeRO-3, cuts it up
before the next one is read. transformers' own loader merges every file on rank 0 first, so it is not used. New
weights (a fresh head) are made by the model's own initialisation, on rank 0, from the run's seed.
"""

import ctypes
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from distprune import dist
from distprune.errors import UserError
from distprune.shards import full_shape

_TRIM_BYTES = 16 << 20
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_LEGACY = {"gamma": "weight", "beta": "bias"}


def resolve(path: str, revision: str | None) -> Path:
    """Return the directory of a model: itself, or the hub's snapshot in the local cache.

    Raises:
        UserError: where it is neither a directory nor a hub id that can be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists():
            raise UserError(f"{path} holds no config.json; allowed: a Hugging Face model directory or hub id")
        return local
    if local.exists() or path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1:
        raise UserError(f"model path {path!r} is not a directory; allowed: a Hugging Face model directory or hub id")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise UserError(
            f"model {path!r} is not a local directory, and the hub did not give it: {error}".splitlines()[0]
        ) from error


@dataclass
class Checkpoint:
    """The tensors of a model directory, by name, read lazily from one mapped file at a time."""

    directory: Path
    file_of: dict[str, Path] = field(init=False)
    _open: tuple[Path, Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.file_of = {}
        for file in self._files():
            with self._opening(file) as reader:
                self.file_of |= dict.fromkeys(reader.keys(), file)

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU."""
        file = self.file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, self._opening(file))
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def shape(self, name: str) -> list[int]:
        """Return the shape of one tensor, without reading it."""
        with self._opening(self.file_of[name]) as reader:
            shape: list[int] = reader.get_slice(name).get_shape()
        return shape

    def _files(self) -> list[Path]:
        """Return the files that there must be: those of the index, or the only one."""
        single, index = self.directory / "model.safetensors", self.directory / "model.safetensors.index.json"
        if not index.exists() and not single.exists():
            raise UserError(
                f"{self.directory} holds no model.safetensors (nor its index); save the model with "
                "transformers' save_pretrained, which writes that format"
            )
        if not index.exists():
            return [single]
        try:
            return sorted({self.directory / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is not an index of safetensors files: {error!r}") from error

    @staticmethod
    def _opening(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from error


def match_names(wanted: list[str], available: list[str], base_prefix: str) -> dict[str, str]:
    """Pair a model's tensor names with a checkpoint's.

    A checkpoint may be of the bare base model or of one with a head, so the base model's prefix may be missing or
    extra; old checkpoints call a norm's weight and bias gamma and beta.

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
        modern = f"{stem}.{_LEGACY.get(last, last)}" if stem else name
        stored[modern.removeprefix(prefix)] = name
    return {name: stored[bare] for name in wanted if (bare := name.removeprefix(prefix)) in stored}


class _StreamedParameters(nn.Module):
    """Stands in for a model in ``zero.Init(module=...)``: its parameters come into being as they are asked for."""

    def __init__(self, stream: Iterator[nn.Parameter]):
        super().__init__()
        self._stream = stream

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._stream


def load_model(
    directory: Path,
    auto_class: Any,
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    zero3: dict[str, Any] | None,
    seed: int,
    new_weights_allowed: bool,
) -> tuple[PreTrainedModel, list[str]]:
    """Build a model and fill it from a directory; at ZeRO-3, cut up as it is read.

    Collective: every rank calls it. Rank 0 reads the weights. Below ZeRO-3 the other ranks' are left unset, and
    DeepSpeed's engine broadcasts rank 0's.

    Args:
        directory: a Hugging Face model directory.
        auto_class: the transformers auto class.
        options: overrides of the model's configuration.
        dtype: type of the weights in memory.
        zero3: the engine's DeepSpeed configuration where the weights are to be partitioned, else None.
        seed: for the initialisation of weights that the checkpoint lacks.
        new_weights_allowed: whether the checkpoint may lack weights (a head to be trained).

    Returns:
        The model, and the names of the weights that were initialised anew.

    Raises:
        UserError: on every rank, where the directory does not hold such a model.
    """
    model, checkpoint = dist.agree(lambda: skeleton(directory, auto_class, options))
    sources = _sources(model, checkpoint)
    missing = [name for name, _ in model.named_parameters() if name not in sources]
    dist.agree(lambda: _check_match(model, checkpoint, sources, missing, new_weights_allowed))

    torch.manual_seed(seed)
    failures: list[UserError] = []
    stream = _materialise(model, checkpoint, sources, dtype, failures)
    if zero3 is not None:
        import deepspeed

        deepspeed.zero.Init(module=_StreamedParameters(_trimmed(stream)), config_dict_or_path=zero3)
    else:
        for _ in stream:
            pass
    _place_buffers(model, sources)
    dist.agree(lambda: _raise_first(failures))
    return model, missing


def _place_buffers(model: PreTrainedModel, sources: dict[str, str]) -> None:
    """Move buffers to this rank's device, and give rank 0's stored ones to all: DeepSpeed does it for parameters only.

    Collective: every rank calls it.
    """
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = placed = buffer.to(dist.detect().device)
            if (f"{path}.{name}" if path else name) in sources:
                torch_dist.broadcast(placed, src=0)


def _trimmed(stream: Iterator[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Give the memory of the whole parameters back to the system once DeepSpeed has cut them up.

    The C library would keep it, in holes between the pieces: ranks that held a quarter of a model's weights grew by
    nine tenths of its size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's; others do without
    held = 0
    for parameter in stream:
        yield parameter
        held += full_shape(parameter).numel() * parameter.element_size()
        if held >= _TRIM_BYTES:
            trim(0)
            held = 0


def read_config(directory: Path, options: dict[str, Any] | None = None) -> PretrainedConfig:
    """Return a model's configuration, with some values replaced.

    Raises:
        UserError: where config.json is no configuration that transformers knows.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, **(options or {}))
    except Exception as error:  # transformers raises many kinds, some over several lines
        reason = " ".join(str(error).split())
        raise UserError(f"{directory / 'config.json'} is not a model's configuration: {reason}") from error
    return config


def auto_class_of(directory: Path) -> Any:
    """Return the transformers auto class that a run would load a directory's model with."""
    classes = read_config(directory).architectures or []
    return AutoModelForSequenceClassification if "SequenceClassification" in "".join(classes) else AutoModel


def skeleton(directory: Path, auto_class: Any, options: dict[str, Any]) -> tuple[PreTrainedModel, Checkpoint]:
    """Build the model with parameters on the meta device, and open its checkpoint."""
    config = read_config(directory, options)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = auto_class.from_config(config)
        model.tie_weights()  # accelerate's empty parameters are each their own
    except Exception as error:  # transformers raises many kinds, some over several lines
        reason = " ".join(str(error).split())
        raise UserError(f"{directory} does not describe a model for {auto_class.__name__}: {reason}") from error
    return model, Checkpoint(directory)


def _sources(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the stored name of each parameter and buffer; a tied one may be stored under any of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [*parameters, *(name for name, _ in model.named_buffers())]
    stored = match_names(names, list(checkpoint.file_of), model.base_model_prefix)
    of_parameter = {id(parameters[name]): source for name, source in stored.items() if name in parameters}
    tied = {name: of_parameter[id(each)] for name, each in parameters.items() if id(each) in of_parameter}
    return tied | stored


def _check_match(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, str],
    missing: list[str],
    new_allowed: bool,
) -> None:
    if not sources:
        raise UserError(f"no weight in {checkpoint.directory} belongs to a {type(model).__name__}")
    if missing and not new_allowed:
        raise UserError(f"{checkpoint.directory} lacks weights of a {type(model).__name__}: {', '.join(missing[:5])}")
    prefix = model.base_model_prefix + "."
    # Checkpoints of language models have no pooler; it is trained with the head.
    lost = [name for name in missing if name.startswith(prefix) and "pooler" not in name]
    if lost:
        raise UserError(f"{checkpoint.directory} lacks weights of the base model: {', '.join(lost[:5])}")


def _materialise(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    sources: dict[str, str],
    dtype: torch.dtype,
    failures: list[UserError],
) -> Iterator[nn.Parameter]:
    """Give each module real parameters, filled on rank 0; yield each once its module is complete."""
    real: dict[int, nn.Parameter] = {}
    reading = dist.is_main()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        fresh: list[nn.Parameter] = []
        for name, meta in list(module.named_parameters(recurse=False)):
            if id(meta) not in real:
                real[id(meta)] = nn.Parameter(torch.empty(meta.shape, dtype=dtype), meta.requires_grad)
                fresh.append(real[id(meta)])
                if reading and prefix + name in sources:
                    _fill(real[id(meta)], prefix + name, sources[prefix + name], checkpoint, failures)
            module._parameters[name] = real[id(meta)]
        if reading:
            for name, buffer in module.named_buffers(recurse=False):
                if prefix + name in sources:
                    _fill(buffer, prefix + name, sources[prefix + name], checkpoint, failures)
            if any(not getattr(parameter, "_is_hf_initialized", False) for parameter in fresh):
                with torch.no_grad():
                    model._initialize_weights(module)
        yield from fresh


@torch.no_grad()
def _fill(target: Tensor, name: str, stored_name: str, checkpoint: Checkpoint, failures: list[UserError]) -> None:
    """Copy a stored tensor; a defect is noted, not raised, because the other ranks are in a broadcast."""
    stored = checkpoint.read(stored_name)
    if stored.shape != target.shape:
        failures.append(
            UserError(
                f"{name} has shape {list(stored.shape)} in {checkpoint.directory}, "
                f"and {list(target.shape)} in the model"
            )
        )
    elif stored.is_floating_point() and not torch.isfinite(stored).all():
        failures.append(UserError(f"{name} in {checkpoint.directory} holds NaN or infinite values"))
    else:
        target.copy_(stored)
    target._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark: leave it as it is


def _raise_first(failures: list[UserError]) -> None:
    if failures:
        raise failures[0]


def set_dropout(options: dict[str, Any], directory: Path, dropout: float | None) -> dict[str, Any]:
    """Return model options with every dropout that the model's configuration knows set to one value."""
    if dropout is None:
        return options
    known = read_config(directory).to_dict()
    names = [name for name in known if "dropout" in name and type(known[name]) in (int, float)]
    return options | dict.fromkeys(names, dropout)
