"""Distances to fixed reference images that are cheap enough to be taken again and again."""

import torch

from ..core.errors import UsageError, unknown
from ..core.processes import Processes
from .collect import MOMENTS, VECTORS, collect
from .features import get_features
from .metrics.frechet import distance
from .metrics.kernel import kid
from .moments import Moments
from .plan import fitting_features, side_from_statistics
from .sources import StatisticsSource, resolve
from .statistics import check_features

METRICS = {"fd": "FD", "kd": "KD"}


class Monitor:
    """Distance of batches of images to a fixed reference; compare equal numbers of images only.

    Args:
        reference: any side of `run.evaluate_images` but models; read once.
        features: registered extractor; "auto" for the one that statistics were made with, else the one that fits the
            images.
        metric: "fd", the plug-in Fréchet distance, or "kd", the kernel distance of KID.

    Raises:
        UsageError: an unknown metric or extractor, statistics of other or unnamed features, or without the features
            themselves where the kernel distance needs them.
        DataError, MissingWeightsError: unusable reference; see `sources.resolve`.
    """

    def __init__(self, reference, features: str = "auto", metric: str = "fd"):
        if metric not in METRICS:
            raise unknown("distance", metric, METRICS)
        side = resolve(reference)
        self.extractor = get_features(fitting_features({"real": side}) if features == "auto" else features)
        self.name = f"{METRICS[metric]}-{self.extractor.name}"
        if isinstance(side, StatisticsSource):
            check_features(side.path, side.statistics, self.extractor.identity())
            found = side_from_statistics(side, self.extractor)[0]
            self._gaussian, self._vectors = side.statistics.gaussian, found.vectors
        else:
            wanted = {MOMENTS if metric == "fd" else VECTORS}
            alone = Processes("cpu", together=False)
            found = collect(side, {self.extractor: wanted}, alone, interval=False).sides[self.extractor]
            self._gaussian = found.moments.total().gaussian() if metric == "fd" else None
            self._vectors = found.vectors
        if metric == "kd" and self._vectors is None:
            raise UsageError(f"The kernel distance needs the features themselves, which {side.name} does not keep.")
        self.metric = metric

    @torch.no_grad()
    def distance(self, images: torch.Tensor) -> float:
        """The distance of uint8 images (N, C, H, W)."""
        features = self.extractor(images)
        if self.metric == "kd":
            return kid(features, self._vectors).value
        return distance(self._gaussian, Moments(self.extractor.num_features).update(features).gaussian())

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        """{"FD-name": distance} of uint8 images (N, C, H, W)."""
        return {self.name: self.distance(images)}
