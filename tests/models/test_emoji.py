"""The captioned pictures: what is read from the archive, how it is drawn, and what is said when it is not there."""

import base64
import hashlib

import pytest
import torch
from emoji import synthetic_pictures, write_archive

from diffaccel.core.errors import DataError, MissingWeightsError
from diffaccel.core.rng import KeyedRandom
from diffaccel.models import emoji

ENTRIES = [
    {"name": "RED APPLE", "short_name": "apple", "short_names": ["apple"], "category": "Food & Drink", "sort_order": 2,
     "image": "apple.png", "has_img_google": True},
    {"name": "WAVING HAND SIGN", "short_name": "wave", "short_names": ["wave"], "category": "People & Body", "sort_order": 1,
     "image": "wave.png", "has_img_google": True,
     "skin_variations": {"1F3FB": {"image": "wave-1.png"}, "1F3FB-1F3FC": {"image": "two.png"}}},
    {"name": "Fiji Flag", "short_name": "flag-fj", "short_names": ["flag-fj"], "category": "Flags", "sort_order": 9,
     "image": "fiji.png", "has_img_google": True},
    {"name": "OTHERS", "short_name": "x", "short_names": ["x"], "category": "Symbols", "sort_order": 1, "image": "x.png",
     "has_img_google": False},
]  # fmt: skip
IMAGES = {"apple.png": (200, 0, 0, 255), "wave.png": (250, 200, 0, 255), "wave-1.png": (250, 220, 180, 128),
          "two.png": (1, 2, 3, 255), "fiji.png": (0, 0, 0, 0)}  # fmt: skip


@pytest.fixture
def archive(tmp_path, monkeypatch):
    path = tmp_path / "pictures.tgz"
    write_archive(path, ENTRIES, IMAGES)
    monkeypatch.setattr(emoji, "INTEGRITY", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())
    emoji._read.cache_clear()
    yield path
    emoji._read.cache_clear()


def test_names_tones_order_and_weights_come_from_the_table(archive):
    pictures = emoji.load_emoji(archive)
    assert pictures.captions == [
        ["fiji flag"],
        ["red apple", "apple"],
        ["waving hand sign", "wave"],
        ["waving hand sign, light skin tone", "wave, light skin tone"],
    ]
    assert pictures.concept.tolist() == [0, 1, 2, 2]
    assert pictures.weight.tolist() == [emoji.FLAG_WEIGHT, 1.0, 1.0]
    assert pictures.pixels.shape == (4, 4, 64, 64) and len(pictures) == 4


def test_pictures_are_laid_on_white(archive):
    shown = emoji.load_emoji(archive).on_white()
    assert shown[:, :, 0, 0].tolist() == [[255, 255, 255], [200, 0, 0], [250, 200, 0], [252, 237, 217]]


def test_draws_follow_the_weights_and_share_a_concept_among_its_pictures():
    pictures = synthetic_pictures()
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    index = pictures.draw(u, KeyedRandom(0).uniform("variant", 0, 0, len(u)))
    seen = torch.bincount(index, minlength=len(pictures)) / len(index)
    assert torch.allclose(seen.double(), pictures.probabilities(), atol=4e-3)
    assert abs(float(pictures.probabilities().sum()) - 1.0) < 1e-12
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    edge = pictures.draw(ends, ends)
    assert edge.tolist() == [0, len(pictures) - 1]


def test_the_reference_stands_for_the_draws():
    pictures = synthetic_pictures()
    reference = pictures.reference()
    assert torch.equal(reference, pictures.reference()) and len(reference) == 1700
    share = torch.bincount(reference, minlength=len(pictures)) / 1700
    assert (share.double() - pictures.probabilities()).abs().max() < 1 / 1700  # systematic: within one tick


def test_another_file_is_refused(archive):
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(DataError, match="SHA-512"):
        emoji.fetch_archive(archive)


def test_what_is_missing_is_named_with_a_way_out(tmp_path, monkeypatch):
    with pytest.raises(MissingWeightsError, match="no archive"):
        emoji.fetch_archive(tmp_path / "none.tgz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(MissingWeightsError, match="npm pack emoji-datasource-google"):
        emoji.fetch_archive()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no network' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(npm))
    with pytest.raises(MissingWeightsError, match="no network"):
        emoji.fetch_archive()
