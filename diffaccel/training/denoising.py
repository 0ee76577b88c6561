"""Trains a class-conditional diffusion model from scratch: the recipe of the embedded pixel teachers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel

from ..core.errors import UsageError
from ..core.images import to_unit_range
from ..core.rng import KeyedRandom, seeded
from ..core.schedule import from_diffusers
from ..models.data import load_labelled
from ..models.denoiser import NetworkDenoiser
from ..models.pipeline import ClassConditionalPipeline
from ..models.pixel import PixelDenoiser
from ..samplers.scheduler import DEISScheduler
from .checks import check_at_least, check_shares, check_unet
from .method import Draw, Loss, Method, Phase

CLASSES = 10


class Denoising(Method):
    """Mean squared error of the network's own prediction type at stratified times, classes dropped for guidance."""

    main_role = "model"

    @dataclass
    class Config:
        """Attributes:
        data: the labelled images, see `models.data.LABELLED`.
        channels: widths of the resolutions, each half the one before; attention at the lowest.
        prediction_type: what the network predicts.
        null_probability: share of samples trained with the null class.
        sampling_steps: steps of the pictures and the default of the exported pipeline.
        """

        data: str = "digits"
        channels: tuple[int, ...] = (16, 32)
        prediction_type: str = "v_prediction"
        null_probability: float = 0.1
        sampling_steps: int = 20

        def __post_init__(self):
            check_unet(self.channels, self.prediction_type)
            check_shares(null_probability=self.null_probability)
            check_at_least(1, sampling_steps=self.sampling_steps)

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.reference = f"{config.data}:train"
        images, self.labels = load_labelled(config.data)
        self.images = to_unit_range(images)
        self._check_size(self.images.shape[-1])
        with seeded(seed):
            self.roles = {"model": self._build()}

    def _check_size(self, size: int) -> None:
        """Refuse a network that images of this height and width do not fit."""
        if size % 2 ** (len(self.config.channels) - 1):
            raise UsageError(f"{len(self.config.channels)} method.channels halve {size} pixels too often.")

    def _build(self) -> NetworkDenoiser:
        """A fresh model; sets `scheduler`, what the exported pipeline draws with."""
        config = self.config
        self.scheduler = DEISScheduler(prediction_type=config.prediction_type, timestep_spacing="trailing")
        plain = len(config.channels) - 1
        net = UNet2DModel(
            sample_size=self.images.shape[-1],
            in_channels=self.images.shape[1],
            out_channels=self.images.shape[1],
            layers_per_block=1,
            block_out_channels=config.channels,
            down_block_types=(*("DownBlock2D",) * plain, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * plain),
            attention_head_dim=16,
            norm_num_groups=8,
            num_class_embeds=CLASSES + 1,
        )
        return PixelDenoiser(net, from_diffusers(self.scheduler), config.prediction_type)

    def to(self, device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def phases(self, step: int) -> list[Phase]:
        return [Phase("denoise", ("model",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        model: NetworkDenoiser = self.roles["model"]
        index = draw.integers("data", len(self.images))
        dropped = draw.uniform("null") < self.config.null_probability
        labels = torch.where(dropped, CLASSES, self.labels[index])
        t = model.schedule.time(draw.stratified("time"))
        eps = draw.normal("eps", model.sample_shape)
        return Loss(model.denoising_error(self.images[index], t, eps, {"class_labels": labels}).mean())

    def samples(self, model: NetworkDenoiser, random: KeyedRandom) -> torch.Tensor:
        """Ten of each class, one class a row, drawn as the exported pipeline draws."""
        pipeline = self._pipeline(model)
        pipeline.set_progress_bar_config(disable=True)
        noise = random.normal("picture", 0, 0, 100, model.sample_shape)
        return pipeline(class_labels=torch.arange(100) // CLASSES, noise=noise, output_type="pt").images

    def export(self, model: NetworkDenoiser, folder: Path) -> None:
        self._pipeline(model).save_pretrained(folder)

    def _pipeline(self, model: NetworkDenoiser) -> ClassConditionalPipeline:
        return ClassConditionalPipeline.of(model.net, self.scheduler, self.config.sampling_steps)
