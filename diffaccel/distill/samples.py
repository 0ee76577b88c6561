"""Real samples in the space of a teacher: pixels, encoded images with captions, or what the teacher draws itself."""

from pathlib import Path

import torch

from ..core.captions import find_captions
from ..core.errors import DataError, UsageError
from ..core.imagefiles import ImageReader, PathFiles, find_images
from ..models.conditions import Conditions, PromptConditions
from ..models.data import RealImages
from ..models.denoiser import Condition

DRAWN = "teacher"
DRAWN_STEPS = 20


class EncodedSamples:
    """Latents of images with captions or classes, each drawn from the posterior that the encoder gave.

    Args:
        mean, spread: (N, C, H, W) of the posteriors.
        captions: what they show, each once.
        place: (N,) int64, the one that each image shows.
    """

    def __init__(self, mean: torch.Tensor, spread: torch.Tensor, captions: Conditions, place: torch.Tensor):
        self.mean, self.spread, self.captions, self.place = mean, spread, captions, place

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, draw) -> tuple[torch.Tensor, Condition | None]:
        """Latents (B, C, H, W) and their condition for one micro-batch (a `training.method.Draw`)."""
        index = draw.integers("real", len(self)).cpu()
        posterior = draw.normal("posterior", tuple(self.mean.shape[1:]))
        x0 = self.mean[index].to(draw.device) + self.spread[index].to(draw.device) * posterior
        return x0, self.captions.at(self.place[index].to(draw.device))

    def only(self, members: torch.Tensor) -> "EncodedSamples":
        """Those that show some of the captions (M,).

        Raises:
            DataError: there are none.
        """
        keep = torch.isin(self.place, members)
        if not keep.any():
            raise DataError("No real image shows what this student draws.")
        return EncodedSamples(self.mean[keep], self.spread[keep], self.captions, self.place[keep])


class DrawnSamples:
    """Samples of the teacher in place of real ones, drawn when training begins and kept in the run folder.

    Args:
        count: how many, of all conditions in turn.
        members: conditions of which samples are given; None for all.
    """

    def __init__(self, count: int, members: torch.Tensor | None = None):
        self.count, self.members, self.pairs = count, members, None

    def __len__(self) -> int:
        return self.count

    def only(self, members: torch.Tensor) -> "DrawnSamples":
        """Those of some conditions (M,)."""
        return DrawnSamples(self.count, members)

    def begin(self, method, folder: Path) -> None:
        """Draw them with the guided teacher of a `base.Distillation`, or find them in the run folder.

        Raises:
            UsageError: too few for one of the wanted conditions.
        """
        from .pairs import PairCache

        conditions = method.task.conditions
        self._own = torch.arange(self.count)
        if self.members is not None:
            self._own = self._own[torch.isin(self._own % conditions.count, self.members)]
        if not len(self._own):
            raise UsageError(
                f"The teacher draws {self.count} samples, and none of what this student draws; let it draw at least "
                f"{conditions.count}, with --data teacher:{conditions.count}."
            )
        self.pairs = PairCache(folder / "drawn", method.task, method.real, self.count, DRAWN_STEPS, method.seed)

    def batch(self, draw) -> tuple[torch.Tensor, Condition | None]:
        """As `EncodedSamples.batch`."""
        chosen = self._own[draw.integers("pairs", len(self._own)).cpu()]
        index = (chosen % self.pairs.conditions.count).to(draw.device)
        return self.pairs.x0[chosen].to(draw.device), self.pairs.conditions.at(index)


def drawn_count(source: str) -> int | None:
    """N of the source "teacher:N"; None for another source.

    Raises:
        UsageError: not a number of at least 2.
    """
    name, _, count = source.partition(":")
    if name != DRAWN:
        return None
    if not count.isdecimal() or int(count) < 2:
        raise UsageError(f"Say how many samples the teacher draws: --data teacher:1000; got {source!r}.")
    return int(count)


def captioned_images(source: str, size: tuple[int, int]) -> tuple[torch.Tensor, list[str]]:
    """Images (N, 3, H, W) uint8 with captions.

    Args:
        source: "emoji", or a folder of images with metadata.jsonl or a text file beside each.
        size: (height, width) to which they are brought.

    Raises:
        DataError: no such folder, no images, or images without captions.
        MissingWeightsError: emoji that are not on this machine.
    """
    if source == "emoji":
        from ..models.emoji import load_emoji

        pictures = load_emoji()
        return pictures.on_white(), [captions[0] for captions in pictures.captions]
    root = Path(source)
    if not root.is_dir():
        raise DataError(
            f"No data set or image folder {source!r}; give emoji, teacher:1000 or a folder of images with captions."
        )
    paths = find_images(root)
    names = [path.relative_to(root).as_posix() for path in paths]

    def read(name: str) -> bytes | None:
        file = root / name
        return file.read_bytes() if file.is_file() else None

    captions = find_captions(names, read)
    batches = ImageReader(PathFiles(paths), 3, resize=size).batches(64)
    return torch.cat([batch.images for batch in batches]), captions


def encoded(opened, images: torch.Tensor, captions: list[str]) -> EncodedSamples:
    """Captioned images (N, C, H, W) uint8 as samples of a `models.opened.TextTeacher`."""
    texts = list(dict.fromkeys(captions))
    number = {text: index for index, text in enumerate(texts)}
    place = torch.tensor([number[text] for text in captions])
    return EncodedSamples(*opened.encode_images(images), PromptConditions(texts, opened.encode(texts)), place)


def encoded_classes(opened, images: RealImages, conditions: Conditions) -> EncodedSamples:
    """Labelled images as samples of a `models.opened.LatentTeacher` that draws classes."""
    place = torch.zeros(len(images), dtype=torch.long) if images.labels is None else images.labels
    return EncodedSamples(*opened.encode_images(images.images), conditions, place)
