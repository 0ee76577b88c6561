"""From sides to a report: choice of features, cautions, stability."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import save_png
from diffaccel.evaluate.fid import evaluate_fid, write_statistics
from diffaccel.models.data import load_digits


def _folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(image, path / f"{index:04d}.png")
    return path


def test_heldout_against_train_digits():
    report = evaluate_fid("digits:heldout", "digits")
    assert report.metric == "FD-digits64" and report.features["name"] == "digits64"
    assert (report.n_fake, report.n_real) == (len(load_digits("heldout")[0]), len(load_digits("train")[0]))
    assert report.ci95[0] < 0 < report.ci95[1]  # two halves of one set: the true distance is 0
    assert report.bias_corrected < report.value < 1.5
    assert report.warnings == []


def test_report_is_json_stable_and_readable(tmp_path):
    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:70])
    first, second = (evaluate_fid(folder, "digits") for _ in range(2))
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()
    assert "FD-digits64" in str(first) and "70 images" in str(first) and "95 % interval" in str(first)


def test_statistics_stand_in_for_their_images(tmp_path):
    moments = write_statistics("digits", tmp_path / "ref.npz")
    assert moments.count == len(load_digits("train")[0])
    from_file = evaluate_fid("digits:heldout", tmp_path / "ref.npz")
    # Units that never fire make the covariances singular, where square roots keep half of the digits.
    assert from_file.value == pytest.approx(evaluate_fid("digits:heldout", "digits").value, rel=1e-6)
    assert from_file.n_real == moments.count and from_file.ci95 is not None
    assert any("count as exact" in warning for warning in from_file.warnings)
    both = evaluate_fid(tmp_path / "ref.npz", tmp_path / "ref.npz")
    assert both.value < 1e-6 and both.ci95 is None


def test_statistics_without_identity_need_a_name(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UsageError, match="--features"):
        evaluate_fid("digits", tmp_path / "ref.npz")
    named = evaluate_fid("digits", tmp_path / "ref.npz", "digits64")
    assert named.n_real is None and any("on trust" in warning for warning in named.warnings)


def test_statistics_of_other_features_are_refused(tmp_path):
    write_statistics("digits", tmp_path / "ref.npz", "random-conv")
    with pytest.raises(DataError, match=r"128-dimensional.*digits64"):
        evaluate_fid("digits", tmp_path / "ref.npz", "digits64")
    assert evaluate_fid("digits:heldout", tmp_path / "ref.npz").metric == "FD-random-conv"
    with pytest.raises(UsageError, match="already"):
        write_statistics(tmp_path / "ref.npz", tmp_path / "again.npz")


def test_other_image_sizes_fall_back_to_random_conv():
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    report = evaluate_fid(images, images.flip(0) // 2)
    assert report.metric == "FD-random-conv"
    assert any("untrained" in warning for warning in report.warnings)
    assert sum("covariance is singular" in warning for warning in report.warnings) == 2


def test_a_folder_against_itself_is_zero_with_a_hint(tmp_path):
    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:80])
    report = evaluate_fid(folder, folder)
    assert report.value < 1e-6 and report.ci95 is None
    assert any("same images" in warning for warning in report.warnings)


def test_cautions_about_jpeg_few_and_skipped(tmp_path):
    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:10])
    Image.new("L", (8, 8)).save(folder / "x.jpg")
    (folder / "y.png").write_bytes(b"")
    report = evaluate_fid(folder, "digits", skip_bad=True)
    text = " ".join(report.warnings)
    assert report.ci95 is None and report.n_fake == 11
    assert "JPEG" in text and "at least 20" in text and "1 fake file(s)" in text and "only 11 fake images" in text


def test_sizes_must_agree():
    with pytest.raises(DataError, match="16×16 and the real ones 8×8"):
        evaluate_fid(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), "digits")


def test_the_digits_teacher_is_closer_than_noise():
    model = evaluate_fid("model:digits", "digits", num=200, steps=8)
    noise = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert model.fake["seed"] == 0 and model.n_fake == 200
    assert model.value < 0.2 * evaluate_fid(noise, "digits").value
