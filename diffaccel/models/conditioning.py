"""What the images of a pipeline show, classes or prompts, and how the pipeline is called for that."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..core.errors import DataError, UsageError
from .pixel import num_classes, sample_shape
from .prompts import own_prompts

_TAKEN = {"prompt", "negative_prompt", "latents", "num_inference_steps", "guidance_scale", "generator", "output_type"}


class Conditioning(ABC):
    """What image 0, 1, 2, … of a pipeline show.

    Attributes:
        pipeline: the opened pipeline.
        network: what it evaluates at every step.
        sample_shape: (C, H, W) of the noise that an image starts from.
        image_shape: (C, H, W) of an image.
        guidable: whether the network knows an empty condition to guide away from.
        latent: whether a decoder stands between the network and the images.
        prompts: taken in turn; None for other models than text to image.
    """

    latent = False
    prompts: list[str] | None = None

    def __init__(self, pipeline, network):
        self.pipeline, self.network = pipeline, network
        self.sample_shape = self.image_shape = sample_shape(network)

    @property
    def own_scale(self) -> float:
        """Guidance scale of the pipeline's call where none is given."""
        return inspect.signature(type(self.pipeline).__call__).parameters["guidance_scale"].default

    def scale(self, wanted: float | None) -> float:
        """The guidance scale of a call without a rule; 1 for none.

        Raises:
            UsageError: a scale at which the pipeline does something else.
        """
        return self.own_scale if wanted is None else wanted

    def labels(self, start: int, count: int) -> torch.Tensor | None:
        """Classes (count,) int64 of the images from ``start`` on; None without classes."""
        return None

    @abstractmethod
    def arguments(self, start: int, noise: torch.Tensor) -> dict:
        """Arguments of the pipeline's call for the images from ``start`` on, from standard normal noise (B, C, H, W)."""

    @abstractmethod
    def signed(self, images: torch.Tensor) -> torch.Tensor:
        """What the call returns as output_type "pt", in [−1, 1] up to overshoot."""

    @abstractmethod
    def check_negatives(self, arguments: Mapping) -> None:
        """Refuse arguments of a call that state what is not wanted and that the pipeline does not know.

        Raises:
            UsageError: such arguments.
        """


class ClassConditioning(Conditioning):
    """Classes in turn, or nothing in particular, by a ClassConditionalPipeline.

    Args:
        pipeline: the pipeline.
        classes: to draw in turn; None for all.

    Raises:
        UsageError: classes that the model does not have.
    """

    def __init__(self, pipeline, classes: Sequence[int] | None = None):
        super().__init__(pipeline, pipeline.network)
        count = pipeline.num_classes
        self.guidable = count is not None
        if classes is not None and count is None:
            raise UsageError("This model has no classes; leave classes out.")
        self._wanted = torch.tensor(classes if classes is not None else range(count or 0), dtype=torch.long)
        if count and bool(((self._wanted < 0) | (self._wanted >= count)).any()):
            raise UsageError(f"classes must be in 0 … {count - 1}, got {classes}.")

    def scale(self, wanted):
        return super().scale(wanted) if self.guidable else 1.0

    def labels(self, start, count):
        if not len(self._wanted):
            return None
        return self._wanted[torch.arange(start, start + count) % len(self._wanted)]

    def arguments(self, start, noise):
        labels = self.labels(start, len(noise))  # as a list: negatives are one for each
        return {"class_labels": None if labels is None else labels.tolist(), "noise": noise}

    def signed(self, images):
        return images

    def check_negatives(self, arguments):
        count = self.pipeline.num_classes
        negatives = torch.as_tensor(arguments.get("class_labels", -1))
        if bool((negatives < 0).any()) or bool((negatives >= count).any()):
            raise UsageError(
                f"Negatives of this model are classes in 0 … {count - 1}, such as perp-neg.negatives=3; got "
                f"{dict(arguments)}."
            )


