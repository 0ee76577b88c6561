"""Trains the classifiers whose hidden layers are the feature spaces of FD-digits64 and FD-mnist64."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..core.errors import unknown
from ..core.images import to_unit_range
from ..core.rng import seeded
from ..models.classifier import SIZES, DigitsClassifier
from ..models.data import load_labelled
from .checks import check_at_least
from .method import Draw, Loss, Method, Phase


class DigitsClassification(Method):
    """Cross-entropy on the training digits, with shifts, contrast jitter and noise."""

    main_role = "classifier"

    @dataclass
    class Config:
        """Attributes:
        data: the labelled images, one of `models.classifier.SIZES`.
        shift: largest shift in pixels, each way.
        noise: standard deviation of the added noise, in units of the [−1, 1] range.
        contrast: relative half-range of the contrast jitter.
        """

        data: str = "digits"
        shift: int = 1
        noise: float = 0.1
        contrast: float = 0.2

        def __post_init__(self):
            if self.data not in SIZES:
                raise unknown("method.data", self.data, SIZES)
            check_at_least(0, shift=self.shift, noise=self.noise, contrast=self.contrast)

    def __init__(self, config: Config, seed: int):
        self.config = config
        images, self.labels = load_labelled(config.data)
        self.images = to_unit_range(images)
        images, self.held_out_labels = load_labelled(config.data, "heldout")
        self.held_out_images = to_unit_range(images)
        with seeded(seed):
            self.roles = {"classifier": DigitsClassifier(self.images.shape[-1])}

    def to(self, device):
        for name in ("images", "labels", "held_out_images", "held_out_labels"):
            setattr(self, name, getattr(self, name).to(device))

    def phases(self, step: int) -> list[Phase]:
        return [Phase("classify", ("classifier",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        index = draw.integers("data", len(self.images))
        x = self.images[index]
        shift, size = self.config.shift, x.shape[-1]
        padded = F.pad(x, (shift,) * 4, value=-1.0)  # a shifted image is a crop of the padded one
        rows, columns = draw.integers("rows", 2 * shift + 1), draw.integers("columns", 2 * shift + 1)
        span = torch.arange(size, device=x.device)
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded[sample, 0, rows[:, None, None] + span[:, None], columns[:, None, None] + span][:, None]
        gain = 1.0 + self.config.contrast * (2.0 * draw.uniform("contrast").float() - 1.0)
        x = (x + 1.0) * gain[:, None, None, None] - 1.0 + self.config.noise * draw.normal("noise", x.shape[1:])
        logits = self.roles["classifier"](x)
        accuracy = (logits.detach().argmax(1) == self.labels[index]).float().mean()
        return Loss(F.cross_entropy(logits, self.labels[index]), {"accuracy": accuracy})

    def samples(self, model, random):
        return None

    def validate(self, model) -> dict[str, float]:
        correct = model(self.held_out_images).argmax(1) == self.held_out_labels
        return {"held_out_accuracy": float(correct.float().mean())}

    def export(self, model: DigitsClassifier, folder: Path) -> None:
        model = model.cpu()
        model.calibrate(self.images.cpu())
        save_file(model.state_dict(), folder / "classifier.safetensors")
