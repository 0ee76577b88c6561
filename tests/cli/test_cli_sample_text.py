"""`diffaccel sample` with text-to-image models: what is drawn, what is written beside it, and what is refused."""

import json

import pytest
import torch
from pipelines import PIPELINES

from diffaccel.core.imagefiles import read_images


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Stable Diffusion that brings no prompts."""
    folder = tmp_path_factory.mktemp("sd") / "model"
    PIPELINES["sd"].build("deis").save_pretrained(folder)
    return folder


def records(folder) -> tuple[list, dict]:
    """Lines of metadata.jsonl, and dataset.json."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "dataset.json").read_text())


def test_an_image_for_each_prompt_with_its_caption(run, model, tmp_path):
    (tmp_path / "more.txt").write_text("grüner Tee\nleaf\n", encoding="utf-8")
    prompts = ("--prompt", "red apple", "--prompts", tmp_path / "more.txt", "--negative-prompt", "bitten")
    run("sample", model, *prompts, "--steps", 2, "--guidance-scale", 3, "-o", tmp_path / "out")
    captions, facts = records(tmp_path / "out")
    texts = ["red apple", "grüner Tee", "leaf"]
    assert captions == [{"file_name": f"{i:06d}.png", "text": text} for i, text in enumerate(texts)]
    assert facts["labels"] is None
    wanted = {"steps": 2, "nfe": 4, "guidance_scale": 3.0, "negative_prompt": "bitten", "seed": 0}
    assert wanted.items() <= facts["settings"].items()
    assert read_images(sorted((tmp_path / "out").glob("*.png"))).shape == (3, 3, 8, 8)


def test_the_captions_are_read_back(run, model, tmp_path):
    from diffaccel.evaluate.sources import resolve

    run("sample", model, "--prompt", "red apple", "--prompt", "leaf", "-n", 3, "--steps", 1, "-o", tmp_path / "out")
    source = resolve(tmp_path / "out")
    assert source.captions(None) == ["red apple", "leaf", "red apple"] and source.labels is None


def test_a_folder_draws_its_own_prompts(run, model, tmp_path):
    import shutil

    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "prompts.txt").write_text("umbrella\nleaf\n")
    run("sample", folder, "--num", 3, "--steps", 1, "-o", tmp_path / "own")
    assert [line["text"] for line in records(tmp_path / "own")[0]] == ["umbrella", "leaf", "umbrella"]
    run("sample", model, "--prompts", folder, "--steps", 1, "-o", tmp_path / "lent")
    lent = read_images(sorted((tmp_path / "lent").glob("*.png")))
    assert len(lent) == 2
    own = read_images(sorted((tmp_path / "own").glob("*.png")))
    assert (lent.int() - own[:2].int()).abs().max() <= 1  # of another batch size


def test_a_sheet_depends_on_the_seed(run, model, tmp_path):
    sheets = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        run("sample", model, "--prompt", "leaf", "-n", 4, "--nfe", 4, "--seed", seed, "--grid", path)
        sheets.append(read_images([path]))
    assert torch.equal(sheets[0], sheets[1]) and not torch.equal(sheets[0], sheets[2])


@pytest.mark.parametrize(
    ("code", "words", "more"),
    [
        (2, "--prompts FILE", ()),
        (2, ".txt, a prompt a line", ("--prompts", "prompts.json")),
        (3, "Cannot read the prompts", ("--prompts", "nowhere.txt")),
        (3, "holds no prompt", ("--prompts", "empty.txt")),
        (3, "not text", ("--prompts", "binary.txt")),
        (3, "not a diffusers pipeline folder", ("--prompts", ".")),
        (3, "brings no prompts", ("--prompts", "digits")),
        (2, "has no classes", ("--prompt", "leaf", "--classes", "3")),
        (2, "no effect without guidance", ("--prompt", "leaf", "--negative-prompt", "x", "--guidance-scale", 1)),
        (2, "are prompts", ("--prompt", "leaf", "--guidance", "perp-neg", "--set", "perp-neg.negatives=3")),
        (2, "at least 2", ("--prompt", "leaf", "--nfe", 1)),
    ],
)
def test_bad_input(refuse, model, tmp_path, code, words, more):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    refuse(code, words, "sample", model, "-o", "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [("--prompt", "leaf"), ("--negative-prompt", "leaf")])
def test_class_models_take_no_prompts(refuse, more):
    refuse(2, "reads no text", "sample", "digits", "--grid", "x.png", "--num", 1, *more)
