"""`diffaccel sample`: files, sheets, and what the images depend on."""

import json

import pytest
import torch

from diffaccel.core.imagefiles import read_images


def images(folder) -> torch.Tensor:
    """(N, C, H, W) uint8 in order of the file names."""
    return read_images(sorted(folder.glob("*.png")))


@pytest.fixture
def sample(run, tmp_path):
    """`sample("--seed", 1)`: eight images of the teacher in two steps, or what the arguments say."""

    def sample(*arguments, model="digits") -> torch.Tensor:
        folder = tmp_path / f"samples-{len(list(tmp_path.iterdir()))}"
        run("sample", model, "--steps", 2, "--num", 8, "-o", folder, *arguments)
        return images(folder)

    return sample


def test_one_png_per_image(run, tmp_path):
    done = run("sample", "digits", "--steps", 2, "--num", 12, "--output", tmp_path / "out")
    names = [f"{i:06d}.png" for i in range(12)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "dataset.json"]
    labels = json.loads((tmp_path / "out/dataset.json").read_text())["labels"]
    assert labels == [[name, i % 10] for i, name in enumerate(names)]
    assert images(tmp_path / "out").shape == (12, 1, 8, 8)
    assert done.out.startswith("12 images in ") and done.err == ""


def test_budget_and_options_of_the_sampler(run, tmp_path):
    sheets = []
    for name, more in (("a", ("--nfe", 4)), ("b", ("--steps", 4)), ("c", ("--steps", 4, "--set", "solver_order=1"))):
        path = tmp_path / f"{name}.png"
        run("sample", "digits", "--sampler", "deis", "--num", 4, "--grid", path, *more)
        sheets.append(path.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--steps", 4, "--nfe", 4), "either --steps or --nfe"),
        (("--set", "eta=1"), "--sampler"),
        (("--sampler", "ddim", "--set", "eta"), "NAME=VALUE"),
        (("--sampler", "ddim", "--set", "eta=2"), "eta must lie in"),
        (("--sampler", "ghvb", "--set", "order=3"), "ghvb_order"),
        (("--sampler", "rho-rk4", "--nfe", 1, "--guidance-scale", 3), "at least 2"),
    ],
)
def test_bad_samplers(cli, tmp_path, more, words):
    done = cli("sample", "digits", "--num", 2, "--grid", tmp_path / "x.png", *more)
    assert done.code == 2 and words in done.err and not (tmp_path / "x.png").exists()


def test_grid_makes_its_folder(run, tmp_path):
    run("sample", "digits", "--steps", 2, "--num", 20, "--grid", tmp_path / "new" / "sheet.png")
    sheet = read_images([tmp_path / "new" / "sheet.png"])
    assert sheet.shape[-1] >= 80 and sheet.shape[-2] >= 16


def test_both_and_json(run, tmp_path):
    done = run(
        "sample", "digits", "--steps", 1, "-n", 3, "-o", tmp_path / "out", "--grid", tmp_path / "g.png", "--json"
    )
    result = json.loads(done.out)
    assert result["images"] == 3 and result["grid"] == str(tmp_path / "g.png") and done.err == ""


def test_the_same_seed_gives_the_same_images(sample):
    first = sample("--seed", 1)
    assert torch.equal(first, sample("--seed", 1))
    assert not torch.equal(first, sample("--seed", 2))


def test_an_image_depends_on_seed_and_index_only(sample):
    """Rounding to 8 bits may flip where sums over another batch size differ in the last digit."""
    whole = sample("--seed", 1).int()
    assert (whole - sample("--seed", 1, "--batch-size", 3).int()).abs().max() <= 1
    assert (whole[:5] - sample("--seed", 1, "--num", 5).int()).abs().max() <= 1


def test_sampler_steps_and_guidance_change_images(sample):
    base = sample("--sampler", "ddim")
    assert not torch.equal(base, sample("--sampler", "deis", "--steps", 4))
    assert not torch.equal(base, sample("--sampler", "ddim", "--guidance-scale", 3))


def test_classes_are_drawn_in_turn(sample):
    from diffaccel.models.classifier import load_digits_classifier

    drawn = sample("--classes", "3,7", "--steps", 20, "--num", 40)
    predicted = load_digits_classifier()(drawn.float() / 127.5 - 1.0).argmax(1)
    assert (predicted == torch.tensor([3, 7] * 20)).float().mean() >= 0.9


def test_a_student_samples_in_one_step_by_itself(run, tiny_run, tmp_path):
    for name, arguments in (("own", ()), ("one", ("--steps", 1))):
        run("sample", tiny_run / "final", "--num", 8, "-o", tmp_path / name, *arguments)
    assert torch.equal(images(tmp_path / "own"), images(tmp_path / "one"))
