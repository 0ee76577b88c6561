"""A handful of pictures in place of the npm package, whose archive tests do not fetch."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffaccel.models.emoji import EmojiPictures

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("square", "bar", "frame")


def synthetic_pictures() -> EmojiPictures:
    """Twelve shapes in colours, captioned; every third concept has a second, darker picture."""
    pixels, captions, concept = [], [], []
    for number, (shape, (name, colour)) in enumerate((s, c) for s in SHAPES for c in COLOURS.items()):
        for tone in ("", ", dark skin tone") if number % 3 == 0 else ("",):
            picture = np.zeros((64, 64, 4), np.uint8)
            rows = {"square": slice(16, 48), "bar": slice(26, 38), "frame": slice(8, 56)}[shape]
            picture[rows, 8:56] = (*(value // (2 if tone else 1) for value in colour), 255)
            if shape == "frame":
                picture[20:44, 20:44] = 0
            pixels.append(torch.from_numpy(picture).permute(2, 0, 1))
            captions.append([f"{name} {shape}{tone}", f"{shape} in {name}{tone}"])
            concept.append(number)
    weight = torch.ones(number + 1, dtype=torch.float64)
    weight[0] = 0.25
    return EmojiPictures(torch.stack(pixels), captions, torch.tensor(concept), weight)


def write_archive(path: Path, entries: list[dict], images: dict[str, tuple[int, int, int, int]]) -> None:
    """An archive in the layout of the package: its table, and pictures of one colour (RGBA) by file name."""
    with tarfile.open(path, "w:gz") as tar:
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for name, colour in images.items():
            buffer = io.BytesIO()
            Image.new("RGBA", (64, 64), colour).save(buffer, "PNG")
            files[f"package/img/google/64/{name}"] = buffer.getvalue()
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
