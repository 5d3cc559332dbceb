"""``distprune config``: print every key with its value and meaning."""

from dataclasses import asdict
from textwrap import indent

from omegaconf import OmegaConf

from distprune import settings
from distprune.config import Config, describe


def run(config_path: str | None, overrides: list[str]) -> None:
    """Print the resolved configuration as YAML, then refuse it where no run can have it.

    The defaults alone are not refused: they have no model.

    Raises:
        UserError: where the configuration cannot be read, or, once it is printed, where it is impossible.
    """
    config = settings.load(config_path, overrides)
    print(annotate(config), end="")
    if config_path is not None:
        settings.validate(config)


def annotate(config: Config) -> str:
    """Return the configuration as YAML with each key's meaning as a comment above it."""
    meanings = describe()
    lines = ["# Times are '2 epochs', '0.1 epochs' or '500 steps'; a number alone counts epochs.", ""]
    for section, keys in settings.escaped(asdict(config)).items():
        lines.append(f"{section}:  # {getattr(config, section).__doc__.splitlines()[0]}")
        for name, value in keys.items():
            key = f"{section}.{name}"
            by_recipe = f" [set by the recipe {config.recipe.name}]" if key in config.recipe.derived else ""
            lines.append(f"  # {meanings[key]}{by_recipe}")
            lines.append(indent(OmegaConf.to_yaml(OmegaConf.create({name: value})).rstrip("\n"), "  "))
        lines.append("")
    return "\n".join(lines)
