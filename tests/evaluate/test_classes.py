"""Per-class report: real digits pass, wrong labels, collapsed classes and copies show."""

import json

import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.evaluate.classes import class_report
from diffaccel.models.data import load_digits


@pytest.fixture(scope="module")
def heldout():
    return class_report(*load_digits("heldout"), load_digits("train"))


def test_real_digits_are_accurate_and_varied(heldout):
    assert heldout["accuracy"] > 0.93
    assert [row["label"] for row in heldout["classes"]] == list(range(10))
    for row in heldout["classes"]:
        assert row["diversity"] == pytest.approx(row["diversity_real"], rel=0.25)
        assert 0 < row["nearest_real"] < row["diversity"] and row["fd"] > 0
    assert "as few as" in heldout["note"]
    json.dumps(heldout)


def test_wrong_labels_show(heldout):
    images, labels = load_digits("heldout")
    shifted = class_report(images, (labels + 1) % 10, load_digits("train"))
    assert shifted["accuracy"] < 0.1
    for wrong, right in zip(shifted["classes"], heldout["classes"], strict=True):
        assert wrong["fd"] > 3 * right["fd"]


def test_copies_and_collapse_show():
    images, labels = load_digits("train")
    copied = class_report(images[:50], labels[:50], (images, labels))
    assert sum(row["copies"] for row in copied["classes"]) == 50
    collapsed = class_report(images[:1].repeat(30, 1, 1, 1), labels[:1].repeat(30), (images, labels))
    (row,) = collapsed["classes"]
    assert row["diversity"] == 0 and row["n"] == 30 and row["nearest_real"] == 0


def test_small_classes_have_no_distance():
    images, labels = load_digits("heldout")
    (row,) = class_report(images[:1], labels[:1], load_digits("train"))["classes"]
    assert row["fd"] is None and row["diversity"] is None and row["n"] == 1


def test_labels_must_fit():
    images, _ = load_digits("heldout")
    with pytest.raises(DataError, match="every image needs one"):
        class_report(images, torch.zeros(3, dtype=torch.int64), load_digits("train"))
