"""Trains a class-conditional rectified-flow transformer from scratch: the recipe of the flow teachers."""

from dataclasses import dataclass

from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

from ..core.errors import UsageError
from ..core.schedule import from_diffusers
from ..models.denoiser import NetworkDenoiser
from ..models.pixel import PixelDenoiser
from .checks import check_at_least, check_shares
from .denoising import CLASSES, Denoising


class FlowMatching(Denoising):
    """Mean squared error of the velocity ε − x0 on straight paths (Liu et al. 2023; Lipman et al. 2023), in pixels.

    The network is diffusers' DiT (Peebles and Xie 2023), the exported scheduler its FlowMatchEulerDiscreteScheduler.
    """

    @dataclass
    class Config:
        """Attributes:
        data: the labelled images, see `models.data.LABELLED`.
        layers, heads, head_dim: size of the transformer.
        patch_size: side of the squares of pixels that are one token.
        null_probability: share of samples trained with the null class.
        sampling_steps: steps of the pictures and the default of the exported pipeline.
        """

        data: str = "digits"
        layers: int = 6
        heads: int = 4
        head_dim: int = 24
        patch_size: int = 2
        null_probability: float = 0.1
        sampling_steps: int = 20

        def __post_init__(self):
            check_at_least(1, layers=self.layers, heads=self.heads, head_dim=self.head_dim, patch_size=self.patch_size)
            check_at_least(1, sampling_steps=self.sampling_steps)
            check_shares(null_probability=self.null_probability)

    def _check_size(self, size: int) -> None:
        if size % self.config.patch_size:
            raise UsageError(
                f"method.patch_size must divide the {size} pixels of an edge, got {self.config.patch_size}."
            )

    def _build(self) -> NetworkDenoiser:
        config = self.config
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        net = DiTTransformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=self.images.shape[1],
            out_channels=self.images.shape[1],
            num_layers=config.layers,
            sample_size=self.images.shape[-1],
            patch_size=config.patch_size,
            num_embeds_ada_norm=CLASSES,
        )
        return PixelDenoiser(net, from_diffusers(self.scheduler), "flow_prediction")
