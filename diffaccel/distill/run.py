"""From settings to a distillation method ready to train."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.config import merge, parse_overrides, read_yaml
from ..core.errors import UsageError
from ..models.teachers import TEACHERS, check_adapter
from ..training.recipes import RunConfig, method_settings, read_recipe, recipes, resolve
from .registry import get_method


def resolve_distillation(
    flags: Mapping[str, Any], config_file: str | Path | None = None, assignments: list[str] | None = None
) -> RunConfig:
    """Settings of a distillation run: the recipe of the teacher and method, then file, ``--set`` and flags.

    The recipe is TEACHER-METHOD where one is packaged, else the general one of the method.

    Raises:
        UsageError: no teacher, unknown method or settings.
    """
    assignments = assignments or []
    chosen = merge(read_yaml(config_file) if config_file else {}, parse_overrides(assignments), flags)
    teacher, group = chosen.get("teacher"), chosen.get("method") or {}
    if not isinstance(group, dict):
        raise UsageError(f"method must be a group of settings, such as method.name: dmd; got {group!r}.")
    if not isinstance(teacher, str | None) or not isinstance(group.get("name"), str | None):
        raise UsageError("teacher and method.name must be names.")
    if not teacher:
        raise UsageError(
            "Say which model to distil: --teacher digits, another name of `diffaccel list teachers`, or a folder."
        )
    info = TEACHERS.get(teacher)
    method = get_method(group.get("name") or (info.method if info else "dmd")).name
    recipe = f"{teacher}-{method}" if f"{teacher}-{method}" in recipes("distill") else method
    return resolve(read_recipe("distill", recipe), config_file, assignments, flags)


def build_method(config: RunConfig):
    """Load teacher and data and construct the method; completes ``config.method`` with its defaults.

    Raises:
        UsageError, DataError, MissingWeightsError: what cannot be distilled, opened or found.
    """
    check_adapter(config.teacher)
    method_class = get_method(config.method["name"]).load()
    settings = method_settings(config, method_class.Config)
    if settings.critic_warmup >= config.trainer.steps:
        raise UsageError(
            f"method.critic_warmup {settings.critic_warmup} leaves no student update in {config.trainer.steps} steps; "
            "raise --steps, or lower it with --set method.critic_warmup=0."
        )
    from ..models.data import load_images
    from ..models.teachers import denoiser_of, load_pipeline

    pipeline = load_pipeline(config.teacher)
    teacher = denoiser_of(pipeline)
    data = None
    if config.data:
        channels, *size = teacher.sample_shape
        data = load_images(config.data, channels, tuple(size), teacher.num_classes)
    return method_class(teacher, dict(pipeline.scheduler.config), data, settings, config.trainer.seed)