class PromptConditioning(Conditioning):
    """Prompts in turn, by a text-to-image pipeline in Stable Diffusion's layout.

    Args:
        pipeline: the pipeline.
        prompts: to draw in turn; None for those of `prompts_of`.
        negative_prompt: what guidance leads away from, in every image.

    Raises:
        UsageError: no prompts, or something else than texts.
    """

    guidable, latent = True, True

    def __init__(self, pipeline, prompts: Sequence[str] | str | None = None, negative_prompt: str | None = None):
        super().__init__(pipeline, pipeline.unet)
        factor, (_, *size) = pipeline.vae_scale_factor, self.sample_shape
        self.image_shape = (pipeline.vae.config.out_channels, *(edge * factor for edge in size))
        prompts = prompts_of(pipeline) if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UsageError(
                "This text-to-image model needs prompts: it brings none of its own, so say what to draw, with --prompts FILE "
                "on the command line."
            )
        strangers = [text for text in (*prompts, negative_prompt or "") if not isinstance(text, str)]
        if strangers:
            raise UsageError(f"Prompts are texts, such as 'red apple'; got {strangers[0]!r}.")
        self.prompts, self._negative = prompts, negative_prompt

    def scale(self, wanted):
        scale = super().scale(wanted)
        if not scale >= 1.0:
            name = type(self.pipeline).__name__
            raise UsageError(
                f"{name} guides at scales above 1, 1 is no guidance; got {scale:g}: choose a rule, as cfg."
            )
        return scale

    def arguments(self, start, noise):
        prompts = [self.prompts[index % len(self.prompts)] for index in range(start, start + len(noise))]
        negative = None if self._negative is None else [self._negative] * len(noise)
        return {"prompt": prompts, "negative_prompt": negative, "latents": noise.to(self.network.dtype)}

    def signed(self, images):
        return 2.0 * images - 1.0

    def check_negatives(self, arguments):
        if "class_labels" in arguments:
            raise UsageError(
                f"Negatives of this model are prompts, such as perp-neg.negatives=leaf; got {arguments['class_labels']!r}."
            )
        if self._negative:
            raise UsageError("Give negatives to the rule or a negative prompt to the pipeline, not both.")


def conditioning_of(
    pipeline,
    classes: Sequence[int] | None = None,
    prompts: Sequence[str] | str | None = None,
    negative_prompt: str | None = None,
) -> Conditioning:
    """What the images of a pipeline are to show.

    Args:
        pipeline: an opened pixel pipeline, or one of text to image with a UNet2DConditionModel, a VAE and text encoders.
        classes: of a model with classes; None for all in turn.
        prompts, negative_prompt: of a text-to-image model; None for its own prompts, and for the empty negative.

    Raises:
        UsageError: classes for a model of prompts or the other way round, or see the classes above.
        DataError: a pipeline of another kind.
    """
    if _draws_prompts(pipeline):
        if classes is not None:
            raise UsageError("This model draws prompts and has no classes; say what to draw with prompts.")
        return PromptConditioning(pipeline, prompts, negative_prompt)
    if not hasattr(pipeline, "num_classes"):
        raise DataError(
            f"This is a {type(pipeline).__name__}; drawing here works with pixel models (UNet2DModel, DiTTransformer2DModel) and with text-to-image "
            "pipelines in Stable Diffusion's layout (UNet2DConditionModel, VAE, text encoder)."
        )
    if prompts is not None or negative_prompt is not None:
        what = "has no condition at all" if pipeline.num_classes is None else "draws classes"
        raise UsageError(f"This model {what} and reads no text; leave prompts out.")
    return ClassConditioning(pipeline, classes)


def prompts_of(pipeline) -> list[str] | None:
    """The prompts that an opened text-to-image pipeline brings in the folder it came from, in a fixed order, or None."""
    folder = getattr(pipeline, "name_or_path", None)  # a folder, or a name on the hub
    return own_prompts(str(folder)) if folder and (Path(folder) / "model_index.json").is_file() else None


def kind_of(network) -> str | None:
    """In words what two networks must share; None for one that is no diffusers model and keeps that to itself."""
    try:
        shape, classes = sample_shape(network), num_classes(network)
        width = network.config.get("cross_attention_dim")
    except AttributeError:
        return None
    return f"samples of {shape}, {classes or 'no'} classes and {f'text of width {width}' if width else 'no text'}"


def _draws_prompts(pipeline) -> bool:
    """Whether a pipeline is Stable Diffusion's, by its parts and by what its call takes, or one that adds text encoders."""
    import diffusers

    from .multi_student import MultiStudentModel

    parts = [getattr(pipeline, name, None) for name in ("vae", "text_encoder", "tokenizer")]
    taken = inspect.signature(type(pipeline).__call__).parameters.keys()
    return (
        isinstance(getattr(pipeline, "unet", None), diffusers.UNet2DConditionModel | MultiStudentModel)
        and pipeline.unet.config.get("time_cond_proj_dim") is None  # told the guidance scale, it runs no pair
        and None not in parts
        and taken >= _TAKEN
        and not {"image", "mask_image"} & taken
    )
