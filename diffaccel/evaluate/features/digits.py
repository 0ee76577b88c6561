"""Features of the bundled digit classifiers: the offline defaults for 8×8 and 28×28 grey images."""

import torch

from ...core.images import to_unit_range
from .base import FeatureExtractor


class DigitsFeatures(FeatureExtractor):
    """Penultimate activations (64) of the bundled classifier; the real training digits have covariance trace 100.

    Raises:
        DataError: the bundled weights are missing or damaged.
    """

    name = "digits64"
    num_features = 64
    channels = 1
    image_size = (8, 8)
    data = "digits"
    num_classes = 10
    preprocessing = "uint8 grey / 127.5 - 1, no resize"

    def __init__(self):
        from ...models.classifier import load_digits_classifier

        super().__init__()
        self.classifier = load_digits_classifier(self.data)
        self.eval()

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(to_unit_range(images))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class scores (N, 10)."""
        return self.classifier.head(features / self.classifier.feature_scale)

    def weights_sha256(self) -> str:
        """SHA-256 that the classifier states for its weight file."""
        return self.classifier.sha256


class MnistFeatures(DigitsFeatures):
    """Penultimate activations (64) of the bundled MNIST classifier; the training images have covariance trace 100.

    Raises:
        DataError: the bundled weights are missing or damaged.
    """

    name = "mnist64"
    image_size = (28, 28)
    data = "mnist"
