"""The data, classifier and teacher that travel with the package."""

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import to_unit_range
from diffaccel.core.rng import KeyedRandom
from diffaccel.models import shipped
from diffaccel.models.classifier import load_digits_classifier
from diffaccel.models.data import load_digits, load_images
from diffaccel.models.teachers import load_denoiser


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits as reference

    images, labels = load_digits("all")
    assert np.array_equal(np.rint(images[:, 0].double().numpy() * 16 / 255), reference().images)
    assert np.array_equal(labels.numpy(), reference().target)


def test_the_split_is_stratified_disjoint_and_recomputable():
    _, train = load_digits("train")
    _, held_out = load_digits("heldout")
    _, everything = load_digits("all")
    assert len(train) + len(held_out) == len(everything) == 1797
    with np.load(shipped.ASSETS / "digits" / "data.npz") as archive:
        mask = archive["held_out"]
    for digit in range(10):
        members = np.flatnonzero(everything.numpy() == digit)
        order = KeyedRandom(0).permutation("digits-split", digit, len(members)).numpy()
        assert set(members[order[: len(members) // 5]]) == set(members[mask[members]])


def test_an_unknown_split_names_the_valid_ones():
    with pytest.raises(UsageError, match="heldout"):
        load_digits("test")


def test_the_classifier_knows_held_out_digits_and_its_features_have_unit_scale():
    classifier = load_digits_classifier()
    images, labels = load_digits("heldout")
    accuracy = (classifier(to_unit_range(images)).argmax(1) == labels).float().mean()
    assert accuracy >= 0.97
    features = classifier.features(to_unit_range(load_digits("train")[0])).double()
    assert abs(float(torch.cov(features.T).trace()) - 100.0) < 1e-2
    assert (shipped.ASSETS / "digits" / "classifier.safetensors").stat().st_size < 150_000


def test_a_damaged_shipped_file_is_refused(tmp_path, monkeypatch):
    import shutil

    shutil.copytree(shipped.ASSETS / "digits", tmp_path / "digits")
    weights = tmp_path / "digits/teacher/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    shipped.check_shipped("digits", "data.npz")
    with pytest.raises(DataError, match="damaged"):
        shipped.check_shipped("digits", "teacher/")


def test_the_teacher_denoises_real_digits():
    teacher = load_denoiser("digits").eval()
    images, labels = load_digits("heldout")
    x0 = to_unit_range(images[:64])
    t = torch.full((64,), 60.0)
    x_t = teacher.noised(x0, t, KeyedRandom(0).normal("eps", 0, 0, 64, (1, 8, 8)))
    with torch.no_grad():
        estimate = teacher(x_t, t, {"class_labels": labels[:64]})
    alpha, _ = teacher.level(t)
    assert (estimate - x0).square().mean() < 0.5 * (x_t / alpha - x0).square().mean()


def test_class_folders_become_labels(tmp_path):
    from diffaccel.core.images import save_png

    images, labels = load_digits("heldout")
    for index in range(20):
        folder = tmp_path / f"class-{labels[index]}"
        folder.mkdir(exist_ok=True)
        save_png(images[index], folder / f"{index}.png")
    loaded = load_images(str(tmp_path), 1, (8, 8), len(set(labels[:20].tolist())))
    assert len(loaded) == 20
    present = sorted(set(labels[:20].tolist()))
    assert sorted(present[k] for k in loaded.labels.tolist()) == sorted(labels[:20].tolist())
    with pytest.raises(DataError, match="16"):
        load_images(str(tmp_path), 1, (16, 16), len(set(labels[:20].tolist())))
    with pytest.raises(DataError, match="No data set"):
        load_images(str(tmp_path / "missing"), 1, (8, 8), len(set(labels[:20].tolist())))
