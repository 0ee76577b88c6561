"""One pass over the images of a side: what every metric needs of every extractor, from one decoding of each image."""

import time
from dataclasses import dataclass, field

import torch

from ..core.errors import DataError, DiffaccelError, MissingWeightsError, NumericalError, UsageError
from ..core.processes import Processes
from .features import FeatureExtractor
from .groups import GROUPS, assign_groups
from .metrics.frechet import Gaussian
from .metrics.scores import ScoreSums, assign_splits
from .moments import GroupedMoments
from .sources import ImageSource, with_channels

_BLOCK = 256  # images that are decoded together and belong to one process
_SHOWN = 64  # images kept to be looked at

MOMENTS, VECTORS, CLASSES, CAPTIONS = "moments", "vectors", "classes", "captions"


@dataclass
class Side:
    """What is known of one side in one feature space.

    Attributes:
        name: of the side.
        count: images; None for a statistics file that does not tell.
        extractor: where the features come from.
        moments: mean and covariance, by group where the side is sampled.
        vectors: (count, d) float32 features, if a metric needs them.
        groups: (count,) group of each vector.
        scores: sums of class probabilities, if a metric needs them.
        labels: (count,) class of each vector's image, where class proportions were fixed.
        positions: (count,) place of each vector's image in its source.
        captions: texts of the images, if a metric needs them.
        notes: what came up while measuring, for the warnings of the report.
    """

    name: str
    count: int | None
    extractor: FeatureExtractor
    moments: GroupedMoments | Gaussian | None = None
    vectors: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    scores: ScoreSums | None = None
    labels: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    captions: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Space:
    """Accumulators of one extractor."""

    extractor: FeatureExtractor
    moments: GroupedMoments | None
    scores: ScoreSums | None
    vectors: list[torch.Tensor] | None
    positions: list[torch.Tensor] = field(default_factory=list)

    def update(self, index: torch.Tensor, images, groups: torch.Tensor, splits: torch.Tensor) -> None:
        features = self.extractor(images)
        if not bool(torch.isfinite(features).all()):
            raise NumericalError(f"{self.extractor.name} gives NaN or infinite features.")
        if self.moments is not None:
            self.moments.update(features, groups[index] % self.moments.groups)
        if self.scores is not None:
            self.scores.update(self.extractor.logits(features), splits[index])
        if self.vectors is not None:
            self.vectors.append(features.cpu())
        self.positions.append(index)


def collect(
    source: ImageSource,
    needs: dict[FeatureExtractor, set[str]],
    processes: Processes,
    *,
    splits: int = 10,
    interval: bool = True,
    progress: bool = False,
) -> tuple[dict[FeatureExtractor, Side], dict, list[torch.Tensor], float]:
    """Read a side once and extract all features.

    Args:
        source: the images; every process reads its share.
        needs: per extractor a set of MOMENTS, VECTORS, CLASSES.
        splits: parts of the Inception Score.
        interval: keep moments by group, for the jackknife; without it ten times less memory.

    Returns:
        What was found per extractor, the description of the side, its first images, and the seconds it took.

    Raises:
        DataError: unusable images; every process raises, whichever saw them.
        NumericalError: non-finite features.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    groups = assign_groups(source.labels, source.count)
    parts = assign_splits(source.count, splits)
    spaces = [
        _Space(
            extractor,
            GroupedMoments(extractor.num_features, GROUPS if interval else 1) if MOMENTS in wanted else None,
            ScoreSums(extractor.num_classes, splits) if CLASSES in wanted else None,
            [] if VECTORS in wanted else None,
        )
        for extractor, wanted in needs.items()
    ]
    channels = max(space.extractor.channels for space in spaces)
    mixed = all(space.extractor.resizes for space in spaces)
    shown: list[torch.Tensor] = []
    trouble: DiffaccelError | None = None
    visible = None if progress and processes.rank == 0 else True  # None: only on a terminal
    shard = (processes.rank, processes.world)
    try:
        with tqdm(total=-(-source.count // shard[1]), desc=source.name, unit="image", disable=visible) as bar:
            for batch in source.batches(channels, _BLOCK, mixed, shard):
                for space in spaces:
                    images = with_channels(batch.images, space.extractor.channels)
                    space.update(batch.index, images, groups, parts)
                if len(shown) < _SHOWN:
                    shown += list(batch.images[: _SHOWN - len(shown)])
                bar.update(len(batch.index))
    except DiffaccelError as error:
        trouble = error
    records = _join(processes, source, trouble)
    source.check(records)
    sides = {space.extractor: _gather(processes, space, source, groups, records) for space in spaces}
    return sides, source.describe(records), shown, time.perf_counter() - started


def _join(processes: Processes, source: ImageSource, trouble: DiffaccelError | None) -> dict[int, dict]:
    """Records of all processes; if one of them failed, all fail with its sentence."""
    mine = {
        "records": list(source.records.items()),
        "error": None if trouble is None else [type(trouble).__name__, str(trouble)],
    }
    found = processes.gather_json(mine)
    if trouble is not None:
        raise trouble
    for other in found:
        if other["error"]:
            name, text = other["error"]
            kinds = {kind.__name__: kind for kind in (DataError, UsageError, NumericalError, MissingWeightsError)}
            raise kinds.get(name, DiffaccelError)(text)
    return dict(sorted((int(position), record) for other in found for position, record in other["records"]))


def _gather(processes: Processes, space: _Space, source: ImageSource, groups: torch.Tensor, records: dict) -> Side:
    """Bring together what all processes accumulated; every process gets the same."""
    count = sum("reason" not in record for record in records.values())
    side = Side(source.name, count, space.extractor)
    if space.moments is not None:
        first, *rest = map(GroupedMoments.from_tensors, processes.gather_tensors(space.moments.tensors()))
        side.moments = first.merge(*rest) if rest else space.moments
    if space.scores is not None:
        first, *rest = map(ScoreSums.from_tensors, processes.gather_tensors(space.scores.tensors()))
        side.scores = first.merge(*rest) if rest else space.scores
    if space.vectors is not None:
        dim = space.extractor.num_features
        mine = {
            "positions": torch.cat([torch.zeros(0, dtype=torch.long), *space.positions]),
            "vectors": torch.cat([torch.zeros(0, dim), *space.vectors]),
        }
        found = processes.gather_tensors(mine)
        positions = torch.cat([part["positions"] for part in found])
        order = positions.argsort()
        side.vectors = torch.cat([part["vectors"] for part in found])[order]
        side.positions = positions[order]
        side.groups = groups[side.positions]
        side.labels = None if source.labels is None else source.labels[side.positions]
    return side
