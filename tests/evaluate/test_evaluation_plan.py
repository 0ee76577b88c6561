"""Every metric with every kind of side: a result, or one sentence before any image is read."""

import json

import numpy as np
import pytest
import torch
from encoders import save_clip

from diffaccel.core.errors import DataError, DiffaccelError, UsageError
from diffaccel.core.images import save_png
from diffaccel.core.processes import rank_and_world
from diffaccel.evaluate.features import get_features
from diffaccel.evaluate.measure import METRICS
from diffaccel.evaluate.run import evaluate_fid, evaluate_images, write_statistics


def _pictures(count, seed, size=16):
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Sides by kind; the pictures have captions, the statistics are of random-conv or CLIP features."""
    root = tmp_path_factory.mktemp("sides")
    clip = root / "clip"
    save_clip(clip)
    for name, seed in (("pictures", 0), ("others", 1)):
        (root / name).mkdir()
        lines = []
        for index, image in enumerate(_pictures(30, seed)):
            save_png(image, root / name / f"{index:02d}.png")
            lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": "a red apple"}))
        (root / name / "metadata.jsonl").write_text("\n".join(lines))
    made = {"moments": {}, "vectors": {"vectors": True}, "clip": {"features": "clip", "weights": str(clip)}}
    for name, options in made.items():
        write_statistics(root / "others", root / f"{name}.npz", **({"features": "random-conv"} | options))
    return {"weights": str(clip), "folder": root / "pictures", "others": root / "others", "dataset": "digits"} | {
        name: root / f"{name}.npz" for name in made
    }


@pytest.mark.parametrize(
    "names",
    [*[(name,) for name in METRICS], ("clip", "fid"), ("fid", "cmmd"), ("is", "clip"), ("appearance", "clip")],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["others", "dataset", "moments", "vectors", "clip", "none"])
def test_every_metric_with_every_kind_of_reference(sides, names, kind, monkeypatch):
    real = None if kind == "none" else sides[kind]
    settings = {"resize": 16} if kind == "dataset" else {}
    chosen = set(names)
    # random-conv has no classes
    refused = "is" in chosen or (kind == "none" and chosen & {"fid", "kid", "prdc", "cmmd"})
    if kind in ("moments", "vectors"):
        refused |= bool(chosen & {"cmmd"}) or (kind == "moments" and bool(chosen & {"kid", "prdc"}))
    if kind == "clip":
        refused |= bool(chosen - {"clip", "appearance"})

    def evaluate():
        return evaluate_images(sides["folder"], real, names, "random-conv", clip_weights=sides["weights"], **settings)

    if refused:
        monkeypatch.setattr("diffaccel.evaluate.run.collect", None)  # nothing is read
        with pytest.raises(DiffaccelError) as error:
            evaluate()
        assert "\n" not in str(error.value)
    else:
        kinds = {result.kind for result in evaluate().results}
        labels = {"fid": "FD", "kid": "KID", "prdc": "recall", "cmmd": "CMMD", "clip": "CLIPScore"}
        labels["appearance"] = "clipped"
        assert {labels[name] for name in chosen} <= kinds
        assert ("CLIPScore of real images" in kinds) == ("clip" in chosen and kind == "others")


def test_features_of_clip_serve_all_metrics(sides):
    together = evaluate_images(
        sides["folder"], sides["others"], ("fid", "cmmd", "clip"), "clip", weights=sides["weights"]
    )
    assert [identity["name"] for identity in together.features] == ["clip"]
    alone = evaluate_images(sides["folder"], None, ("clip",), "clip", weights=sides["weights"])
    assert alone["CLIPScore"].value == together["CLIPScore"].value


def test_each_side_passes_only_the_networks_it_needs(sides, monkeypatch):
    from diffaccel.evaluate.features.clip import ClipFeatures

    seen, extract = [], ClipFeatures.extract
    monkeypatch.setattr(ClipFeatures, "extract", lambda self, images: seen.append(len(images)) or extract(self, images))
    evaluate_images(sides["folder"], "digits", ("fid", "clip"), "random-conv", clip_weights=sides["weights"], resize=16)
    assert sum(seen) == 30


def test_a_metric_does_not_depend_on_the_others(sides):
    both = evaluate_images(
        sides["folder"], "digits", ("fid", "cmmd"), "digits64", clip_weights=sides["weights"], resize=8
    )
    assert both["FD"] == evaluate_fid(sides["folder"], "digits", "digits64", resize=8)["FD"]


def test_statistics_remember_the_size_of_their_images(sides, tmp_path):
    write_statistics(sides["others"], tmp_path / "small.npz", "random-conv", resize=8)
    with pytest.raises(DataError, match="16×16 and the real ones 8×8"):
        evaluate_fid(sides["folder"], tmp_path / "small.npz")
    small = evaluate_fid(sides["folder"], tmp_path / "small.npz", resize=8)
    assert small.value == pytest.approx(evaluate_fid(sides["folder"], sides["others"], resize=8).value, rel=1e-6)
    native = evaluate_fid(sides["folder"], sides["moments"], resize=16)  # were 16×16 already
    assert native.value == pytest.approx(evaluate_fid(sides["folder"], sides["moments"]).value, rel=1e-9)


def test_images_on_both_sides_are_noticed(sides, tmp_path):
    images, more = _pictures(200, 2), _pictures(150, 3)
    same = evaluate_fid(images, images.flip(0))
    assert same.ci95 is None and any("the same images" in warning for warning in same.warnings)
    part = evaluate_fid(torch.cat([images, more]), images)
    assert any(warning.startswith("200 image(s) are on both sides") for warning in part.warnings)
    assert not any("both sides" in warning for warning in evaluate_fid(images, more).warnings)


def test_there_is_no_interval_with_fewer_images_than_features():
    few, enough, real = _pictures(128, 4), _pictures(129, 5), _pictures(300, 6)
    report = evaluate_fid(few, real)
    assert report.ci95 is None and report.bias_corrected is None
    assert any("without a correction or interval" in warning for warning in report.warnings)
    assert evaluate_fid(enough, real).ci95 is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": "nonsense.pth"}, "weights belongs to features that are named"),
        ({"preset": "edm"}, "preset"),
        ({"dtype": "bfloat16"}, "dtype belongs"),
        ({"device": "abacus"}, "device belongs"),
    ],
)
def test_an_extractor_is_used_as_it_is(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        evaluate_fid("digits:heldout", "digits", get_features("digits64"), **options)


def test_devices_that_are_not_there_are_refused():
    for name in ("abacus", "cuda:99"):
        with pytest.raises(UsageError, match=f"'{name}' is not a device that torch can use here"):
            evaluate_fid("digits:heldout", "digits", device=name)


@pytest.mark.parametrize(
    ("side", "sentence"),
    [
        ([1, 2], "A side is a name, a path, a uint8 tensor or array"),
        (None, "A side is"),
        (np.zeros((4, 1, 8, 8)), "must be uint8"),
        ((np.zeros((4, 1, 8, 8), np.uint8), [0, 1, 2]), "as many labels"),
        ((np.zeros((4, 1, 8, 8), np.uint8), "abcd"), "as many labels"),
        ((np.zeros((4, 1, 8, 8), np.uint8), [0, 1, 2, 3], 5), "got 3 things"),
    ],
)
def test_things_that_are_no_side(side, sentence):
    with pytest.raises(DataError, match=sentence):
        evaluate_fid(side, "digits")


def test_arrays_paths_and_single_names_are_understood(sides):
    images, labels = (part.numpy() for part in _digits())
    report = evaluate_images((images, labels.tolist()), "digits", "fid", device=torch.device("cpu"))
    assert report.value == pytest.approx(evaluate_fid("digits:heldout", "digits").value)
    paths = evaluate_images(sides["folder"], None, "clip", clip_weights=sides["folder"].parent / "clip")
    assert json.loads(paths.to_json())["settings"]["clip_weights"] == sides["weights"]


def _digits():
    from diffaccel.models.data import load_digits

    return load_digits("heldout")


def test_settings_without_effect_are_named():
    report = evaluate_images("digits:heldout", "digits", ("fid",), k=3, splits=2, steps=4)
    assert set(report.warnings) == {
        "k has no effect without the metric prdc",
        "splits has no effect without the metric is",
        "steps has no effect: no side is a model",
    }


def test_scores_warn_of_few_images_and_count_their_parts():
    report = evaluate_images(_pictures(11, 7, 8)[:, :1].contiguous(), "digits", ("is",))
    assert report["IS"].method.startswith("deviation of 6 parts")
    assert any("with 11 it is too low" in warning for warning in report.warnings)
    assert any("unequal numbers" in warning for warning in report.warnings)


def test_an_unknown_number_of_images_counts_as_few(tmp_path):
    write_statistics("digits", tmp_path / "own.npz")
    with np.load(tmp_path / "own.npz") as archive:
        np.savez(tmp_path / "foreign.npz", mu=archive["mu"], sigma=archive["sigma"])
    report = evaluate_fid("digits:heldout", tmp_path / "foreign.npz", "digits64")
    assert any("an unknown number of real images count as exact" in warning for warning in report.warnings)
    assert len(report.real["digest"]) == 64


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "3", "RANK": "2"}, (2, 3)),
    ],
)
def test_one_process_is_alone_whatever_its_number(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world() == expected
