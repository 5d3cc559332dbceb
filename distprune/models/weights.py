"""Models out of Hugging Face directories into memory, one tensor at a time.

Rank 0 maps one safetensors file and reads one tensor at a time; DeepSpeed broadcasts it and, at ZeRO-3, cuts it up
before the next one is read. transformers' own loader merges every file on rank 0 first, so it is not used. New
weights (a fresh head) are made by the model's own initialisation, on rank 0, from the run's seed.
"""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME

from distprune import dist
from distprune.errors import UserError
from distprune.models.files import SHRUNK, ModelFiles, Source, match_names, open_source, read_config
from distprune.models.shrunk import take_sizes
from distprune.zero.shards import Shard, full_shape

_TRIM_BYTES = 16 << 20
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALLOWED = "allowed: weights in fp32, bf16, fp16 or fp64"


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
    frozen: bool,
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
        frozen: it is only run. So it may be shrunk, and lacks no weights (as a head to be trained).

    Returns:
        The model, and the names of the weights that were initialised anew.

    Raises:
        UserError: on every rank, where the directory does not hold such a model.
    """
    model, checkpoint = dist.agree(lambda: skeleton(directory, auto_class, options, shrunk_allowed=frozen))
    sources = _sources(model, checkpoint)
    missing = dist.agree(lambda: missing_weights(model, checkpoint, new_allowed=not frozen))
    dist.agree(lambda: _check_tied(model, checkpoint) if dist.is_main() else None)

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


@torch.no_grad()
def fill_masters(model: PreTrainedModel, directory: Path, shards: Iterable[Shard]) -> None:
    """Give fp32 weights the values in a model's files, of which bf16 and fp16 weights are only roundings.

    DeepSpeed makes them of those: magnitudes would be equal by the thousand, and the first pruning decided by place.

    Args:
        model: loaded from the directory.
        directory: a Hugging Face model directory.
        shards: this rank's, of the model's trained parameters; those that the files lack stay as they are.

    Raises:
        UserError: this rank's files are not those that rank 0 has read.
    """
    checkpoint = ModelFiles(directory)
    sources = _sources(model, checkpoint)
    for shard in (each for each in shards if each.name in sources):
        values = checkpoint.part(sources[shard.name], shard.start, shard.end).to(shard.low_precision.device)
        if not torch.equal(values.to(shard.low_precision.dtype), shard.low_precision):
            raise UserError(
                f"{shard.name} in {directory} is not what rank 0 has read there; allowed: the same model on all nodes"
            )
        shard.master.copy_(values)


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


def skeleton(
    directory: Path, auto_class: Any, options: dict[str, Any], shrunk_allowed: bool = False
) -> tuple[PreTrainedModel, Source]:
    """Build the model with parameters on the meta device, and open its checkpoint.

    Raises:
        UserError: the directory is none of such a model, or a shrunk one that is not allowed.
    """
    config = read_config(directory, options)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{directory} is a quantized model; {_ALLOWED}")
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            # In fp32: the type of the config's own would be that of computed buffers, and another after a resume.
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()  # accelerate's empty parameters are each their own
        model.config.use_cache = False  # of keys and values, which only generation reads
    except Exception as error:  # transformers raises many kinds, some over several lines
        reason = " ".join(str(error).split())
        raise UserError(f"{directory} does not describe a model for {auto_class.__name__}: {reason}") from error
    if any(buffer.is_meta for buffer in model.buffers()):
        raise UserError(f"a {type(model).__name__} makes buffers of its weights; allowed: another architecture")
    source = open_source(directory, shrunk_allowed)
    if (directory / SHRUNK).exists():
        take_sizes(model, directory)
    if model.can_generate() and (directory / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, source


def most_tokens(model: PreTrainedModel) -> int | None:
    """Return how many tokens an example may have; None where the model's configuration names no limit.

    Embeddings of positions that have one for padding are counted on from behind it, as RoBERTa's 512 of 514 are.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    positions = positions or getattr(model.config, "max_seq_len", None)  # MPT's
    if not positions or positions < 0:
        return None
    tables = [each for name, each in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return positions - max(padding) - 1 if padding else positions


def stored_names(model: PreTrainedModel, checkpoint: Source) -> dict[str, list[str]]:
    """Return the names of each parameter and buffer in files, its own first; a tied one may have any of several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [*parameters, *(name for name, _ in model.named_buffers())]
    own = match_names(names, list(checkpoint.file_of), model.base_model_prefix)
    of_parameter: dict[int, list[str]] = {}
    for name in own.keys() & parameters.keys():
        of_parameter.setdefault(id(parameters[name]), []).append(own[name])
    found = {name: [own[name]] for name in own}
    for name, each in parameters.items():
        found[name] = list(dict.fromkeys([*found.get(name, []), *sorted(of_parameter.get(id(each), []))]))
    return {name: names for name, names in found.items() if names}


def names_to_prune(
    model: PreTrainedModel, checkpoint: Source, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """Return the names in files of each weight that is to be pruned.

    Args:
        model: that has the weights.
        checkpoint: the files.
        shapes: of the weights, by the model's names.

    Raises:
        UserError: where one is missing, or has another shape.
    """
    stored = stored_names(model, checkpoint)
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(f"{checkpoint.directory} lacks {name}, which is to be pruned")
        found = checkpoint.shape(stored[name][0])
        if found != list(shape):
            raise UserError(f"{name} has shape {found} in {checkpoint.directory}, and {list(shape)} in the model")
    return {name: stored[name] for name in shapes}


def _check_tied(model: PreTrainedModel, checkpoint: Source) -> None:
    """Refuse tied weights that are stored with other values, of which one would be lost: transformers unties them."""
    stored = stored_names(model, checkpoint)
    for first, *others in (stored[name] for name, _ in model.named_parameters() if name in stored):
        for other in others:
            if not torch.equal(checkpoint.read(first), checkpoint.read(other)):
                raise UserError(
                    f"{first} and {other} in {checkpoint.directory} differ, and are one weight by its config.json; "
                    "allowed: equal ones, or, for embeddings and output, tie_word_embeddings: false in config.json"
                )


def _sources(model: PreTrainedModel, checkpoint: Source) -> dict[str, str]:
    """Return a name in files of each parameter and buffer."""
    return {name: names[0] for name, names in stored_names(model, checkpoint).items()}


def missing_weights(model: PreTrainedModel, checkpoint: Source, new_allowed: bool) -> list[str]:
    """Return the names of the parameters that a checkpoint lacks.

    Raises:
        UserError: any, unless new ones are allowed; or such as are no head's.
    """
    sources = _sources(model, checkpoint)
    missing = [name for name, _ in model.named_parameters() if name not in sources]
    if not sources:
        raise UserError(f"no weight in {checkpoint.directory} belongs to a {type(model).__name__}")
    if missing and not new_allowed:
        raise UserError(
            f"{checkpoint.directory} lacks weights of a {type(model).__name__}: {', '.join(missing[:5])}; allowed: a "
            "model that was fine-tuned for the task"
        )
    prefix = model.base_model_prefix + "."
    # Checkpoints of language models have no pooler; it is trained with the head. A decoder's head is no new one.
    lost = [name for name in missing if (name.startswith(prefix) and "pooler" not in name) or model.can_generate()]
    if lost:
        raise UserError(f"{checkpoint.directory} lacks weights of the pretrained model: {', '.join(lost[:5])}")
    return missing


def _materialise(
    model: PreTrainedModel,
    checkpoint: Source,
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
def _fill(target: Tensor, name: str, stored_name: str, checkpoint: Source, failures: list[UserError]) -> None:
    """Copy a stored tensor; a defect is noted, not raised, because the other ranks are in a broadcast."""
    stored = checkpoint.read(stored_name)
    if stored.shape != target.shape:
        failures.append(
            UserError(
                f"{name} has shape {list(stored.shape)} in {checkpoint.directory}, and {list(target.shape)} in the "
                "model; allowed: the same, or, for another task's head, the model saved without it, as "
                "transformers.AutoModel.from_pretrained(DIR).save_pretrained(NEW) does"
            )
        )
    elif target.is_floating_point() and stored.dtype not in _FLOATS:
        kind = str(stored.dtype).removeprefix("torch.")
        failures.append(
            UserError(f"{name} in {checkpoint.directory} is in {kind}; allowed: weights in fp32, bf16, fp16 or fp64")
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
    numbers = [name for name in known if type(known[name]) in (int, float)]
    names = [name for name in numbers if "dropout" in name or name.endswith("pdrop")]  # GPT-2 has resid_pdrop
    whole_layers = [name for name in numbers if name.endswith("layerdrop")] if dropout == 0 else []
    return options | dict.fromkeys([*names, *whole_layers], dropout)


def check_dropout(model: PreTrainedModel, dropout: float | None) -> None:
    """Refuse a dropout that `set_dropout` does not reach, as in configurations within one.

    Raises:
        UserError: with the module.
    """
    for name, module in model.named_modules():
        if dropout is not None and isinstance(module, nn.Dropout) and module.p not in (0.0, dropout):
            raise UserError(
                f"model.dropout is {dropout}, and {name} of a {type(model).__name__} keeps {module.p}; allowed: null, "
                "and dropout as its config.json has it"
            )
