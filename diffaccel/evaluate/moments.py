"""Mean and covariance of features, streaming and mergeable (Chan, Golub & LeVeque 1983)."""

from collections.abc import Sequence

import torch

from ..core.errors import DataError
from .groups import GROUPS
from .metrics.checks import checked
from .metrics.frechet import Gaussian

_LEAST_ROWS = 1024  # rank-k updates of a d×d matrix pay off only for large k


class Moments:
    """Count, mean and centred second moment of feature vectors, accumulated in float64.

    Sums of squares are centred before they are added, so a large mean does not cancel the covariance; merging is
    associative up to rounding, so batch size and number of processes do not change the result. The sums live where the
    first features are if that is a CUDA device, else on the CPU.

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
        features = checked(features, least=0)
        if len(features) == 0:
            return self
        if self.count == 0:
            self.mean, self._scatter = self.mean.to(features.device), self._scatter.to(features.device)
        features = features.to(self.mean.device)
        mean, total = features.mean(dim=0), self.count + len(features)
        shift = mean - self.mean
        # One more row accounts for the distance of the two means, so the d×d matrix is read and written only once.
        between = shift * (self.count * len(features) / total) ** 0.5
        rows = torch.cat([features - mean, between[None]])
        self._scatter.addmm_(rows.T, rows)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total
        return self

    def merge(self, *others: "Moments") -> "Moments":
        """Return the moments of the union of this set and the others; none of them is changed.

        Raises:
            DataError: features of another length.
        """
        for part in others:
            if part.num_features != self.num_features:
                raise DataError(f"Cannot merge features of length {part.num_features} into {self.num_features}.")
        union, parts = Moments(self.num_features), [part for part in (self, *others) if part.count]
        if parts:
            device = parts[0].mean.device
            counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=device)
            means = torch.stack([part.mean.to(device) for part in parts])
            weights = (counts / counts.sum())[:, None]
            centre = means[0] + (weights * (means - means[0])).sum(0)
            between = counts.sqrt()[:, None] * (means - centre)
            scatter = between.T @ between
            for part in parts:
                scatter += part._scatter.to(device)
            union.count, union.mean, union._scatter = sum(part.count for part in parts), centre, scatter
        return union

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
        """The normal distribution with these moments, on the CPU."""
        return Gaussian(self.mean.cpu(), self.covariance.cpu(), rank=min(self.count - 1, self.num_features))


class GroupedMoments:
    """Moments of K groups of a stream of features: all that a delete-group jackknife needs, O(K·d²) memory.

    Features wait until there are enough for an update of all groups; what waits is no larger than d×d or 1024×d.

    Attributes:
        count: samples seen.
        groups: number K of groups.
    """

    def __init__(self, num_features: int, groups: int = GROUPS):
        self.count, self.groups = 0, groups
        self._parts = [Moments(num_features) for _ in range(groups)]
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rows = 0

    @property
    def parts(self) -> list[Moments]:
        """Moments of the K groups; reading them ends the waiting."""
        self._flush()
        return self._parts

    @property
    def counts(self) -> list[int]:
        """Samples in each of the K groups."""
        return [part.count for part in self.parts]

    @property
    def num_features(self) -> int:
        """Length d of a feature vector."""
        return self._parts[0].num_features

    def update(self, features: torch.Tensor, groups: torch.Tensor) -> "GroupedMoments":
        """Add features (n, d) of any float type, and the groups (n,) they belong to (see `assign_groups`); returns self.

        Raises:
            DataError: other shapes, or groups outside [0, K).
            NumericalError: NaN or infinite features, at the latest when the moments are read.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features or groups.shape != features.shape[:1]:
            raise DataError(
                f"Features must be (n, {self.num_features}) and groups (n,), got {tuple(features.shape)} and "
                f"{tuple(groups.shape)}."
            )
        if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < self.groups:
            raise DataError(f"Groups must lie in 0 … {self.groups - 1}.")
        self._waiting.append((features.detach(), groups))
        self._rows += len(features)
        self.count += len(features)
        if self._rows >= max(_LEAST_ROWS, self.num_features):
            self._flush()
        return self

    def _flush(self) -> None:
        if self._rows:
            features = torch.cat([features for features, _ in self._waiting])
            groups = torch.cat([groups.to(features.device) for _, groups in self._waiting])
            self._waiting, self._rows = [], 0
            for index, part in enumerate(self._parts):
                part.update(features[groups == index])

    def merge(self, *others: "GroupedMoments") -> "GroupedMoments":
        """Return the moments of the union of this sample and the others, group by group; none of them is changed.

        Raises:
            DataError: another number of groups, or features of another length.
        """
        union = GroupedMoments(self.num_features, self.groups)
        if any(other.groups != self.groups for other in others):
            raise DataError("Only samples with the same number of groups can be merged.")
        union._parts = [first.merge(*rest) for first, *rest in zip(self.parts, *(o.parts for o in others), strict=True)]
        union.count = sum(union.counts)
        return union

    def tensors(self) -> dict[str, torch.Tensor]:
        """Content as CPU tensors whose shapes depend on K and d only: ``counts`` int64, ``means``, ``scatters`` float64."""
        return {
            "counts": torch.tensor(self.counts, dtype=torch.int64),
            "means": torch.stack([part.mean.cpu() for part in self.parts]),
            "scatters": torch.stack([part._scatter.cpu() for part in self.parts]),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "GroupedMoments":
        """Inverse of `tensors`."""
        groups, num_features = tensors["means"].shape
        result = cls(num_features, groups)
        for index, part in enumerate(result._parts):
            part.count = int(tensors["counts"][index])
            part.mean, part._scatter = tensors["means"][index].clone(), tensors["scatters"][index].clone()
        result.count = sum(result.counts)
        return result

    def total(self) -> Moments:
        """Moments of all samples."""
        return _merged(self.parts)

    def without(self, index: int) -> Moments:
        """Moments of all samples but those of one group."""
        return _merged(self.parts[:index] + self.parts[index + 1 :])


def _merged(parts: Sequence[Moments]) -> Moments:
    return parts[0].merge(*parts[1:])
