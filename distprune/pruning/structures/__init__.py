"""Which weights go together: a structure by its name."""

import re
from collections.abc import Callable
from fractions import Fraction
from math import prod

from distprune.config import PruningConfig
from distprune.errors import UserError
from distprune.pruning.components import layer_of
from distprune.pruning.structures.attention import heads, neurons
from distprune.pruning.structures.base import Choice, Structure
from distprune.pruning.structures.blocks import Blocks, tiles
from distprune.pruning.structures.n_of_m import WRITTEN, NOfM
from distprune.pruning.structures.unstructured import Unstructured

__all__ = ["Choice", "Structure", "build_structure", "check_sparsity"]


def build_structure(
    config: PruningConfig, shapes: dict[str, tuple[int, ...]], cuts: dict[str, list[int]], attention_heads: int | None
) -> Structure:
    """Return the structure that a configuration asks for.

    Args:
        config: whose structure, scope, groups and sparsity count.
        shapes: of the parameters to prune, in order.
        cuts: where in each flattened parameter a rank's slice begins or ends.
        attention_heads: in a layer of the model, where that is known.

    Raises:
        UserError: where there is no such structure, or the parameters do not have it.
    """
    name = config.structure
    if name == "unstructured":
        return Unstructured(_groups(config, shapes))
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        kept, of = map(int, found.groups())
        _check_n_of_m(config, kept, of, next(iter(shapes.items())))
        return NOfM(kept, of, shapes, cuts)
    if found := re.fullmatch(r"(\d+)x(\d+)", name):
        rows, columns = map(int, found.groups())
        if rows * columns == 0:
            raise UserError(f"pruning.structure is {name!r}; allowed: blocks of at least 1x1")
        return Blocks(tiles((rows, columns), shapes), cuts)
    if name == "heads":
        if attention_heads is None:
            raise UserError("pruning.structure is 'heads', and the model's configuration tells no num_attention_heads")
        return Blocks(heads(shapes, attention_heads), cuts)
    if name == "neurons":
        return Blocks(neurons(shapes), cuts)
    raise UserError(f"pruning.structure is {name!r}; allowed: unstructured, N:M, RxC, heads or neurons")


def check_sparsity(config: PruningConfig, structure: Structure) -> None:
    """Refuse a target of which no unit of the structure would be pruned.

    Raises:
        UserError: as said.
    """
    if config.sparsity > 0 and structure.masked_at(Fraction(str(config.sparsity))) == 0:
        raise UserError(
            f"pruning.sparsity is {config.sparsity}, less than one unit of {config.structure} (pruning.structure) of "
            "what is pruned; allowed: more"
        )


def _check_n_of_m(config: PruningConfig, kept: int, of: int, first: tuple[str, tuple[int, ...]]) -> None:
    name, shape = first
    if not 0 < kept < of:
        raise UserError(f"pruning.structure is '{kept}:{of}'; allowed: N:M with N at least 1 and less than M")
    if Fraction(str(config.sparsity)) > Fraction(of - kept, of) + WRITTEN:
        raise UserError(
            f"pruning.sparsity is {config.sparsity}, which {kept}:{of} cannot express, e.g. in {name} of shape "
            f"{list(shape)}; allowed: at most {(of - kept) / of:.6g}"
        )


def _groups(config: PruningConfig, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Return the parameters' sizes, in the groups that each have the sparsity by themselves."""
    by_scope: dict[str, Callable[[str], str]] = {
        "global": lambda name: "",
        "tensor": lambda name: name,
        "layer": lambda name: layer_of(name) or name,
        "groups": lambda name: _matching_group(name, shapes[name], config.groups),
    }
    group_of = by_scope[config.scope]
    groups: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        groups.setdefault(group_of(name), {})[name] = prod(shape)
    unused = set(config.groups) - groups.keys()
    if unused:
        raise UserError(
            f"pruning.groups: {unused.pop()!r} is no weight's first match; there are e.g. {next(iter(shapes))}"
        )
    return list(groups.values())


def _matching_group(name: str, shape: tuple[int, ...], patterns: list[str]) -> str:
    for pattern in patterns:
        if re.search(pattern, name):
            return pattern
    raise UserError(f"{name} of shape {list(shape)} is matched by none of pruning.groups, {patterns}")
