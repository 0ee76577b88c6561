"""From sides to a report: choice of features, cautions, stability."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import save_png
from diffaccel.evaluate.run import evaluate_fid, evaluate_images, write_statistics
from diffaccel.models.data import load_digits


def _folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(image, path / f"{index:04d}.png")
    return path


def test_heldout_against_train_digits():
    report = evaluate_fid("digits:heldout", "digits")
    assert report.metric == "FD-digits64" and [f["name"] for f in report.features] == ["digits64"]
    assert (report.n_fake, report.n_real) == (len(load_digits("heldout")[0]), len(load_digits("train")[0]))
    assert report.ci95[0] < 0 < report.ci95[1]  # two halves of one set: the true distance is 0
    assert report.bias_corrected < report.value < 1.5
    assert report.warnings == []


def test_report_is_json_stable_and_readable(tmp_path):
    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:70])
    first, second = (evaluate_fid(folder, "digits") for _ in range(2))
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()
    one, two = (replace(report, run={}).to_json() for report in (first, second))
    assert one == two
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


def test_one_pass_gives_what_separate_passes_give():
    metrics = ("fid", "kid", "prdc", "is")
    together = evaluate_images("digits:heldout", "digits", metrics)
    apart = [result for name in metrics for result in evaluate_images("digits:heldout", "digits", (name,)).results]
    assert together.results == apart
    assert [result.kind for result in apart] == [
        *("FD", "KID", "precision", "recall", "density", "coverage", "IS", "IS of real images")
    ]
    assert together["KID"].ci95[0] < 0 < together["KID"].ci95[1]
    assert all(together[kind].value > 0.9 for kind in ("precision", "recall"))
    assert 8 < together["IS"].value < 10


def test_every_image_is_read_once_for_all_metrics(monkeypatch):
    from diffaccel.evaluate.features.digits import DigitsFeatures

    seen, extract = [], DigitsFeatures.extract
    monkeypatch.setattr(
        DigitsFeatures, "extract", lambda self, images: seen.append(len(images)) or extract(self, images)
    )
    evaluate_images("digits:heldout", "digits", ("fid", "kid", "prdc", "is"), fd_infinity=True)
    assert sum(seen) == len(load_digits("all")[0])


def test_batches_workers_and_archives_do_not_matter(tmp_path, monkeypatch):
    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:150])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    metrics = ("fid", "kid", "prdc", "is")
    expected = evaluate_images(folder, "digits", metrics)
    for side, block, workers in ((folder, 1, 0), (folder, 17, 1), (folder, 256, 2), (tmp_path / "a.zip", 64, 3)):
        monkeypatch.setattr("diffaccel.evaluate.collect._BLOCK", block)
        found = evaluate_images(side, "digits", metrics, workers=workers)
        assert found.fake["digest"] == expected.fake["digest"]
        for one, other in zip(found.results, expected.results, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-5), (one.metric, block, workers)


def test_kept_vectors_serve_every_metric(tmp_path):
    metrics = ("fid", "kid", "prdc")
    expected = evaluate_images("digits:heldout", "digits", metrics)
    for name in ("ref.npz", "ref.safetensors"):
        write_statistics("digits", tmp_path / name, vectors=True)
        found = evaluate_images("digits:heldout", tmp_path / name, metrics)
        for one, other in zip(found.results, expected.results, strict=True):
            assert one.value == pytest.approx(other.value, rel=1e-6)
            assert one.ci95 == pytest.approx(other.ci95, rel=1e-4, abs=1e-6)
    write_statistics("digits", tmp_path / "plain.safetensors")
    with pytest.raises(DataError, match="--vectors"):
        evaluate_images("digits:heldout", tmp_path / "plain.safetensors", ("kid",))
    with pytest.raises(DataError, match="needs images"):
        evaluate_images(tmp_path / "plain.safetensors", None, ("is",))
    score = evaluate_images("digits:heldout", tmp_path / "plain.safetensors", ("is",))
    assert [result.kind for result in score.results] == ["IS"]


def test_resizing_makes_unequal_sizes_comparable(tmp_path):
    images = load_digits("heldout")[0][:60]
    large = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    folder = _folder(tmp_path / "a", [*large[:30], *images[30:]])
    with pytest.raises(DataError, match="--resize"):
        evaluate_fid(folder, "digits")
    report = evaluate_fid(folder, "digits", "digits64", resize=8)
    assert report.fake["resized"] == 8 and report.value < 2 * evaluate_fid(images, "digits").value


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"metrics": ("fid", "kit")}, "Unknown metric 'kit'. Did you mean 'kid'"),
        ({"metrics": ()}, "at least one metric"),
        ({"real": None}, "give a second side"),
        ({"stepps": 3}, "Unknown setting 'stepps'. Did you mean 'steps'"),
        ({"num": 1, "fake": "model:digits"}, "num must be at least 2"),
        ({"dtype": "float16"}, "Unknown dtype"),
        ({"features": "digits"}, "Unknown feature extractor"),
        ({"weights": "x.pth"}, "--weights belongs to other features than digits64"),
        ({"preset": "pytorchfid"}, "pytorch-fid"),
        ({"preset": "edm", "features": "digits64"}, "is for inception features"),
        ({"metrics": ("kid",), "k": 0}, "k must be at least 1"),
    ],
)
def test_wrong_calls_end_in_one_sentence(wrong, sentence):
    with pytest.raises(UsageError, match=sentence) as error:
        evaluate_images(**({"fake": "digits:heldout", "real": "digits"} | wrong))
    assert "\n" not in str(error.value)


def test_too_few_images_for_a_metric_are_explained():
    few = load_digits("heldout")[0][:5]
    with pytest.raises(DataError, match="neighbours"):
        evaluate_images(few, "digits", ("prdc",))
    subsets = evaluate_images(few, "digits", ("kid",), kid_subsets=10, kid_subset_size=50)
    assert any("KID subsets have 5 images, not 50" in warning for warning in subsets.warnings)


def test_bfloat16_is_close_and_another_identity(tmp_path):
    exact = evaluate_fid("digits:heldout", "digits")
    rough = evaluate_fid("digits:heldout", "digits", dtype="bfloat16")
    assert rough.features[0]["dtype"] == "bfloat16" and rough.value == pytest.approx(exact.value, rel=0.05)
    write_statistics("digits", tmp_path / "ref.npz")
    mixed = evaluate_fid("digits:heldout", tmp_path / "ref.npz", dtype="bfloat16")
    assert any("computed in float32" in warning for warning in mixed.warnings)


def test_extrapolation_joins_the_report():
    report = evaluate_fid("model:digits", "digits", num=800, steps=8, fd_infinity=True)
    assert report["FD∞"].value < report["FD"].value
