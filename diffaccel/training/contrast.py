"""Trains the picture and text encoder of the emoji: the second stage of the text-to-image teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..core.images import to_unit_range
from ..core.rng import seeded
from ..models.emoji import SIZE, load_emoji
from ..models.emoji_encoder import EmojiEncoder, build_tokenizer
from .checks import check_at_least, check_shares
from .method import Draw, Loss, Method, Phase


class EmojiContrast(Method):
    """Symmetric cross-entropy over the pairs of a micro-batch (Radford et al. 2021); pictures shifted, tinted, noisy.

    What a pair is compared with is its micro-batch, so accumulation and processes change this loss.
    """

    main_role = "encoder"

    @dataclass
    class Config:
        """Attributes:
        vocabulary: number of tokens.
        longest: tokens of a prompt, its two marks included.
        noise: largest standard deviation of added noise, in units of the [−1, 1] range.
        tint: half-range of the gain of each colour.
        largest_shift: in pixels, each way.
        archive: the .tgz of the npm package of pictures; "" fetches it.
        """

        vocabulary: int = 2048
        longest: int = 32
        noise: float = 0.3
        tint: float = 0.15
        largest_shift: int = 6
        archive: str = ""

        def __post_init__(self):
            check_at_least(0, noise=self.noise, largest_shift=self.largest_shift)
            check_shares(tint=self.tint)

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.pictures = load_emoji(Path(config.archive) if config.archive else None)
        self.images = to_unit_range(self.pictures.on_white())
        texts = [text for captions in self.pictures.captions for text in captions]
        with seeded(seed):
            self.roles = {"encoder": EmojiEncoder(build_tokenizer(texts, config.vocabulary, config.longest))}

    def phases(self, step: int) -> list[Phase]:
        return [Phase("match", ("encoder",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        encoder: EmojiEncoder = self.roles["encoder"]
        index = self.pictures.draw(draw.uniform("concept"), draw.uniform("variant"))
        texts = self.pictures.captions_of(index, draw.uniform("caption"))
        similar = encoder.picture(self._augmented(self.images[index], draw)) @ encoder.embed_texts(texts).T
        logits = similar.float() * encoder.log_scale.exp().clamp(max=100.0)
        equal = (index[:, None] == index[None, :]).float().to(logits.device)
        target = equal / equal.sum(1, keepdim=True)
        total = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        return Loss(total, {"scale": encoder.log_scale.detach().exp()})

    def _augmented(self, x: torch.Tensor, draw: Draw) -> torch.Tensor:
        reach = self.config.largest_shift
        padded = F.pad(x, (reach,) * 4, value=1.0)
        shifts = zip(*(draw.integers(axis, 2 * reach + 1).tolist() for axis in ("rows", "columns")), strict=True)
        x = torch.stack([one[:, r : r + SIZE, c : c + SIZE] for one, (r, c) in zip(padded, shifts, strict=True)])
        tint = torch.stack([draw.uniform(f"tint/{channel}").cpu() for channel in "rgb"], 1).float()
        gain = 1.0 + self.config.tint * (2.0 * tint - 1.0)
        x = (x + 1.0) * gain[..., None, None] - 1.0
        level = self.config.noise * draw.uniform("level").cpu().float().square()  # mostly little
        return x.to(draw.device) + level[:, None, None, None].to(draw.device) * draw.normal("noise", x.shape[1:])

    def samples(self, model, random):
        return None

    @torch.no_grad()
    def validate(self, model: EmojiEncoder) -> dict[str, float]:
        """Share of pictures whose own first caption is the nearest of all first captions, among the nearest five."""
        device = model.log_scale.device
        pictures = torch.cat([model.picture(part.to(device)) for part in self.images.split(256)])
        first = [captions[0] for captions in self.pictures.captions]
        texts = torch.cat([model.embed_texts(first[i : i + 256]) for i in range(0, len(first), 256)])
        nearest = (pictures @ texts.T).topk(5).indices.cpu()
        right = nearest == torch.arange(len(first))[:, None]
        return {"top1": float(right[:, 0].float().mean()), "top5": float(right.any(1).float().mean())}

    @torch.no_grad()
    def export(self, model: EmojiEncoder, folder: Path) -> None:
        model = model.cpu().eval()
        vectors = torch.cat([model.picture.trunk(part) for part in self.images.split(256)]).double()
        weight = self.pictures.probabilities()[:, None]
        variance = (weight * (vectors - (weight * vectors).sum(0)).square()).sum()
        model.picture.feature_scale.fill_(float(torch.sqrt(100.0 / variance)))
        model.save(folder)
