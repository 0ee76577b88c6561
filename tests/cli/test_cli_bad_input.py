"""Every refusal is one sentence on stderr with its documented exit code, and says what to type next."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

USAGE, DATA, WEIGHTS, NUMERICAL = 2, 3, 4, 5
DMD = ("distill", "--teacher", "digits", "--method", "dmd", "--quiet", "--steps", 2, "--batch-size", 8)
SAMPLE = ("sample", "digits", "--num", 2, "--grid", "sheet.png")
STUDENT = "trainer.optimizers.student."
CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("'digits'?", ("distill", "--teacher", "digit")),
        ("'dmd'?", ("distill", "--teacher", "digits", "--method", "dmb")),
        ("'reverse-kl'?", ("distill", "--teacher", "digits", "--divergence", "revers-kl")),
        ("'ddim'?", (*SAMPLE, "--sampler", "dim")),
        ("'digits'?", ("train", "--recipe", "digit")),
        ("'samplers'?", ("list", "sampler")),
        ("'digits64'?", ("evaluate", "fid", "digits", "digits", "--features", "digit64")),
        ("'trainer.steps'?", (*DMD, "--set", "trainer.stepz=3")),
        ("'method.critic_steps'?", (*DMD, "--set", "method.critic_step=3")),
        ("'student'?", (*DMD, "--set", "trainer.optimizers.studnet.lr=1")),
        ("'cpu'?", (*DMD, "--device", "cpuu")),
        ("distill", ("distil", "--teacher", "digits")),
        ("--teacher", ("distill", "--teecher", "digits")),
    ],
)
def test_misspelt_names_get_the_nearest_one(refuse, words, arguments):
    refuse(USAGE, words, *arguments)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--teacher digits", ("distill",)),
        ("trainer.steps", (*DMD, "--steps", 0)),
        ("trainer.steps", (*DMD, "--steps", -3)),
        ("trainer.batch_size", (*DMD, "--batch-size", 0)),
        ("integer", (*DMD, "--steps", "many")),
        ("trainer.seed", (*DMD, "--seed", -1)),
        ("f-distill", (*DMD, "--divergence", "js")),
        ("NAME=VALUE", (*DMD, "--set", "trainer")),
        ("NAME=VALUE", (*DMD, "--set", "=3")),
        ("trainer.ema must be float", (*DMD, "--set", "trainer.ema=high")),
        ("[0, 1)", (*DMD, "--set", "trainer.ema=1")),
        ("multiple", (*DMD, "--set", "trainer.micro_batches=3")),
        ("--data", ("distill", "--teacher", "{teacher}", "--method", "f-distill", "--quiet")),
        ("num", ("sample", "digits", "--num", 0, "--grid", "a.png")),
        ("steps", (*SAMPLE, "--steps", 0)),
        ("batch_size", (*SAMPLE, "--batch-size", 0)),
        ("--output", ("sample", "digits")),
        ("PNG", ("sample", "digits", "--grid", "sheet.jpg")),
        ("numbers separated by commas", (*SAMPLE, "--classes", "cat")),
        ("numbers separated by commas", (*SAMPLE, "--classes", "")),
        ("0 … 9", (*SAMPLE, "--classes", "3,10")),
        ("0 … 9", (*SAMPLE, "--classes", "-1")),
        ("banana", (*SAMPLE, "--device", "banana")),
        ("100", ("demo", "--num", 5)),
        ("2", ("evaluate", "fid", "digits", "digits", "--num", 1)),
    ],
)
def test_values_that_make_no_sense(refuse, words, arguments, teacher_copy):
    refuse(USAGE, words, *(teacher_copy if word == "{teacher}" else word for word in arguments))


@pytest.mark.skipif(CUDA, reason="CUDA is there")
def test_cuda_where_there_is_none(refuse, tmp_path, teacher_copy):
    refuse(USAGE, "CUDA", *DMD, "--device", "cuda", "-o", "run")
    refuse(USAGE, "cpu", *SAMPLE, "--device", "cuda")
    assert not (tmp_path / "run").exists() and not (tmp_path / "sheet.png").exists()


# Configuration files.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"trainer: [1,\n steps: 2", ["not valid YAML", "line 2"]),
        (bytes(range(128, 256)), "Cannot read"),
        (b"a: \0", "not valid YAML"),
        (b"- 1\n- 2\n", "mapping"),
        (b"trainer: 3\n", "group of settings"),
        (b"trainer: {optimizers: {1: {lr: 1}}}\n", "Unknown role"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"stepz: 3\n", "Unknown setting"),
    ],
)
def test_damaged_config(refuse, tmp_path, content, words):
    (tmp_path / "mine.yaml").write_bytes(content)
    refuse(USAGE, words, *DMD[:6], "--config", "mine.yaml", "-o", "run")
    assert not (tmp_path / "run").exists()


def test_config_that_is_not_there(refuse):
    refuse(USAGE, "No such file", *DMD, "--config", "none.yaml")
    refuse(USAGE, "directory", *DMD, "--config", ".")


# Output folders.


@pytest.mark.parametrize("verb", [(*DMD, "-o"), ("train", "--quiet", "-o"), ("sample", "digits", "-n", 2, "-o")])
def test_output_that_cannot_be_written(refuse, tmp_path, verb):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    refuse(USAGE, "file", *verb, "file")
    refuse(USAGE, "Cannot write", *verb, "file/sub")
    done = refuse(USAGE, "not", *verb, "full")
    assert "empty" in done.err and ("--resume" in done.err or "sample" in verb)
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "full").iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is writable for this user")
@pytest.mark.parametrize("verb", [(*DMD, "-o"), ("sample", "digits", "-n", 2, "-o")])
def test_read_only_output(refuse, tmp_path, verb):
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse(USAGE, "Cannot write", *verb, "locked/run")


def test_grid_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    refuse(USAGE, "Cannot write", "sample", "digits", "-n", 2, "--grid", "file/sheet.png")
    refuse(USAGE, "folder", "sample", "digits", "-n", 2, "--grid", "folder.png")


def test_resume_of_nothing(refuse, tmp_path):
    refuse(USAGE, "--output", *DMD, "--resume")
    refuse(USAGE, "no run", *DMD, "--resume", "-o", "none")
    (tmp_path / "empty").mkdir()
    refuse(USAGE, "no run", *DMD, "--resume", "-o", "empty")


# Missing weights.


@pytest.mark.parametrize(
    ("name", "repository", "licence"),
    [
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "OpenRAIL"),
        ("flux", "black-forest-labs/FLUX.1-dev", "non-commercial"),
    ],
)
def test_missing_weights_name_repository_size_licence_and_a_way_out(refuse, name, repository, licence):
    words = [repository, " GB", licence, "/path/to/folder, in place of"]
    for arguments in (("distill", "--teacher", name), ("sample", name, "--grid", "a.png"), ("evaluate", "fid", name, "digits")):  # fmt: skip
        refuse(WEIGHTS, words, *arguments)


@pytest.mark.parametrize("arguments", [("distill", "--teacher", "sd15"), ("sample", "sd15", "--grid", "a.png")])
def test_missing_weights_are_told_within_seconds(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "diffaccel", *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == WEIGHTS
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 2.0


# Image folders.


def test_folders_that_are_missing_empty_or_hold_no_images(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    for index in range(3):
        (tmp_path / "text" / f"{index}.png").write_text("not an image")
    (tmp_path / "single.png").write_text("not an image")
    refuse(DATA, "does not exist", "evaluate", "fid", "nowhere", "digits")
    refuse(DATA, "no image files", "evaluate", "fid", "digits", "empty")
    refuse(DATA, ["3 image file", "--skip-bad"], "evaluate", "fid", "text", "digits")
    refuse(DATA, "single image", "evaluate", "fid", "single.png", "digits")
    refuse(DATA, "nowhere", "distill", "--teacher", "digits", "--method", "f-distill", "--data", "nowhere", "--quiet")
    refuse(DATA, "class", "distill", "--teacher", "digits", "--method", "f-distill", "--data", "text", "--quiet")


# Model folders.


def _each_way(folder: Path):
    """The three verbs that open a model."""
    yield "sample", folder, "--num", 2, "--grid", "sheet.png"
    yield "distill", "--teacher", folder, "--method", "dmd", "--quiet", "-o", "run"
    yield "evaluate", "fid", f"model:{folder}", "digits", "--num", 2


def test_a_folder_that_is_not_there_or_holds_no_model(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments in _each_way(Path("empty")):
        refuse(DATA, "model_index.json", *arguments)
    for arguments in _each_way(Path("no/where")):
        refuse(DATA, "no/where", *arguments)


@pytest.mark.parametrize("content", ['{"unet": ', ""])
def test_damaged_model_index(refuse, teacher_copy, content):
    (teacher_copy / "model_index.json").write_text(content)
    for arguments in _each_way(teacher_copy):
        refuse(DATA, "model_index.json", *arguments)


@pytest.mark.parametrize("content", ["[]", '"x"', '{"_class_name": "X", "unet": "x"}', '{"unet": ["diffusers"]}'])
def test_model_index_of_another_shape(refuse, teacher_copy, content):
    (teacher_copy / "model_index.json").write_text(content)
    for arguments in _each_way(teacher_copy):
        refuse(DATA, str(teacher_copy), *arguments)


@pytest.mark.parametrize("size", [0, 4, 100_000])
def test_truncated_weights(refuse, teacher_copy, size):
    os.truncate(teacher_copy / "unet" / "diffusion_pytorch_model.safetensors", size)
    for arguments in _each_way(teacher_copy):
        refuse(DATA, "diffusion_pytorch_model.safetensors", *arguments)


@pytest.mark.parametrize("content", ["{", "{}", '{"sample_size": 8}'])
def test_damaged_network_config(refuse, teacher_copy, content):
    (teacher_copy / "unet" / "config.json").write_text(content)
    for arguments in _each_way(teacher_copy):
        refuse(DATA, str(teacher_copy), *arguments)


def test_pickled_weights_are_not_opened(refuse, teacher_copy):
    weights = teacher_copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    for arguments in _each_way(teacher_copy):
        refuse(DATA, "safetensors", *arguments)


def test_teachers_without_an_adapter_are_refused_with_those_that_have_one(refuse, tmp_path):
    (tmp_path / "flux").mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    refuse(USAGE, ["FluxPipeline", "UNet2DModel", "StableDiffusionPipeline"], "distill", "--teacher", "flux/")


# Numbers that run away.


def test_a_loss_that_is_not_finite_keeps_what_was_saved(refuse, tmp_path):
    runaway = ("--set", f"{STUDENT}lr=1e30", "--set", "trainer.checkpoint_every=1", "--steps", 9)
    refuse(NUMERICAL, ["critic loss is nan", "learning rate"], *DMD, *runaway, "-o", "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / ".lock").exists()


def test_a_teacher_with_infinite_weights(refuse, teacher_copy):
    weights = teacher_copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"].fill_(float("inf"))
    save_file(tensors, weights, metadata={"format": "pt"})
    for arguments in _each_way(teacher_copy):
        refuse(NUMERICAL, "NaN or infinite", *arguments)
        shutil.rmtree("run", ignore_errors=True)


@pytest.mark.parametrize(
    ("setting", "words"),
    [("lr=-1", "lr"), ("betas=[2,3]", "betas"), ("betas=[0.9]", "betas"), ("weight_decay=-1", "weight_decay"),
     ("clip=0", "clip"), ("warmup=-1", "warmup")],
)  # fmt: skip
def test_optimiser_settings_out_of_range(refuse, setting, words):
    refuse(USAGE, words, *DMD, "--set", f"{STUDENT}{setting}")


@pytest.mark.parametrize(
    "content",
    [
        "method: dmd\n",
        "teacher: [digits]\n",
        "teacher: 5\n",
    ],
)
def test_groups_and_names_of_the_wrong_type(refuse, tmp_path, content):
    (tmp_path / "mine.yaml").write_text(content)
    given = () if "teacher" in content else ("--teacher", "digits")
    refuse(USAGE, content.split(":")[0], "distill", *given, "--config", "mine.yaml")
