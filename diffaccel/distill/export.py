"""What a finished student is on disk: a diffusers pipeline that draws with its own times, its card, and its adapter."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch

from ..core.errors import DataError
from ..core.files import seal, write_atomic
from ..models.conditions import Conditions
from ..models.denoiser import NetworkDenoiser
from ..models.few_step_pipelines import PREFIX, student_pipeline
from ..models.networks import NETWORKS
from ..models.pipeline import ClassConditionalPipeline
from ..models.saving import save_pipeline
from ..samplers.few_step import FewStepScheduler
from .adapters import AdapterDenoiser
from .card import model_card, with_metrics
from .task import Task

_CARD = "README.md"


def save_student(task: Task, model: NetworkDenoiser, scheduler: FewStepScheduler, folder: Path) -> None:
    """Write the pipeline of a student, and its card.

    `diffusers.DiffusionPipeline.from_pretrained` opens the folder after ``import diffaccel``. Everything but network and
    scheduler is the teacher's, unchanged. An adapter is merged into its network, and is there as a LoRA file as well if
    pipelines of the teacher's class load those.

    Args:
        task: what was distilled; its ``facts`` are arguments of `card.model_card`. Without a pipeline it is a pixel model.
        model: the student.
        scheduler: what draws from it.
        folder: for the student.
    """
    folder, adapter = Path(folder), None
    if isinstance(model, AdapterDenoiser):
        network, adapter = model.merged(), model.lora_state()
    else:
        network = model.net
    pipe, steps = task.pipeline, len(scheduler.steps.times)
    student = (
        ClassConditionalPipeline.of(network, scheduler, steps)
        if pipe is None
        else student_pipeline(pipe, network, scheduler, steps)
    )
    save_pipeline(student, folder)
    if adapter is not None and not save_adapter(student, adapter, folder):
        adapter = None
    call, members = _call(student, task.conditions), len(task.conditions.members)
    kind = {"prompt": "prompts", "class_labels": "classes"}.get(next(iter(call), ""), "")
    card = {
        "teacher": "a model without name",
        **task.facts,
        "times": scheduler.steps.times,
        "noise": scheduler.steps.noise,
        "call": ", ".join(f"{name}={value!r}" for name, value in call.items()),
        "trained_for": f"{members} {kind}" if kind else "",
        "text": kind == "prompts",
        "adapter": adapter is not None,
    }
    write_atomic(folder / _CARD, model_card(**card))


def save_adapter(pipe, state: Mapping[str, torch.Tensor], folder: Path) -> bool:
    """Write a LoRA adapter as ``pytorch_lora_weights.safetensors``, for ``load_lora_weights(folder)``.

    Args:
        pipe: a pipeline of the class that is to load it.
        state: see `adapters.AdapterDenoiser.lora_state`.
        folder: for the file.

    Returns:
        Whether the class has adapters; without them nothing is written.
    """
    save = getattr(type(pipe), "save_lora_weights", None)
    layers = [f"{name}_lora_layers" for name in NETWORKS if getattr(pipe, name, None) is not None]
    if save is None or not set(layers) <= set(inspect.signature(save).parameters):
        return False
    save(folder, **{name: dict(state) for name in layers})
    return True


def add_metrics(folder: Path, metrics: Mapping[str, float | str]) -> None:
    """Put figures into the card of an exported student, in the place of earlier ones.

    Raises:
        DataError: no card in the folder.
    """
    path = Path(folder) / _CARD
    if not path.is_file():
        raise DataError(f"{folder} has no {_CARD}; expected the folder final/ of a distillation.")
    write_atomic(path, with_metrics(path.read_text(encoding="utf-8"), metrics))
    seal(path.parent)


def _call(student, conditions: Conditions) -> dict:
    """Arguments that draw an image of the first condition."""
    first, taken = int(conditions.members[0]), inspect.signature(type(student).__call__).parameters
    call = {}
    if "prompt" in taken:
        call["prompt"] = conditions.names[first]
    elif getattr(student, "num_classes", "class_labels" in taken):
        call["class_labels"] = [first]
    if not isinstance(student, ClassConditionalPipeline) and not type(student).__name__.startswith(PREFIX):
        call["guidance_scale"] = 1.0  # of a class that would guide by itself
    return call
