"""The components of a transformer, told by the structure of its modules: which parameters are of which.

The paper's first guideline is about them: prune those whose pruning pays.
"""

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distprune.zero.shards import full_shape


def component_matrices(model: nn.Module) -> dict[str, str]:
    """Return the component of each matrix that has one, by the parameter's name, in the model's order; tied ones once.

    Linear layers and embeddings have such matrices. Within the numbered stacks of layers what is called attention is
    attention, and the rest is feed-forward; outside of them there are embeddings, the pooler, and, outside of the base
    model, the head. A projection of embeddings (ELECTRA's) is in none, and neither are experts that share one tensor.

    Args:
        model: its parameters may be partitioned.
    """
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for name, _ in model.named_parameters():
        path, _, kind = name.rpartition(".")
        component = _component(path, modules) if kind == "weight" else None
        if component is not None:
            found[name] = component
    return found


def without_component(model: nn.Module) -> list[str]:
    """Return the tensors within the numbered stacks of layers that are no vectors, and of no component.

    Args:
        model: its parameters may be partitioned.
    """
    modules, known = dict(model.named_modules()), component_matrices(model)
    return [
        name
        for name, tensor in model.named_parameters()
        if name not in known and len(full_shape(tensor)) > 1 and _in_stack(name.rpartition(".")[0], modules)
    ]


def layer_of(name: str) -> str | None:
    """Return a parameter's name up to the number of its layer; None where it is in none."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else None


def _component(path: str, modules: dict[str, nn.Module]) -> str | None:
    module = modules[path]
    if isinstance(module, nn.Embedding):
        return _embedding(path)
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    if _in_stack(path, modules):
        return "attention" if "att" in path.lower() else "feed_forward"
    if "pooler" in path:
        return "pooler"
    model = modules[""]
    prefix = model.base_model_prefix if isinstance(model, PreTrainedModel) else ""
    return None if prefix and path.startswith(f"{prefix}.") else "head"


def _embedding(path: str) -> str:
    last = path.rpartition(".")[2]
    if "position" in last or "rel" in last or last in ("wpe", "embed_positions"):
        return "position_embedding"
    return "type_embedding" if "type" in last else "token_embedding"


def _in_stack(path: str, modules: dict[str, nn.Module]) -> bool:
    parts = path.split(".")
    return any(isinstance(modules[".".join(parts[:end])], nn.ModuleList) for end in range(1, len(parts)))
