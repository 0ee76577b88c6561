"""Trains the digits classifier whose hidden layer is the feature space of FD-digits64."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ..core.images import to_unit_range
from ..core.rng import seeded
from ..models.classifier import DigitsClassifier
from ..models.data import load_digits
from .method import Draw, Loss, Method, Phase


class DigitsClassification(Method):
    """Cross-entropy on the training digits, with shifts by up to one pixel, contrast jitter and noise."""

    main_role = "classifier"

    @dataclass
    class Config:
        """Attributes:
        noise: standard deviation of the added noise, in units of the [−1, 1] range.
        contrast: relative half-range of the contrast jitter.
        """

        noise: float = 0.1
        contrast: float = 0.2

    def __init__(self, config: Config, seed: int):
        self.config = config
        with seeded(seed):
            self.roles = {"classifier": DigitsClassifier()}
        images, self.labels = load_digits("train")
        self.images = to_unit_range(images)
        images, self.held_out_labels = load_digits("heldout")
        self.held_out_images = to_unit_range(images)

    def to(self, device):
        for name in ("images", "labels", "held_out_images", "held_out_labels"):
            setattr(self, name, getattr(self, name).to(device))

    def phases(self, step: int) -> list[Phase]:
        return [Phase("classify", ("classifier",))]

    def loss(self, phase: Phase, draw: Draw) -> Loss:
        index = draw.integers("data", len(self.images))
        x = self.images[index]
        # Shift by −1, 0 or 1 pixel in each direction: crop a padded image at a drawn corner.
        padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
        rows, columns = draw.integers("rows", 3), draw.integers("columns", 3)
        span = torch.arange(8, device=x.device)
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded[sample, 0, rows[:, None, None] + span[:, None], columns[:, None, None] + span][:, None]
        gain = 1.0 + self.config.contrast * (2.0 * draw.uniform("contrast").float() - 1.0)
        x = (x + 1.0) * gain[:, None, None, None] - 1.0 + self.config.noise * draw.normal("noise", (1, 8, 8))
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
