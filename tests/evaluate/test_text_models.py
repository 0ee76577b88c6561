"""Text-to-image models as sides of an evaluation and in a sweep over guidance."""

import json

import pytest
import torch
from pipelines import PIPELINES

from diffaccel.core.errors import DataError, UsageError
from diffaccel.evaluate import guidance_sweep
from diffaccel.evaluate.guidance_page import header, lines, notes, page, picture
from diffaccel.evaluate.guidance_sweep import sweep_guidance
from diffaccel.evaluate.modelsource import Generation
from diffaccel.evaluate.run import evaluate_images, write_statistics
from diffaccel.evaluate.sources import resolve
from diffaccel.generation import generate

PROMPTS = ["red apple", "grinning face", "umbrella"]
DRAWN = {"num": 12, "steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Stable Diffusion with prompts of its own."""
    folder = tmp_path_factory.mktemp("sd") / "model"
    PIPELINES["sd"].build("deis").save_pretrained(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def real():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_a_model_is_a_side_with_captions(model):
    source = resolve(model, Generation(**DRAWN, guidance_scale=3.0, batch_size=5))
    assert source.shape == (3, 8, 8) and source.labels is None and source.captions(None) == PROMPTS * 4
    images = torch.cat([batch.images for batch in source.batches(3, 5)])
    drawn = generate(model, 12, steps=2, guidance_scale=3.0, batch_size=5, device="cpu")
    assert torch.equal(images, torch.cat([batch for batch, _ in drawn]))


def test_the_scale_and_the_prompts_reach_images_and_report(model, real, tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("leaf\ntree")
    base, own, other = (
        evaluate_images(str(model), real, features="random-conv", **DRAWN, **settings)
        for settings in ({}, {"guidance_scale": 7.5}, {"guidance_scale": 3, "prompts": file})
    )
    assert base.fake["guidance_scale"] == 7.5 and base.fake["digest"] == own.fake["digest"]
    assert (other.fake["guidance_scale"], other.fake["prompts"]) == (3, str(file))
    assert other.fake["digest"] != base.fake["digest"] and other.settings["guidance_scale"] == 3
    assert json.loads(other.to_json())["fake"]["prompts"] == str(file)


def test_class_models_take_a_scale_too():
    plain, guided = (
        evaluate_images("model:digits", "digits", num=100, steps=2, guidance_scale=scale) for scale in (None, 4.0)
    )
    assert plain.fake["guidance_scale"] == 1.0 and guided.fake["guidance_scale"] == 4.0
    assert plain["FD"].value != guided["FD"].value


def test_what_cannot_be_drawn(model, real, tmp_path):
    PIPELINES["sd"].build().save_pretrained(tmp_path / "mute")
    with pytest.raises(UsageError, match="--prompts FILE"):
        evaluate_images(str(tmp_path / "mute"), real, **DRAWN)
    with pytest.raises(UsageError, match="reads no text"):
        evaluate_images("model:digits", "digits", prompts=str(model), num=2)
    with pytest.raises(DataError, match="Cannot read the prompts"):
        evaluate_images(str(model), real, prompts="nowhere.txt")
    with pytest.raises(UsageError, match="guidance_scale must be of type"):
        evaluate_images(str(model), real, guidance_scale="3")


def test_settings_of_models_have_no_effect_on_images(real):
    told = " ".join(evaluate_images(real, real, features="random-conv", guidance_scale=3.0, prompts="digits").warnings)
    assert "guidance-scale has no effect" in told and "prompts has no effect" in told


def test_options_of_the_command_line(run, cli, model, real, tmp_path):
    from diffaccel.core.images import save_png

    (tmp_path / "real").mkdir()
    for index, image in enumerate(real):
        save_png(image, tmp_path / "real" / f"{index}.png")
    sides = ("evaluate", "fid", model, tmp_path / "real", "--features", "random-conv", "--num", 12, "--steps", 1)
    done = run(*sides, "--guidance-scale", 2, "--prompts", model, "--json")
    assert json.loads(done.out)["fake"]["guidance_scale"] == 2.0
    refused = cli(*sides, "--prompts", tmp_path / "nowhere.txt")
    assert refused.code == 3 and "Cannot read the prompts" in refused.err


# Sweeps.

SWEPT = {"num": 12, "steps": 2, "features": "random-conv"}


@pytest.fixture(scope="module")
def references(real, tmp_path_factory):
    """Statistics of the real images by whether they hold vectors, and the folder of these images."""
    from diffaccel.core.images import save_png

    folder = tmp_path_factory.mktemp("references")
    (folder / "images").mkdir()
    for index, image in enumerate(real):
        save_png(image, folder / "images" / f"{index:02d}.png")
    for vectors in (False, True):
        write_statistics(real, folder / f"{vectors}.safetensors", "random-conv", vectors=vectors)
    return folder


def test_a_sweep_over_prompts(model, references):
    sweep = sweep_guidance(str(model), ("cfg", "apg"), (1.0, 5.0), reference=str(references / "images"), **SWEPT)
    unguided, cfg1, cfg5, *_ = sweep.rows
    assert (unguided.nfe, cfg1.nfe, cfg5.nfe) == (2, 2, 4) and sweep.conditioning == "prompts"
    assert torch.equal(unguided.samples, cfg1.samples) and unguided.mean("fd") == cfg1.mean("fd")
    assert unguided.mean("overshoot") is None and unguided.mean("accuracy") is None
    drawn = next(generate(model, 12, steps=2, guidance="cfg", guidance_scale=5.0, device="cpu"))[0]
    assert torch.equal(cfg5.samples, drawn)
    text = " ".join(notes(sweep))
    assert "same noise and prompts" in text and "Overshoot" not in text and "overshoot" not in header(sweep)
    assert len(sweep.real_samples) and len(lines(sweep)) == len(sweep.rows) + 1


@pytest.mark.parametrize("vectors", [False, True])
def test_statistics_as_reference(model, references, vectors):
    file = str(references / f"{vectors}.safetensors")
    sweep = sweep_guidance(str(model), ("cfg",), (5.0,), reference=file, prompts=["leaf"], **SWEPT)
    row = sweep.rows[1]
    assert (row.mean("recall") is not None) == vectors == ("recall" in header(sweep))
    assert row.mean("contrast") is not None and not sweep.real and not len(sweep.real_samples)
    cells = lines(sweep)
    assert len(cells) == len(sweep.rows) and all(len(line) == len(header(sweep)) for line in cells)
    image = picture(sweep)
    assert image.dtype == torch.uint8 and "data:image/png;base64," in page(sweep, image)
    written = json.loads(json.dumps(sweep.to_dict()))
    assert written["settings"]["prompts"] == ["leaf"] and written["rows"][1]["mean"]["overshoot"] is None
    images = references / "images"
    same = sweep_guidance(str(model), ("cfg",), (5.0,), reference=str(images), prompts=["leaf"], **SWEPT).rows[1]
    assert row.mean("fd") == pytest.approx(same.mean("fd"), rel=1e-4)
    assert row.mean("recall") in (None, same.mean("recall"))


def test_accuracy_is_that_of_the_data_set(monkeypatch):
    asked = []

    def accuracy(images, labels):
        asked.append((images.shape, labels[:3].tolist()))
        return 0.5

    monkeypatch.setitem(guidance_sweep.ACCURACY, ("digits", "classes"), accuracy)
    sweep = sweep_guidance("digits", ("cfg",), (2.0,), num=20, steps=1, reference="digits:heldout")
    assert sweep.rows[1].mean("accuracy") == 0.5 and asked[0] == ((20, 1, 8, 8), [0, 1, 2])


def test_sweeps_that_are_refused(model, tmp_path):
    PIPELINES["sd"].build().save_pretrained(tmp_path / "mute")
    with pytest.raises(UsageError, match="needs prompts"):
        sweep_guidance(str(tmp_path / "mute"))
    with pytest.raises(UsageError, match="give a reference"):
        sweep_guidance(str(model))
    with pytest.raises(UsageError, match="reads no text"):
        sweep_guidance("digits", prompts=["leaf"])
