"""Trains a small AutoencoderKL from scratch: the first stage of the text-to-image teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..core.images import to_unit_range
from ..core.rng import KeyedRandom, seeded
from ..models.emoji import SIZE, load_emoji
from .checks import check_at_least, check_shares, check_unet
from .method import Draw, Loss, Method, Phase

_SHOWN = 20


class EmojiAutoencoding(Method):
    """Absolute error at three scales and of pixel differences, and a weak Kullback–Leibler term.

    Pictures are mirrored, shifted and laid on a random colour now and then, so that pictures of users, which are no emoji,
    survive as well. At export every latent channel is brought to mean 0 and deviation 1 over the training pictures.
    """

    main_role = "autoencoder"

    @dataclass
    class Config:
        """Attributes:
        channels: widths of the resolutions; every one but the last is followed by a halving.
        latent_channels: of the latents; pipelines for inpainting insist on 4.
        kl_weight: of the Kullback–Leibler divergence per latent value, in units of the absolute error in [−1, 1].
        coloured: share of pictures on a random colour in place of white.
        largest_shift: in pixels, each way.
        archive: the .tgz of the npm package of pictures; "" fetches it.
        """

        channels: tuple[int, ...] = (16, 32, 64)
        latent_channels: int = 4
        kl_weight: float = 3e-4
        coloured: float = 0.25
        largest_shift: int = 6
        archive: str = ""

        def __post_init__(self):
            check_unet(self.channels)
            check_at_least(1, latent_channels=self.latent_channels)
            check_at_least(0, kl_weight=self.kl_weight, largest_shift=self.largest_shift)
            check_shares(coloured=self.coloured)

    def __init__(self, config: Config, seed: int):
        self.config = config
        stages = len(config.channels)
        with seeded(seed):
            net = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * stages,
                up_block_types=("UpDecoderBlock2D",) * stages,
                block_out_channels=config.channels,
                layers_per_block=1,
                latent_channels=config.latent_channels,
                norm_num_groups=8,
                sample_size=SIZE,
                scaling_factor=1.0,
                mid_block_add_attention=False,
            )
        self.roles = {"autoencoder": net}
        self.pictures = load_emoji(Path(config.archive) if config.archive else None)

    def phases(self, step: int) -> list[Phase]:
        return [Phase("reconstruct", ("autoencoder",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        x = self._batch(draw)
        encoded = self.roles["autoencoder"].encode(x).latent_dist
        posterior = DiagonalGaussianDistribution(encoded.parameters.float())  # logarithms need more than bfloat16
        eps = draw.normal("posterior", tuple(posterior.mean.shape[1:]))
        decoded = self.roles["autoencoder"].decode(posterior.mean + posterior.std * eps).sample.float()
        pixels = (decoded - x).abs().mean()
        coarse = sum((F.avg_pool2d(decoded, scale) - F.avg_pool2d(x, scale)).abs().mean() for scale in (2, 4))
        edges = sum((torch.diff(decoded, dim=axis) - torch.diff(x, dim=axis)).abs().mean() for axis in (2, 3))
        kl = posterior.kl().mean() / eps[0].numel()
        total = pixels + 0.5 * coarse + edges + self.config.kl_weight * kl
        return Loss(total, {"pixels": pixels.detach(), "kl": kl.detach()})

    def _batch(self, draw: Draw) -> torch.Tensor:
        """(B, 3, 64, 64) in [−1, 1]."""
        index = self.pictures.draw(draw.uniform("concept"), draw.uniform("variant"))
        rgba = self.pictures.pixels[index]
        mirrored = draw.uniform("mirror").cpu() < 0.5
        rgba = torch.where(mirrored[:, None, None, None], rgba.flip(-1), rgba)
        reach = self.config.largest_shift
        shifts = torch.stack([draw.integers(axis, 2 * reach + 1).cpu() for axis in ("rows", "columns")], 1)
        padded = F.pad(rgba, (reach,) * 4)  # with transparent pixels
        rgba = torch.stack(
            [one[:, r : r + SIZE, c : c + SIZE] for one, (r, c) in zip(padded, shifts.tolist(), strict=True)]
        )
        ground = torch.stack([draw.uniform(f"ground/{channel}").cpu() for channel in "rgb"], 1).float()
        ground = torch.where(draw.uniform("coloured").cpu()[:, None] < self.config.coloured, ground, 1.0)[
            ..., None, None
        ]
        colour, opacity = rgba[:, :3].float() / 255.0, rgba[:, 3:].float() / 255.0
        return (2.0 * (colour * opacity + ground * (1.0 - opacity)) - 1.0).to(draw.device)

    def _shown(self, device) -> torch.Tensor:
        """Pictures from the whole chart, the same ones each time: (20, 3, 64, 64) in [−1, 1]."""
        every = torch.linspace(0, len(self.pictures) - 1, _SHOWN).long()
        return to_unit_range(self.pictures.on_white()[every]).to(device)

    def samples(self, model: AutoencoderKL, random: KeyedRandom) -> torch.Tensor:
        """Rows of originals, each above what is left of it."""
        x = self._shown(model.device)
        pairs = [
            rows for pair in zip(x.split(10), self._reconstructed(model, x).split(10), strict=True) for rows in pair
        ]
        return torch.cat(pairs)

    def validate(self, model: AutoencoderKL) -> dict[str, float]:
        x = self._shown(model.device)
        error = (self._reconstructed(model, x).clamp(-1, 1) - x).square().mean() / 4.0
        return {"psnr": float(-10.0 * torch.log10(error))}

    def _reconstructed(self, model: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
        return model.decode(model.encode(x).latent_dist.mode()).sample

    @torch.no_grad()
    def export(self, model: AutoencoderKL, folder: Path) -> None:
        model = model.cpu()
        latents = [model.encode(part).latent_dist.mode() for part in to_unit_range(self.pictures.on_white()).split(256)]
        weight = self.pictures.probabilities()
        values = torch.cat(latents).double().flatten(2).transpose(0, 1)  # (channels, N, pixels)
        mean = (values.mean(2) * weight).sum(1)
        variance = ((values - mean[:, None, None]).square().mean(2) * weight).sum(1)
        standardise(model, mean.float(), variance.sqrt().float())
        model.save_pretrained(folder)


@torch.no_grad()
def standardise(model: AutoencoderKL, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Make latents z of an autoencoder (z − mean)/deviation, channel by channel, without changing what it reconstructs.

    The change of variables is exact: it goes into the 1×1 convolutions behind the encoder and before the decoder.
    """
    before, after = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    scale = torch.cat([1.0 / deviation, torch.ones(channels)])
    shift = torch.cat([mean / deviation, 2.0 * deviation.log()])  # of means and of logarithms of variances
    before.weight.mul_(scale[:, None, None, None])
    before.bias.mul_(scale).sub_(shift)
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.mul_(deviation[None, :, None, None])
