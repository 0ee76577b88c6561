"""One pass over the images of a side: what every metric needs of every extractor, from one decoding of each image."""

import time
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch.nn.functional import avg_pool2d

from ..core.processes import Processes
from .features import FeatureExtractor
from .groups import GROUPS, assign_groups
from .imagesource import ImageSource, with_channels
from .metrics.frechet import Gaussian
from .metrics.scores import ScoreSums, assign_splits
from .moments import GroupedMoments

_BLOCK, _BLOCK_BYTES = 256, 2**26  # most images and bytes that are decoded together and belong to one process
_SHOWN, _SHOWN_SIZE = 64, 256  # images kept to be looked at, and their largest height and width

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
class Collection:
    """What one pass found.

    Attributes:
        sides: by extractor; complete in the first process only.
        details: description of the side.
        shown: its first images, no larger than 256 pixels, lists of uint8 (C, H, W).
        pixels: hashes of the decoded images.
        seconds: duration.
    """

    sides: dict[FeatureExtractor, Side]
    details: dict
    shown: list[torch.Tensor]
    pixels: list[str]
    seconds: float


class _Space:
    """Accumulators of one extractor."""

    def __init__(self, extractor: FeatureExtractor, wanted: set[str], splits: int, groups: int):
        self.extractor = extractor
        self.moments = GroupedMoments(extractor.num_features, groups) if MOMENTS in wanted else None
        self.scores = ScoreSums(extractor.num_classes, splits) if CLASSES in wanted else None
        self.vectors: list[torch.Tensor] | None = [] if VECTORS in wanted else None
        self.positions: list[torch.Tensor] = []

    def update(self, index: torch.Tensor, images, groups: torch.Tensor, splits: torch.Tensor) -> None:
        features = self.extractor(images)
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
    channels: int | None = None,
    splits: int = 10,
    interval: bool = True,
    progress: bool = False,
) -> Collection:
    """Read a side once and extract all features.

    Args:
        source: the images; every process reads its share.
        needs: per extractor a set of MOMENTS, VECTORS, CLASSES.
        channels: of the decoded images, at least those of every extractor; by default just these.
        splits: parts of the Inception Score.
        interval: keep moments by group, for the jackknife; without it ten times less memory.

    Raises:
        DataError: unusable images; every process raises, whichever saw them.
        NumericalError: non-finite features.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    groups, parts = assign_groups(source.labels, source.count), assign_splits(source.count, splits)
    spaces = [_Space(space, wanted, splits, GROUPS if interval else 1) for space, wanted in needs.items()]
    channels = channels or max(space.extractor.channels for space in spaces)
    mixed = all(space.extractor.resizes for space in spaces)
    block = max(1, min(_BLOCK, _BLOCK_BYTES // (channels * source.shape[1] * source.shape[2])))
    shown: list[torch.Tensor] = []
    pixels: dict[int, str] = {}
    visible = None if progress and processes.rank == 0 else True  # None: only on a terminal

    def read() -> None:
        shard = (processes.rank, processes.world)
        with tqdm(total=-(-source.count // shard[1]), desc=source.name, unit="image", disable=visible) as bar:
            for batch in source.batches(channels, block, mixed, shard):
                for position, image in zip(batch.index.tolist(), batch.images, strict=True):
                    pixels[position] = blake2b(image.contiguous().numpy(), digest_size=8).hexdigest()
                    if len(shown) < _SHOWN:
                        shown.append(_small(image))
                for space in spaces:
                    space.update(batch.index, with_channels(batch.images, space.extractor.channels), groups, parts)
                bar.update(len(batch.index))

    processes.agree(read)
    found = processes.gather_json([list(source.records.items()), list(pixels.items())])
    records = dict(sorted((int(position), record) for other, _ in found for position, record in other))
    processes.agree(lambda: source.check(records))
    count = sum("reason" not in record for record in records.values())
    sides = {space.extractor: _join(processes, space, source, groups, count) for space in spaces}
    hashes = [text for _, other in found for _, text in other]
    return Collection(sides, source.describe(records), shown, hashes, time.perf_counter() - started)


def _join(processes: Processes, space: _Space, source: ImageSource, groups: torch.Tensor, count: int) -> Side:
    """Bring together what all processes accumulated."""
    side = Side(source.name, count, space.extractor)
    if space.moments is not None:
        side.moments = _merged(processes, space.moments)
    if space.scores is not None:
        side.scores = _merged(processes, space.scores)
    if space.vectors is not None:
        empty = torch.zeros(0, dtype=torch.long), torch.zeros(0, space.extractor.num_features)
        mine = {"positions": torch.cat([empty[0], *space.positions]), "vectors": torch.cat([empty[1], *space.vectors])}
        found = [theirs for theirs in processes.each(mine) if processes.rank == 0]
        positions = torch.cat([empty[0], *(part["positions"] for part in found)])
        order = positions.argsort()
        side.vectors = torch.cat([empty[1], *(part["vectors"] for part in found)])[order].to(processes.device)
        side.positions = positions[order]
        side.groups = groups[side.positions]
        side.labels = None if source.labels is None else source.labels[side.positions]
    return side


def _merged(processes: Processes, sums):
    """Accumulators of all processes as one, in the first process; the others keep theirs."""
    if processes.world == 1:
        return sums
    total = None
    for theirs in processes.each(sums.tensors()):
        if processes.rank == 0:
            part = type(sums).from_tensors(theirs)
            total = part if total is None else total.merge(part)
    return total if processes.rank == 0 else sums


def _small(image: torch.Tensor) -> torch.Tensor:
    """The image, or a reduced copy; never a view, which would keep its whole batch in memory."""
    factor = -(-max(image.shape[1:]) // _SHOWN_SIZE)
    if factor == 1:
        return image.clone()
    return avg_pool2d(image[None].float(), factor, ceil_mode=True)[0].round().to(torch.uint8)
