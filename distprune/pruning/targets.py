"""Which parameters are pruned: by structure, or by regexes over their names.

The paper's first guideline weighs what pruning a component costs against what it saves. The default is the choice of
its authors' other recipes: the matrices of the encoder's layers, which hold most weights and all matrix work, and not
embeddings (a lookup costs no arithmetic), the pooler, the head (freshly initialised, so its magnitudes mean nothing),
norms and biases.
"""

import re
from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from distprune.config import ENCODER, PruningConfig
from distprune.errors import UserError
from distprune.pruning.components import component_matrices
from distprune.pruning.structures.attention import members


def targets_of(pruning: PruningConfig, model: nn.Module) -> list[str]:
    """Return the names of the parameters to prune, in the model's order, tied ones once.

    Args:
        pruning: whose ``include``, ``exclude``, ``components`` and ``structure`` count. Without ``include`` it is every
            matrix of the components, of which heads and neurons are parts of their own matrices only.
        model: the student; its parameters may be partitioned.

    Raises:
        UserError: where a regex is malformed or matches nothing, a frozen parameter is asked for, or none is left, or
            a matrix is stored the other way round than the structure asks for.
    """
    include, exclude, structure, components = pruning.include, pruning.exclude, pruning.structure, pruning.components
    parameters = dict(model.named_parameters())
    if not include:
        _refuse_unknown(model, components)
    chosen = _matching(include, list(parameters), "pruning.include") if include else matrices_of(model, components)
    if structure in ("heads", "neurons") and not include:
        chosen = set(members(sorted(chosen), structure))
        if not chosen and not members(sorted(matrices_of(model)), structure):
            raise UserError(
                f"pruning.structure is {structure}, and none are known in a {type(model).__name__}; allowed: "
                "another structure, or an encoder as BERT, RoBERTa, ELECTRA, DistilBERT, MPNet"
            )
    left_out = _matching(exclude, list(parameters), "pruning.exclude") if exclude else set()
    names = [name for name in parameters if name in chosen and name not in left_out]
    if not names:
        raise UserError(
            f"no weight is left to prune with pruning.include={include}, pruning.exclude={exclude} and "
            f"pruning.components={list(components)}; "
            f"allowed: regexes that leave some, e.g. of {', '.join(list(parameters)[:3])}"
        )
    frozen = [name for name in names if not parameters[name].requires_grad]
    if frozen:
        raise UserError(
            f"{frozen[0]} is to be pruned, but model.freeze keeps it fixed, or the model itself does; allowed: one of "
            "the two"
        )
    turned = [name for name in names if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)]
    if turned and structure != "unstructured":
        raise UserError(
            f"{turned[0]} is stored as inputs by outputs, which pruning.structure={structure} would misread; allowed: "
            "unstructured"
        )
    return names


def _refuse_unknown(model: nn.Module, components: Collection[str]) -> None:
    """Refuse a part of the encoder that is to be pruned and has no matrix here: less would be pruned than is said."""
    held = set(component_matrices(model).values())
    found = [name for name in components if name in held]
    unknown = [name for name in ENCODER if name in components and name not in held]
    experts = [name for name, tensor in model.named_parameters() if tensor.dim() > 2 and ".experts." in name]
    if experts and "feed_forward" in components:
        raise UserError(
            f"pruning.components has 'feed_forward', and {experts[0]} holds experts in one tensor, which is no known "
            "matrix; allowed: pruning.include with regexes over names"
        )
    if found and unknown:
        raise UserError(
            f"pruning.components has {unknown[0]!r}, and no matrix of it is known in a {type(model).__name__}; "
            f"allowed: {found}, or pruning.include with regexes over names"
        )


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Keep the matching parameters fixed.

    Raises:
        UserError: where a regex is malformed or matches nothing, or none is left to train.
    """
    parameters = dict(model.named_parameters())
    for name in _matching(patterns, list(parameters), "model.freeze"):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"model.freeze is {patterns}, which matches every parameter; allowed: regexes that leave some")


def matrices_of(model: nn.Module, components: Collection[str] = ENCODER) -> set[str]:
    """Return the names of the matrices of some components; those of the encoder's layers where none are named."""
    return {name for name, component in component_matrices(model).items() if component in components}


def _matching(patterns: list[str], names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from error
        if not matches:
            raise UserError(f"{key}: {pattern!r} matches no parameter; there are e.g. {', '.join(names[:3])}")
        found |= matches
    return found
