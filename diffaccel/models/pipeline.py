"""A diffusers pipeline for pixel models with classes: the embedded teachers and the students distilled from them."""

import inspect

import diffusers
import torch
from diffusers import ImagePipelineOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from ..core.errors import UsageError
from .pixel import is_transformer, num_classes, sample_shape


class ClassConditionalPipeline(DiffusionPipeline):
    """Generates images with a network of pixels, with classes and classifier-free guidance if the model has them.

    Args:
        unet: UNet2DModel; with class embeddings, the last one is the null class. None where there is a transformer.
        scheduler: any diffusers or diffaccel scheduler.
        num_inference_steps: number of steps when a call names none; distilled students carry 1 here.
        transformer: DiTTransformer2DModel in place of the U-Net.

    Raises:
        UsageError: both networks, or none.
    """

    _optional_components = ["unet", "transformer"]  # noqa: RUF012 - diffusers reads it from the class

    def __init__(self, unet, scheduler, num_inference_steps: int = 20, transformer=None):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise UsageError("A ClassConditionalPipeline has either a unet or a transformer.")
        self.register_modules(unet=unet, scheduler=scheduler, transformer=transformer)
        self.register_to_config(num_inference_steps=num_inference_steps)

    @classmethod
    def of(cls, net, scheduler, num_inference_steps: int = 20) -> "ClassConditionalPipeline":
        """The pipeline of either kind of network."""
        role = "transformer" if is_transformer(net) else "unet"
        return cls(**{"unet": None, role: net}, scheduler=scheduler, num_inference_steps=num_inference_steps)

    @property
    def network(self):
        """The U-Net or the transformer."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None for an unconditional model."""
        return num_classes(self.network)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return sample_shape(self.network)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: torch.Tensor | list[int] | int | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Generate images.

        Args:
            class_labels: classes, one per image; default 0, 1, 2, … over ``batch_size`` images.
            batch_size: number of images when neither labels nor noise say it.
            num_inference_steps: network evaluations (twice that with guidance); default from the model's own config.
            guidance_scale: 1 is the conditional model; larger values follow the class more closely.
            generator: source of the initial noise and of stochastic samplers.
            noise: (B, C, H, W) initial standard normal noise instead of drawing it.
            output_type: "pil", "np" (B, H, W, C in [0, 1]) or "pt" (B, C, H, W in [−1, 1], unclipped).

        Returns:
            ImagePipelineOutput with ``images``, or a tuple if ``return_dict`` is False.

        Raises:
            UsageError: labels out of range, labels for an unconditional model, mismatching batch sizes.
        """
        device, dtype = self._execution_device, self.network.dtype
        labels = self._labels(class_labels, len(noise) if noise is not None else batch_size)
        count = len(labels) if labels is not None else (len(noise) if noise is not None else batch_size)
        shape = (count, *self.sample_shape)
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if tuple(noise.shape) != shape:
            raise UsageError(f"noise has shape {tuple(noise.shape)}, expected {shape}.")

        self.scheduler.set_timesteps(num_inference_steps or self.config.num_inference_steps, device=device)
        guided = guidance_scale != 1.0 and labels is not None
        conditions = {} if labels is None else {"class_labels": labels.to(device)}
        if guided:
            null = torch.full_like(labels, self.num_classes)
            conditions = {"class_labels": torch.cat([null, labels]).to(device)}
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}

        # Flow schedulers of diffusers neither scale the noise nor what the network sees.
        scaled = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        sample = noise.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = scaled(sample, timestep)
            if guided:
                model_input = torch.cat([model_input, model_input])
            prediction = self.network(model_input, timestep.expand(len(model_input)), **conditions).sample
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = torch.lerp(uncond, cond, guidance_scale)
            sample = self.scheduler.step(prediction, timestep, sample, **extra).prev_sample

        images = sample
        if output_type != "pt":
            images = (sample.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels, count: int) -> torch.Tensor | None:
        if self.num_classes is None:
            if class_labels is not None:
                raise UsageError("This model has no classes; call it without class_labels.")
            return None
        if class_labels is None:
            return torch.arange(count) % self.num_classes
        labels = torch.as_tensor(class_labels, dtype=torch.long).reshape(-1).cpu()
        if bool((labels < 0).any()) or bool((labels > self.num_classes).any()):
            raise UsageError(
                f"class_labels must be in 0 … {self.num_classes - 1} (or {self.num_classes} for no class)."
            )
        return labels


ClassConditionalPipeline.__module__ = "diffaccel"
diffusers.ClassConditionalPipeline = ClassConditionalPipeline  # see diffaccel/_registration.py
