"""The wheel: what travels in it, and that it works where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("diffaccel-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed("list", "recipes")`: the command of the installed wheel, far from the checkout."""
    target = tmp_path_factory.mktemp("site")
    install = [*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def python(*arguments) -> str:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    def run(*arguments) -> str:
        return python("-m", "diffaccel", *arguments)

    where = python("-c", "import diffaccel; print(diffaccel.__file__)")
    assert Path(where.strip()).is_relative_to(target)
    run.python = python
    return run


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = "diffaccel/models/assets/digits/"
    expected = {
        "diffaccel/py.typed",
        "diffaccel/configs/train/digits.yaml",
        "diffaccel/configs/distill/dmd.yaml",
        *(assets + name for name in ("SHA256.json", "data.npz", "classifier.safetensors", "teacher/model_index.json")),
        assets + "teacher/unet/diffusion_pytorch_model.safetensors",
    }
    assert expected <= names, expected - names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    recipes = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"diffaccel/configs/{name}" for name in recipes} <= names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffaccel").rglob("*.py")}
    assert sources <= names
    assert all(name.startswith(("diffaccel/", "diffaccel-")) for name in names)
    assert wheel.stat().st_size < 32 * 2**20


def test_command_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    assert "diffaccel = diffaccel.cli.app:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert not any(f"Requires-Dist: {name}" in metadata for name in ("torchvision", "torch-fidelity", "lpips"))


def test_recipes_are_found_without_the_checkout(installed):
    assert "digits-f-distill" in installed("list", "recipes")


def test_the_embedded_teachers_work_without_the_checkout(installed, tmp_path):
    installed("sample", "tiny-sd", "--steps", 2, "--prompt", "red apple", "--grid", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 100
    listed = installed("list", "teachers")
    names = ["digits", "digits-flow", "mnist"]
    assert all(name in listed for name in names)
    script = f"import diffaccel\nfor name in {names}: next(diffaccel.generate(name, 2, steps=2, guidance_scale=2.0))"
    installed.python("-c", script)
