"""A configuration from the defaults, a YAML file and ``key=value`` overrides, merged strictly in that order.

A file may build on others: ``base: [task.yaml, recipe.yaml]``, or a single one, names files relative to
itself that are merged before it, in that order.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distprune import recipes, yaml12
from distprune.checks import CHECKS, Check
from distprune.config import SECTIONS, Config, dotted, value_of
from distprune.errors import UserError

Layer = dict[Any, Any]

TYPES: dict[str, Any] = dotted({section: get_type_hints(schema) for section, schema in SECTIONS.items()})
_DEFAULTS = OmegaConf.structured(Config)

TYPE_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts, as [a] or [a, b]",
    list[float]: "a list of numbers",
    list[int]: "a list of whole numbers",
    dict[str, Any]: "a section of DeepSpeed's options",
    str | None: "text or null",
    int | None: "a whole number or null",
    float | None: "a number or null",
}


def load(path: str | None, overrides: list[str]) -> Config:
    """Return the defaults, changed by a file, changed by overrides; a recipe sets what none of them gives.

    Args:
        path: YAML file; None: the defaults.
        overrides: ``key=value``, with a dotted key and a value in YAML.

    Raises:
        UserError: a file that is missing, is no YAML or is its own base; an override that is not
            ``key=value``; an unknown key; a value of the wrong type.
    """
    config, given = load_given(path, overrides)
    recipes.apply(config, given)
    return config


def load_given(path: str | None, overrides: list[str]) -> tuple[Config, set[str]]:
    """Return the configuration before its recipe sets anything, and the dotted keys that are given.

    Keys that a file lists in ``recipe.derived`` are not given by it, and are derived again: so a run's own config.yaml
    can be the configuration of another run.

    Args:
        path: as `load`.
        overrides: as `load`.

    Raises:
        UserError: as `load`; another recipe on top of a run's own config.yaml, where no key would be left to it.
    """
    merged, given = deepcopy(_DEFAULTS), set()
    layers = [] if path is None else _file_layers(Path(path), ())
    written: dict[str, str | None] = {}
    for origin, layer in [*layers, *map(_override_layer, overrides)]:
        given |= _merge(merged, _without_derived(layer), origin)
        recipe = layer.get("recipe")
        if isinstance(recipe, dict) and "derived" in recipe:
            nobody = "unknown" if recipe["derived"] else None
            written[origin] = recipe.get("derived_by", merged.recipe.name or nobody)
    for origin, name in written.items():
        if name != merged.recipe.name:
            raise UserError(
                f"{origin} gives every key, as a run or distprune config writes it, with recipe.name {name}, and "
                f"recipe.name is {merged.recipe.name}; allowed with another recipe: the file that it was made from"
            )
    return _resolved(merged), given


def load_written(path: Path) -> Config:
    """Return a configuration as a run has written it: with what its recipe derived then, by whatever rule.

    Raises:
        UserError: as `load`.
    """
    merged = deepcopy(_DEFAULTS)
    _merge(merged, _read(path), str(path))
    return _resolved(merged)


def _resolved(merged: DictConfig) -> Config:
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be resolved: {str(error).splitlines()[0]}") from error
    return Config(**{section: schema(**values[section]) for section, schema in SECTIONS.items()})


def load_valid(path: str | None, overrides: list[str]) -> Config:
    """Return a configuration that a run can have: `load`, then `validate`.

    Raises:
        UserError: as they do.
    """
    config = load(path, overrides)
    validate(config)
    return config


def validate(config: Config, checks: Iterable[Check] = CHECKS) -> None:
    """Refuse values and combinations that no run can have, as far as the data do not matter.

    Args:
        config: with everything set.
        checks: where only a part of it is used, those of that part.

    Raises:
        UserError: with the first key that is wrong, its value and what is allowed.
    """
    for check in checks:
        if not check.holds(config):
            raise UserError(f"{check.key} is {value_of(config, check.key)!r}; allowed: {check.allowed}")


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML that :func:`load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(asdict(config))))


def escaped(value: Any) -> Any:
    """Return values in which omegaconf finds no interpolation: what is resolved may hold a dollar and a brace."""
    if isinstance(value, dict):
        return {key: escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _file_layers(path: Path, parents: tuple[Path, ...]) -> list[tuple[str, Layer]]:
    """Return what a file sets, behind what the files set that it builds on; each with its origin."""
    if path.resolve() in parents:
        raise UserError(f"{path} builds on itself; allowed in base: files that do not lead back to it")
    layer = _read(path)
    bases = layer.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base is {bases!r}; allowed: a file or a list of files, relative to this one")
    below = [inherited for name in names for inherited in _file_layers(path.parent / name, (*parents, path.resolve()))]
    return [*below, (str(path), layer)]


def _read(path: Path) -> Layer:
    try:
        content = yaml12.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"the configuration file {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{path} holds {content!r:.40}; allowed: sections such as 'model:', with keys")
    return content or {}


def _override_layer(text: str) -> tuple[str, Layer]:
    origin = f"override {text!r}"
    key, equals, written = text.partition("=")
    if not (key and equals):
        raise UserError(f"{origin} sets nothing; allowed: key=value, e.g. pruning.sparsity=0.9")
    try:
        value = yaml12.parse(written)
    except yaml.YAMLError as error:
        raise UserError(f"{origin} has a value that is no YAML: {' '.join(str(error).split())}") from error
    if TYPES.get(key) in (str, str | None) and isinstance(value, bool | int | float):
        value = written  # a text that looks like a number, as 1e5 in the name of a commit
    for name in reversed(key.split(".")):
        value = {name: value}
    return origin, value


def _without_derived(layer: Layer) -> Layer:
    """Return what a layer sets itself, without the keys that a recipe had set where it was written."""
    recipe = layer.get("recipe")
    derived = recipe.get("derived") if isinstance(recipe, dict) else None
    if not isinstance(derived, list):
        return layer
    left_out = {"recipe.derived", "recipe.derived_by", *(key for key in derived if isinstance(key, str))}
    return {
        section: {name: value for name, value in keys.items() if f"{section}.{name}" not in left_out}
        if isinstance(keys, dict)
        else keys
        for section, keys in layer.items()
    }


def _merge(config: DictConfig, layer: Layer, origin: str) -> set[str]:
    """Set what a layer sets; DeepSpeed's options merge with those that are there, anything else replaces.

    Returns:
        The dotted keys.
    """
    given = set()
    for section, keys in layer.items():
        if section not in SECTIONS:
            raise _unknown(str(section), keys, origin)
        if section == "recipe" and isinstance(keys, str | None):
            keys = {"name": keys}
        if not isinstance(keys, dict):
            names = ", ".join(get_type_hints(SECTIONS[section]))
            raise UserError(f"{origin}: {section} is {keys!r}; allowed: a section with the keys {names}")
        for name, value in keys.items():
            path = f"{section}.{name}"
            if path not in TYPES:
                raise _unknown(path, value, origin)
            wrong = UserError(f"{origin}: {path} is {value!r}; allowed: {TYPE_WORDS[TYPES[path]]}")
            nested = isinstance(value, list) and any(isinstance(each, list | dict) for each in value)
            if nested or (_is_open(value) and TYPES[path] not in (str, str | None)):
                raise wrong
            if TYPES[path] is bool and not _is_switch(value):
                raise wrong
            try:
                OmegaConf.update(config, path, value, merge=True)
            except (OmegaConfBaseException, TypeError, OverflowError) as error:
                raise wrong from error
            if _holds_bool(path, value):
                raise UserError(f"{origin}: {path} is {value!r}; allowed: true and false in quotes")
            given.add(path)
    return given


def _is_open(value: Any) -> bool:
    """Return whether a value is, or holds, omegaconf's mark of one that is still to come."""
    if isinstance(value, list | dict):
        return any(map(_is_open, value.values() if isinstance(value, dict) else value))
    return bool(value == "???")


def _is_switch(value: Any) -> bool:
    """Return whether a value is true or false, or a text that omegaconf makes one of."""
    text = str(value).lower()
    return text.startswith("${") or text in ("true", "false", "yes", "no", "on", "off")


def _holds_bool(path: str, value: Any) -> bool:
    """Return whether a text was read as true or false."""
    values = value if isinstance(value, list) else [value]
    return TYPES[path] in (str, str | None, list[str]) and any(isinstance(each, bool) for each in values)


def _unknown(key: str, value: Any, origin: str) -> UserError:
    last_parts = {path.split(".")[1]: path for path in reversed(TYPES)}
    names = last_parts | {path: path for path in (*SECTIONS, *TYPES)}
    nearest = get_close_matches(key, names, n=1)
    hint = f"did you mean {names[nearest[0]]}?" if nearest else "'distprune config' prints all keys"
    return UserError(f"{origin}: there is no key {key} (set to {value!r}); {hint}")
