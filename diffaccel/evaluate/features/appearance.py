"""Colour and contrast of images as three features that no network computes."""

import math

import torch

from .base import FeatureExtractor


class AppearanceFeatures(FeatureExtractor):
    """Saturation, contrast and share of clipped values of every image, (N, 3), each within [0, 1]; `KINDS` names them.

    - saturation: mean over pixels of HSV's S = (max − min)/max over R, G, B, with 0 for black; 0 for grey images.
    - contrast: standard deviation of the luma 0.299·R + 0.587·G + 0.114·B within the image, of values in [0, 1]; at
      most 1/2 (RMS contrast: Peli 1990, Contrast in complex images).
    - clipped: share of values at 0 or 255, which is what strong guidance burns images to, grey ones too.

    Sums over pixels are integers, so neither batches nor threads change a bit.
    """

    KINDS = ("saturation", "contrast", "clipped")

    name = "pixels"
    num_features = len(KINDS)
    channels = 3
    resizes = True  # nothing is resized, but every image has numbers of its own, so sizes may differ
    preprocessing = "uint8 RGB: mean of HSV saturation, deviation of Rec. 601 luma, share of values at 0 and 255"

    def prepare(self, device="cpu", dtype: str = "float32", compile: bool = False) -> "AppearanceFeatures":
        """Return self: whole numbers are added on the CPU, whatever networks compute on."""
        return self

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([_appearance(image) for image in images])


def _appearance(image: torch.Tensor) -> tuple[float, float, float]:
    """The three numbers of one image, uint8 (3, H, W)."""
    pixels = image[0].numel()
    low, high = image.aminmax(dim=0)
    chroma = torch.bincount(high.flatten(), (high - low).flatten(), minlength=256)  # sums of integers, by maximum
    saturation = float((chroma[1:] / torch.arange(1, 256)).sum()) / pixels
    red, green, blue = image.long()
    luma = 299 * red + 587 * green + 114 * blue - 127_500  # from mid-grey: squares of 10⁸ pixels still fit in 63 bits
    total, squares = int(luma.sum()), int((luma * luma).sum())
    contrast = math.sqrt(pixels * squares - total**2) / (255_000 * pixels)  # exact below the root: flat images give 0
    clipped = int(((image == 0) | (image == 255)).sum()) / image.numel()
    return saturation, contrast, clipped
