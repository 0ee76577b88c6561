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


class DrawnSamples:
    """Samples of the teacher in place of real ones, drawn when training begins and kept in the run folder.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self.count, self.pairs = count, None

    def __len__(self) -> int:
        return self.count

    def begin(self, method, folder: Path) -> None:
        """Draw them with the guided teacher of a `base.Distillation`, or find them in the run folder."""
        from .pairs import PairCache

        self.pairs = PairCache(folder / "drawn", method.task, method.real, self.count, DRAWN_STEPS, method.seed)

    def batch(self, draw) -> tuple[torch.Tensor, Condition | None]:
        """As `EncodedSamples.batch`."""
        _, x0, condition = self.pairs.batch(draw)
        return x0, condition


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
