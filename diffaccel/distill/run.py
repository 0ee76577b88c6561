"""From settings to a distillation method ready to train."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.config import merge, parse_overrides, read_yaml, to_dict
from ..core.errors import UsageError
from ..models.teachers import TEACHERS, check_adapter
from ..training.recipes import RunConfig, method_settings, read_recipe, recipes, resolve
from .registry import get_method


def resolve_distillation(
    flags: Mapping[str, Any],
    config_file: str | Path | None = None,
    assignments: list[str] | None = None,
    recipe: str | None = None,
) -> RunConfig:
    """Settings of a distillation run: a recipe, the method's preset, then file, ``--set`` and flags.

    Args:
        recipe: a packaged one; default TEACHER-METHOD where there is one, else the general one of the method.

    Raises:
        UsageError: no teacher, unknown recipe, method, preset or settings.
    """
    assignments = assignments or []
    chosen = merge(read_yaml(config_file) if config_file else {}, parse_overrides(assignments), flags)
    base = read_recipe("distill", recipe) if recipe else {}
    teacher, group = chosen.get("teacher") or base.get("teacher"), chosen.get("method") or {}
    if not isinstance(group, dict):
        raise UsageError(f"method must be a group of settings, such as method.name: dmd; got {group!r}.")
    for name, value in (
        ("teacher", teacher),
        *((f"method.{key}", group.get(key)) for key in ("name", "base", "preset")),
    ):
        if not isinstance(value, str | None):
            raise UsageError(f"{name} must be a name, got {value!r}.")
    if not teacher:
        raise UsageError(
            "Say which model to distil: --teacher digits, another name of `diffaccel list teachers`, or a folder."
        )
    info = TEACHERS.get(teacher)
    own = base.get("method", {}).get("name")
    name = group.get("name") or own or (info.method if info else "dmd")
    if recipe and own and name != own:
        raise UsageError(f"Recipe {recipe!r} is one of {own}, not of {name}; leave --method or --recipe out.")
    method = get_method(name)
    if not recipe:
        found = [entry for entry in (f"{teacher}-{method.name}", method.name) if entry in recipes("distill")]
        base = read_recipe("distill", found[0]) if found else {"method": {}}
    preset = group.get("preset")
    if preset:
        described = get_method(group.get("base") or base["method"].get("base") or name)
        base = merge(base, {"method": described.preset(preset)})
    return resolve(merge(base, {"teacher": teacher, "method": {"name": name}}), config_file, assignments, flags)


def build_method(config: RunConfig, say: Callable[[str], None] | None = None):
    """Load teacher and data and construct the method; completes ``config.method`` with its defaults.

    Args:
        say: takes one line before anything that takes long.

    Raises:
        UsageError, DataError, MissingWeightsError: what cannot be distilled, opened or found.
    """
    method_class, settings = check_method(config)
    method = method_class(build_task(config, say), settings, config.trainer.seed)
    # A recipe sets rates for helpers that some settings of its method do without.
    unused = {"critic", "discriminator"} - method.roles.keys()
    config.trainer.optimizers = {role: one for role, one in config.trainer.optimizers.items() if role not in unused}
    return method


def check_method(config: RunConfig) -> tuple[type, Any]:
    """The class and the settings of a run's method; completes ``config.method`` with its defaults.

    Raises:
        UsageError, MissingWeightsError, DataError: wrong settings, or a teacher that cannot be distilled or is not there.
    """
    check_adapter(config.teacher)
    return check_settings(config)


def check_settings(config: RunConfig) -> tuple[type, Any]:
    """As `check_method`, without a look at the teacher."""
    method_class = get_method(config.method["name"]).load(config.method)
    settings = method_settings(config, method_class.Config)
    resting = settings.resting_steps()
    if resting >= config.trainer.steps:
        raise UsageError(
            f"The student rests for the first {resting} steps, which leaves none of {config.trainer.steps}; raise --steps, "
            "or lower " + " and ".join(f"method.{name}" for name in settings.resting) + "."
        )
    if config.lora < 0:
        raise UsageError(f"lora is the rank of adapters, at least 1, or 0 for none; got {config.lora}.")
    return method_class, settings


def build_task(config: RunConfig, say: Callable[[str], None] | None = None):
    """Open the teacher of a run, its conditions and its real samples, as a `task.Task`.

    Raises:
        UsageError, DataError, MissingWeightsError: see `build_method`.
    """
    from ..models.conditions import ClassConditions, NoConditions
    from ..models.opened import open_teacher
    from ..models.teachers import load_pipeline
    from .samples import DrawnSamples, drawn_count
    from .task import Task

    pipeline = load_pipeline(config.teacher)
    opened = open_teacher(pipeline)
    drawn = drawn_count(config.data) if config.data else None
    if opened.textual:
        from .text import text_subject

        conditions, data = text_subject(config, pipeline, opened, None if drawn else config.data, say)
    else:
        if config.prompts:
            raise UsageError(f"{config.teacher} draws no prompts; leave --prompts out.")
        count = getattr(opened.denoiser, "num_classes", None)
        conditions = ClassConditions(count) if count else NoConditions()
        data = _labelled(config.data, opened, conditions) if config.data and not drawn else None
    shared = None
    if adapters := adapter_config(config):
        from .adapters import SharedBase

        shared = SharedBase(opened.denoiser, adapters)
    return Task(
        teacher=shared.teacher if shared else opened.denoiser,
        conditions=conditions,
        data=DrawnSamples(drawn) if drawn else data,
        pipeline=pipeline,
        decode=opened.decode,
        shared=shared,
        facts=card_facts(config),
    )


def adapter_config(config: RunConfig):
    """The `adapters.AdapterConfig` of a run; None where it trains whole networks.

    The network that all share is frozen, so under bfloat16 autocast it is kept in bfloat16 as well.
    """
    if not config.lora:
        return None
    from .adapters import AdapterConfig

    return AdapterConfig(rank=config.lora, base_dtype="bfloat16" if config.trainer.precision == "bf16" else "float32")


def _labelled(source: str, opened, conditions):
    from ..models.data import load_images
    from .samples import encoded_classes

    channels, *size = opened.image_shape
    images = load_images(source, channels, tuple(size), getattr(opened.denoiser, "num_classes", None))
    pixels = opened.image_shape == opened.denoiser.sample_shape
    return images if pixels else encoded_classes(opened, images, conditions)


def card_facts(config: RunConfig) -> dict[str, Any]:
    """What the model card of a student says of its run."""
    info, method = TEACHERS.get(config.teacher), get_method(config.method["name"])
    return {
        "teacher": config.teacher,
        "repository": info.repository if info else "",
        "licence": info.licence if info else "",
        "method": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "recipe": {key: value for key, value in to_dict(config).items() if value is not None},
    }
