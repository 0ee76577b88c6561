"""The small digit classifiers: accuracy of generated samples, and the features of FD-digits64 and FD-mnist64."""

import torch
from safetensors.torch import load_file
from torch import nn

from ..core.files import sha256_file
from .shipped import ASSETS, check_shipped

SIZES = {"digits": 8, "mnist": 28}
_FILE = "classifier.safetensors"


class DigitsClassifier(nn.Module):
    """Three convolutions and a 64-wide ReLU layer; square grey images in [−1, 1].

    Args:
        size: height and width S of the images, a multiple of 4.

    Attributes:
        feature_scale: buffer; brings the features of the real training digits to a covariance trace of 100, so that
            Fréchet distances have a fixed, readable unit.
        sha256: hash of the weight file it was loaded from, "" for fresh weights.
    """

    def __init__(self, size: int = 8):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(48 * (size // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.register_buffer("feature_scale", torch.ones(()))
        self.sha256 = ""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Scaled penultimate activations: (N, 1, S, S) in [−1, 1] → (N, 64)."""
        return self.trunk(x) * self.feature_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits: (N, 1, S, S) in [−1, 1] → (N, 10)."""
        return self.head(self.trunk(x))

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """Set `feature_scale` from the real training images x (N, 1, S, S)."""
        trace = torch.cov(self.trunk(x).double().T).trace()
        self.feature_scale.fill_(float(torch.sqrt(100.0 / trace)))


def load_digits_classifier(name: str = "digits") -> DigitsClassifier:
    """Load a shipped classifier in eval mode, frozen; its hash is checked.

    Args:
        name: of the images that it knows, one of `SIZES`.

    Raises:
        DataError: the file is missing or damaged.
    """
    check_shipped(name, _FILE)
    path = ASSETS / name / _FILE
    model = DigitsClassifier(SIZES[name])
    model.load_state_dict(load_file(path))
    model.sha256 = sha256_file(path)
    return model.eval().requires_grad_(False)
