"""What a text-to-image teacher is asked for, and its real samples: prompts and captioned images, encoded once."""

from collections.abc import Callable

import torch

from ..core.errors import UsageError
from ..models.conditions import PromptConditions
from ..models.opened import TextTeacher
from ..models.prompts import load_prompts, own_prompts
from ..training.recipes import RunConfig
from .samples import EncodedSamples, captioned_images, encoded


def text_subject(
    config: RunConfig,
    pipeline,
    opened: TextTeacher,
    source: str | None,
    say: Callable[[str], None] | None = None,
) -> tuple[PromptConditions, EncodedSamples | None]:
    """Prompts and real samples of a run.

    Encoders run where training will; text encoders go back to the CPU when they are done, the decoder stays for pictures.

    Args:
        config: whose prompts are a file, else those that the teacher brings, else the captions of the images.
        pipeline, opened: the teacher.
        source: of captioned images; None for none.
        say: takes a line before prompts and images are encoded.

    Raises:
        UsageError: no prompts anywhere.
        DataError, MissingWeightsError: files that cannot be used, see `models.prompts.load_prompts` and
            `samples.captioned_images`.
    """
    prompts = load_prompts(config.prompts) if config.prompts else own_prompts(config.teacher)
    if prompts is None and source is None:
        raise UsageError(
            f"{config.teacher} draws from text: give the prompts that the student is trained on, --prompts FILE.txt with one a "
            "line, or images with captions, --data FOLDER."
        )
    on_gpu = torch.cuda.is_available() and config.trainer.device != "cpu"
    if on_gpu:
        pipeline.to("cuda")
    data = None
    if source:
        if say:
            say(f"Encoding the images and captions of {source}")
        data = encoded(opened, *captioned_images(source, tuple(opened.image_shape[-2:])))
    if prompts is None:
        conditions = data.captions
    else:
        prompts = list(dict.fromkeys(prompts))
        if say:
            say(f"Encoding {len(prompts)} prompts")
        conditions = PromptConditions(prompts, opened.encode(prompts))
    if on_gpu:
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to("cpu")
    return conditions, data
