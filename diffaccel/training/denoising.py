"""Trains a class-conditional diffusion model from scratch: the recipe of the embedded teachers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ..core.grids import make_grid
from ..core.images import to_unit_range
from ..core.rng import KeyedRandom, seeded
from ..core.schedule import from_diffusers
from ..models.data import load_digits
from ..models.pipeline import ClassConditionalPipeline
from ..models.unet2d import UNet2DDenoiser
from ..samplers.deis import deis_plan
from ..samplers.sample import sample
from ..samplers.scheduler import DEISScheduler
from .method import Draw, Loss, Method, Phase


class DigitsDenoising(Method):
    """Mean squared error of the network's own prediction type at stratified times, classes dropped for guidance."""

    main_role = "model"

    @dataclass
    class Config:
        """Attributes:
        channels: widths of the two resolutions 8×8 and 4×4; attention at 4×4.
        prediction_type: what the network predicts.
        null_probability: share of samples trained with the null class.
        sampling_steps: steps of the pictures and the default of the exported pipeline.
        """

        channels: tuple[int, ...] = (16, 32)
        prediction_type: str = "v_prediction"
        null_probability: float = 0.1
        sampling_steps: int = 20

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.scheduler = DEISScheduler(prediction_type=config.prediction_type, timestep_spacing="trailing")
        with seeded(seed):
            net = UNet2DModel(
                sample_size=8,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                block_out_channels=config.channels,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=16,
                norm_num_groups=8,
                num_class_embeds=11,
            )
        self.roles = {"model": UNet2DDenoiser(net, from_diffusers(self.scheduler), config.prediction_type)}
        images, self.labels = load_digits("train")
        self.images = to_unit_range(images)

    def to(self, device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def phases(self, step: int) -> list[Phase]:
        return [Phase("denoise", ("model",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        model: UNet2DDenoiser = self.roles["model"]
        index = draw.integers("data", len(self.images))
        dropped = draw.uniform("null") < self.config.null_probability
        labels = torch.where(dropped, model.num_classes, self.labels[index])
        t = model.schedule.time(draw.stratified("time"))
        eps = draw.normal("eps", model.sample_shape)
        return Loss(model.denoising_error(self.images[index], t, eps, {"class_labels": labels}).mean())

    def samples(self, model: UNet2DDenoiser, random: KeyedRandom) -> torch.Tensor:
        """Ten of each class with the recipe's sampler, one class a row."""
        levels = make_grid(model.schedule, self.config.sampling_steps)
        labels = torch.arange(100).to(self.images.device) // 10
        noise = random.normal("picture", 0, 0, 100, model.sample_shape).to(self.images.device)
        return sample(model, noise, deis_plan(levels, degree=2), {"class_labels": labels})

    def export(self, model: UNet2DDenoiser, folder: Path) -> None:
        pipeline = ClassConditionalPipeline(model.net, self.scheduler, self.config.sampling_steps)
        pipeline.save_pretrained(folder)
