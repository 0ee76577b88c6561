"""Mean and covariance of features, streaming and mergeable (Chan, Golub & LeVeque 1983)."""

import torch

from ..core.errors import DataError, NumericalError
from .metrics.frechet import Gaussian


class Moments:
    """Count, mean and centred second moment of feature vectors, accumulated in float64 on the CPU.

    Sums of squares are centred before they are added, so a large mean does not cancel the covariance; merging is
    associative up to rounding, so batch size and number of processes do not change the result.

    Attributes:
        count: number N of vectors seen.
        mean: (d,) float64.
    """

    def __init__(self, num_features: int):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def num_features(self) -> int:
        """Length d of a feature vector."""
        return self.mean.numel()

    def update(self, features: torch.Tensor) -> "Moments":
        """Add a batch of features (n, d) of any float type; returns self.

        Raises:
            DataError: another shape.
            NumericalError: NaN or infinite features.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise DataError(f"Features must be (n, {self.num_features}), got {tuple(features.shape)}.")
        features = features.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(features).all()):
            raise NumericalError("The features contain NaN or infinite values; check the images and the extractor.")
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)
        return self

    def merge(self, *others: "Moments") -> "Moments":
        """Return the moments of the union of this set and the others; none of them is changed."""
        union = Moments(self.num_features)
        for part in (self, *others):
            if part.num_features != self.num_features:
                raise DataError(f"Cannot merge features of length {part.num_features} into {self.num_features}.")
            union._add(part.count, part.mean, part._scatter)
        return union

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self._scatter += scatter
        self._scatter.addr_(difference, difference, alpha=self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (d, d) with N−1 in the denominator, as in torchmetrics and pytorch-fid.

        Raises:
            DataError: fewer than two vectors.
        """
        if self.count < 2:
            raise DataError(f"A covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The normal distribution with these moments."""
        return Gaussian(self.mean, self.covariance)
