"""Recipes: YAML files that travel with the package, and the settings of one run that they resolve to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..core.config import build, merge, parse_overrides, read_yaml, to_dict
from ..core.errors import UsageError, unknown
from .config import OptimizerConfig, TrainerConfig

_PACKAGE = Path(__file__).parents[1]


@dataclass
class RunConfig:
    """Settings of one training run.

    Attributes:
        method: "name" and the method's own settings.
        trainer: settings of the loop.
        teacher: name or folder of the model to distil; None when training from scratch.
        data: data set name or image folder of methods that need real images.
        description: one line for people.
    """

    method: dict[str, Any]
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    teacher: str | None = None
    data: str | None = None
    prompts: str | None = None
    lora: int = 0
    description: str = ""


@lru_cache(maxsize=1)
def recipes_folder() -> Path:
    """configs/ inside the installed package, or beside it in a checkout."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def recipes(kind: str) -> dict[str, Path]:
    """Recipe files by name; kind is "train", "distill" or "prune"."""
    return {path.stem: path for path in sorted((recipes_folder() / kind).glob("*.yaml"))}


def read_recipe(kind: str, name: str) -> dict[str, Any]:
    """Settings of a packaged recipe.

    Raises:
        UsageError: unknown name.
    """
    found = recipes(kind)
    if name not in found:
        raise unknown("recipe", name, found)
    return read_yaml(found[name])


def resolve(
    base: Mapping[str, Any], config_file: str | Path | None, assignments: list[str], flags: Mapping[str, Any]
) -> RunConfig:
    """Combine recipe < config file < ``--set`` < explicit flags; every key is checked.

    Raises:
        UsageError: unknown or wrongly typed settings.
    """
    layers = [read_yaml(config_file) if config_file else {}, parse_overrides(assignments), flags]
    config = build(RunConfig, merge(base, *layers))
    if not isinstance(config.method.get("name"), str):
        raise UsageError("method.name is missing: say which method trains.")
    return config


def method_settings(config: RunConfig, settings_class: type):
    """The method's own settings as its Config; ``config.method`` is completed with its defaults."""
    own = {key: value for key, value in config.method.items() if key != "name"}
    settings = build(settings_class, own, "method.")
    config.method = {"name": config.method["name"], **to_dict(settings)}
    return settings


def complete(config: RunConfig, roles: list[str]) -> dict[str, Any]:
    """Plain data of the fully resolved configuration, with the settings of every role's optimiser.

    Raises:
        UsageError: settings for an optimiser of a role that the method does not have.
    """
    for name in config.trainer.optimizers:
        if name not in roles:
            raise unknown("role in trainer.optimizers", str(name), roles)
    settings = to_dict(config)
    settings["trainer"]["optimizers"] = {
        role: to_dict(config.trainer.optimizers.get(role, OptimizerConfig())) for role in roles
    }
    return settings
