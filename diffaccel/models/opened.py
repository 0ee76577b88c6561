"""Opened pipelines as distillation needs them: the network as a Denoiser, prompts as its conditions, images as its samples."""

import inspect

import torch

from ..core.errors import UsageError, unknown
from ..core.images import to_unit_range
from ..core.lazy import load_object
from ..core.prediction import PREDICTION_TYPES
from ..core.schedule import EDM, Flow, NoiseSchedule, from_diffusers
from .denoiser import Condition, NetworkDenoiser
from .layouts import LAYOUTS
from .networks import network_of
from .pixel import sample_shape
from .quiet import quiet_diffusers, quiet_transformers

_PIXELS_AT_ONCE = 2**20  # in the VAE, the hungriest part of a pipeline


class OpenedTeacher:
    """A pixel model.

    Attributes:
        denoiser: its network, shared with the pipeline.
        image_shape: (C, H, W) of an image.
        textual: whether conditions are prompts.
    """

    textual = False

    def __init__(self, denoiser: NetworkDenoiser):
        self.denoiser, self.image_shape = denoiser, denoiser.sample_shape

    def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the pipeline hands to its network for these prompts: {name: (N, …)}, on the CPU.

        Raises:
            UsageError: a model that reads no text.
        """
        raise UsageError("This teacher reads no text; leave prompts out.")

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (N, *image_shape) as samples: mean and standard deviation (N, *sample_shape), float32 on the CPU."""
        samples = to_unit_range(images.cpu())
        return samples, torch.zeros_like(samples)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Samples (B, *sample_shape) as images (B, *image_shape) float32 in [−1, 1] up to overshoot, without gradients."""
        return x0.detach().float()


class LatentTeacher(OpenedTeacher):
    """A model of latents; encodes and decodes where its VAE is.

    Args:
        denoiser: of scaled latents, as the network sees them.
        vae: AutoencoderKL.
    """

    def __init__(self, denoiser: NetworkDenoiser, vae):
        super().__init__(denoiser)
        self.vae, self.image_shape = vae, _image_shape(denoiser.net, vae)
        self._at_once = max(1, _PIXELS_AT_ONCE // (self.image_shape[1] * self.image_shape[2]))
        # Stable Diffusion 3 shifts its latents, some XL models standardise each channel.
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        shift = torch.tensor(mean or [vae.config.get("shift_factor") or 0.0]).reshape(1, -1, 1, 1)
        self._shift, self._scale = shift, vae.config.scaling_factor / torch.tensor(std or [1.0]).reshape(1, -1, 1, 1)

    @torch.no_grad()
    def encode_images(self, images):
        parts = [to_unit_range(part).to(self.vae.device, self.vae.dtype) for part in images.split(self._at_once)]
        found = [self.vae.encode(part).latent_dist for part in parts]
        mean, std = (torch.cat([getattr(one, name).float().cpu() for one in found]) for name in ("mean", "std"))
        return (mean - self._shift) * self._scale, std * self._scale

    @torch.no_grad()
    def decode(self, x0):
        latents = x0.to(self.vae.device).float()
        latents = (latents / self._scale.to(latents.device) + self._shift.to(latents.device)).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample.float() for part in latents.split(self._at_once)])


class TextTeacher(LatentTeacher):
    """A text-to-image model.

    Args:
        denoiser, vae: see `LatentTeacher`.
        prompts: encodes them.
    """

    textual = True

    def __init__(self, denoiser: NetworkDenoiser, vae, prompts: "PromptEncoder"):
        super().__init__(denoiser, vae)
        self._prompts = prompts

    def encode(self, prompts):
        return self._prompts(prompts)


class PromptEncoder:
    """A pipeline's own `encode_prompt`, called as its `__call__` does by default, where its text encoders are.

    Args:
        pipeline: the pipeline.
        names: see `layouts.Layout.encoded`.
        constant: conditions that are the same for every prompt, for one sample.
        batch_size: prompts encoded at once.
    """

    def __init__(self, pipeline, names: tuple[str, ...], constant: Condition, batch_size: int = 32):
        self.pipeline, self.names, self.constant, self.batch_size = pipeline, names, constant, batch_size
        call, own = (
            inspect.signature(function).parameters for function in (type(pipeline).__call__, pipeline.encode_prompt)
        )
        self._defaults = {name: p.default for name, p in call.items() if name in own and p.default is not p.empty}

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """{name: (N, …)} on the CPU, float as the text encoders compute."""
        batches = [prompts[start : start + self.batch_size] for start in range(0, len(prompts), self.batch_size)]
        parts = [self._encoded(batch, guided=False) for batch in batches]
        states = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return states | {name: value.expand(len(prompts), *value.shape) for name, value in self.constant.items()}

    def null(self) -> dict[str, torch.Tensor]:
        """What the pipeline guides away from without a negative prompt, for one sample."""
        states = self._encoded([""], guided=True)
        return {name: value[0] for name, value in states.items()} | dict(self.constant)

    @torch.no_grad()
    def _encoded(self, prompts: list[str], guided: bool) -> dict[str, torch.Tensor]:
        """Of the prompts or, if ``guided``, of the negative prompts that go with them."""
        given = {"prompt": prompts, "device": _text_encoders(self.pipeline)[0].device}
        with quiet_diffusers(), quiet_transformers():
            returned = self.pipeline.encode_prompt(**self._defaults | given, do_classifier_free_guidance=guided)
        named = zip(self.names, returned, strict=True)
        return {name.removeprefix("null_"): value.cpu() for name, value in named if name.startswith("null_") == guided}


def open_teacher(pipeline) -> OpenedTeacher:
    """What distillation needs of an opened pipeline, of one of the classes in `layouts.LAYOUTS`.

    Raises:
        UsageError: another pipeline, one without its VAE or text encoders, a network with other inputs than the pipeline
            gives it, or see `parametrisation`.
    """
    name = type(pipeline).__name__
    layout = LAYOUTS.get(name)
    if layout is None:
        raise UsageError(f"A {name} cannot be distilled; expected one of {', '.join(LAYOUTS)}.")
    kind, net = load_object(layout.denoiser), network_of(pipeline)
    arguments = net, *parametrisation(pipeline.scheduler)
    if not layout.latent:
        return OpenedTeacher(kind(*arguments))
    if pipeline.vae is None or (layout.encoded and not _text_encoders(pipeline)):
        part = "VAE" if pipeline.vae is None else "text encoder"
        raise UsageError(f"This {name} has no {part}, without which it cannot be distilled; open it with one.")
    _check_inputs(net, name)
    if not layout.encoded:
        return LatentTeacher(kind(*arguments), pipeline.vae)
    _, height, width = _image_shape(net, pipeline.vae)
    prompts = PromptEncoder(pipeline, layout.encoded, kind.micro_conditions(net, height, width))
    return TextTeacher(kind(*arguments, prompts.null()), pipeline.vae, prompts)


def parametrisation(scheduler) -> tuple[NoiseSchedule, str]:
    """The noise schedule of a diffusers scheduler, and what the network behind it predicts.

    Raises:
        UsageError: a schedule that is neither VP nor a flow, or an unknown prediction type.
    """
    schedule = from_diffusers(scheduler)
    if isinstance(schedule, EDM):
        raise UsageError("EDM-preconditioned networks are not supported; only VP (DDPM) and flow models are.")
    default = "flow_prediction" if isinstance(schedule, Flow) else "epsilon"
    kind = scheduler.config.get("prediction_type") or default
    if kind not in PREDICTION_TYPES:
        raise unknown("prediction type", kind, PREDICTION_TYPES)
    return schedule, kind


def _text_encoders(pipeline) -> list:
    parts = pipeline.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and part is not None]


def _image_shape(net, vae) -> tuple[int, int, int]:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    _, height, width = sample_shape(net)
    return vae.config.out_channels, height * factor, width * factor


def _check_inputs(net, name: str) -> None:
    """Refuse networks that look at more than a noisy sample, the time and what the pipeline's class always gives."""
    strange = [
        f"{key}={value!r}"
        for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
        if (value := net.config.get(key)) and value != "text_time"
    ]  # fmt: skip
    channels, predicted = net.config.in_channels, net.config.out_channels
    if predicted not in (channels, 2 * channels):
        strange.append(f"in_channels={channels} for out_channels={predicted}")
    if strange:
        raise UsageError(
            f"The network of this {name} takes more than noise, time and prompts or classes ({', '.join(strange)}); "
            "distil the plain model that it was made from."
        )
