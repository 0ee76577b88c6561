"""Features of the bundled emoji encoder: the space in which pictures of tiny-sd are judged."""

import torch

from ...core.files import sha256_file
from ...core.images import to_unit_range
from ...models.emoji_encoder import load_picture_encoder, picture_weights
from .base import FeatureExtractor


class EmojiFeatures(FeatureExtractor):
    """128 activations of the picture encoder behind tiny-sd; its training pictures have covariance trace 100.

    Raises:
        DataError: the bundled weights are missing or damaged.
    """

    name = "emoji128"
    num_features = 128
    channels = 3
    image_size = (64, 64)
    preprocessing = "uint8 RGB / 127.5 - 1, no resize"

    def __init__(self):
        super().__init__()
        self.encoder = load_picture_encoder()
        self.eval()

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.features(to_unit_range(images))

    def weights_sha256(self) -> str:
        """SHA-256 of the weight file."""
        return sha256_file(picture_weights())
