"""Faults of `diffaccel evaluate`: one sentence, the documented exit code, and no code of strangers is run."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.core.images import save_png
from diffaccel.models.data import load_digits

USAGE, DATA, WEIGHTS = 2, 3, 4


class _Bomb:
    """A pickle that leaves a file behind when it is opened by an unsafe reader."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(load_digits("heldout")[0][:40]):
        save_png(image, tmp_path / "images" / f"{index:03d}.png")
    return tmp_path / "images"


def _spoil(folder) -> int:
    """Add files that cannot be used; returns their number."""
    good = (folder / "000.png").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.PNG").write_text("text")
    (folder / "short.png").write_bytes(good[: len(good) // 2])
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "deep.tif")
    save_png(torch.zeros(1, 9, 8, dtype=torch.uint8), folder / "zz-other-size.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return 7


def test_unusable_files_are_named_or_skipped_and_counted(refuse, run, folder):
    bad = _spoil(folder)
    done = refuse(
        DATA, [f"{bad} image file(s) cannot be used", "empty.png: ", "--skip-bad"], "evaluate", "fid", folder, "digits"
    )
    assert all(name in done.err for name in ("text.PNG", "short.png", "moving.gif", "deep.tif", "9×8", "gone.png"))
    report = json.loads(run("evaluate", "fid", folder, "digits", "--skip-bad", "--json").out)
    assert len(report["fake"]["skipped"]) == bad and report["fake"]["count"] == 40
    assert f"{bad} fake file(s) could not be used and were left out" in report["warnings"]


def test_odd_but_usable_files_have_one_behaviour(run, folder):
    pixels = Image.open(folder / "000.png")
    for name, image in {
        "rgba.png": pixels.convert("RGBA"),
        "palette.png": pixels.convert("P"),
        "cmyk.jpg": Image.new("CMYK", (8, 8)),
        "one-bit.png": pixels.convert("1"),
        "UPPER.PNG": pixels,
        ".hidden.png": pixels,
        "sixteen.png": Image.fromarray(np.asarray(pixels).astype(np.uint16) * 257),
    }.items():
        image.save(folder / name)
    turned = Image.Exif()
    turned[274] = 6
    pixels.convert("L").save(folder / "turned.jpg", exif=turned)
    (folder / "loop").symlink_to(folder)
    report = json.loads(run("evaluate", "fid", folder, "digits", "--json").out)
    fake = report["fake"]
    assert fake["count"] == 47 and fake["rotated"] == 1 and fake["formats"] == {"JPEG": 2, "PNG": 45}
    assert fake["modes"]["CMYK"] == fake["modes"]["RGBA"] == fake["modes"]["1"] == 1
    assert fake["duplicates"] >= 1 or "UPPER.PNG" in fake["last"] + fake["first"]


def test_too_few_images(refuse, run, folder):
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    refuse(DATA, "1 usable image", "evaluate", "fid", folder, "digits")
    refuse(DATA, "1 usable image", "evaluate", "kid", "digits", folder)


def test_a_set_against_itself(run, folder):
    report = json.loads(run("evaluate", "all", folder, folder, "--metrics", "fid,prdc", "--json").out)
    values = {result["metric"]: result["value"] for result in report["results"]}
    assert abs(values["FD-digits64"]) < 1e-6 and values["precision-digits64"] == values["recall-digits64"] == 1
    assert any("same images" in warning for warning in report["warnings"])
    assert any("covariance is singular" in warning for warning in report["warnings"])


_MU, _SIGMA = np.zeros(64), np.eye(64)
STATISTICS = {
    "3-dimensional": {"mu": np.zeros(3), "sigma": np.eye(3)},
    "not symmetric": {"mu": _MU, "sigma": _SIGMA + np.eye(64, k=1)},
    "NaN": {"mu": _MU * np.nan, "sigma": _SIGMA},
    "not a covariance": {"mu": _MU, "sigma": -_SIGMA},
    "write images:": {"arr_0": np.zeros((4, 8, 8, 3), np.uint8)},
    "no mu and sigma": {"mean": _MU},
}


@pytest.mark.parametrize("words", STATISTICS)
def test_wrong_statistics(refuse, tmp_path, words):
    np.savez(tmp_path / "ref.npz", **STATISTICS[words])
    refuse(DATA, words, "evaluate", "fid", "digits", "ref.npz", "--features", "digits64")


def test_statistics_of_other_features(refuse, run, tmp_path):
    run("evaluate", "stats", "digits", "--features", "random-conv", "-o", tmp_path / "ref.safetensors")
    refuse(DATA, ["random-conv", "digits64"], "evaluate", "fid", "digits", "ref.safetensors", "--features", "digits64")
    refuse(DATA, "--vectors", "evaluate", "kid", "digits", "ref.safetensors")


def test_pickles_are_never_run(refuse, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    bomb = np.empty(1, dtype=object)
    bomb[0] = _Bomb(marker)
    np.savez(tmp_path / "objects.npz", mu=bomb, sigma=bomb)
    for name in ("plain.npz", "stats.pkl", "stats.safetensors", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(_Bomb(marker)))
    torch.save({"fc.weight": _Bomb(marker)}, tmp_path / "zipped.pth")
    for name in ("objects.npz", "plain.npz", "stats.pkl", "stats.safetensors"):
        refuse(DATA, name, "evaluate", "fid", "digits", name)
    for name in ("model.pth", "zipped.pth"):
        for more in ((), ("--unverified-weights",)):
            refuse(
                DATA, name, "evaluate", "fid", "digits", "digits", "--features", "inception", "--weights", name, *more
            )
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "C:\\x.png"])
def test_archives_that_reach_outside(refuse, tmp_path, folder, name):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
        archive.writestr(zipfile.ZipInfo(name), (folder / "000.png").read_bytes())
    refuse(DATA, "images.zip", "evaluate", "fid", "images.zip", "digits")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["6726825d", "--weights", "DIFFACCEL_INCEPTION"], ("fid", "digits", "digits", "--features", "inception")),
        (["6726825d"], ("fid", "digits", "digits", "--preset", "pytorch-fid")),
        (["facebook/dinov2-large", "--weights"], ("fid", "digits", "digits", "--features", "dinov2")),
        (["openai/clip-vit-large-patch14-336"], ("cmmd", "digits:heldout", "digits")),
        (["someone/clip"], ("cmmd", "digits:heldout", "digits", "--clip-weights", "someone/clip")),
        (["dinov2"], ("fid", "digits", "digits", "--features", "dinov2", "--download")),
    ],
)
def test_missing_weights_are_named_without_a_call_to_the_network(refuse, tmp_path, monkeypatch, words, arguments):
    def no_network(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refuse(WEIGHTS, words, "evaluate", *arguments)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("it is a folder", ("all", "digits", "digits", "-o", ".")),
        ("No such file", ("fid", "digits", "digits", "-o", "no/where/report.json")),
        ("Not a directory", ("fid", "digits", "digits", "--html", "file/page.html")),
        ("too long", ("fid", "digits", "digits", "-o", "x" * 300)),
        ("No such file", ("stats", "digits", "-o", "no/ref.npz")),
        (".safetensors", ("stats", "digits", "-o", "ref.pkl")),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_any_work(refuse, tmp_path, monkeypatch, words, arguments):
    def too_late(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setattr("diffaccel.evaluate.run.collect", too_late)
    (tmp_path / "file").write_text("")
    refuse(USAGE, words, "evaluate", *arguments)


def test_results_may_have_spaces_and_umlauts_in_their_names(run, tmp_path, folder):
    folder = folder.rename(tmp_path / "Bilder für alle")
    target = tmp_path / "größer als 5.json"
    run("evaluate", "fid", folder, "digits", "-o", target)
    assert json.loads(target.read_text())["fake"]["name"] == str(folder)
    assert json.loads(run("evaluate", "verify", target, "--json").out)["matches"] is True


def test_reports_that_are_none(refuse, run, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    run("evaluate", "fid", "digits:heldout", "digits", "-o", tmp_path / "fd.json")
    run("evaluate", "kid", "digits:heldout", "digits", "-o", tmp_path / "kid.json")
    refuse(DATA, "x.json", "evaluate", "compare", "x.json", "fd.json")
    refuse(DATA, "nowhere.json", "evaluate", "verify", "nowhere.json")
    refuse(USAGE, "no metric is in both", "evaluate", "compare", "fd.json", "kid.json")


def test_a_changed_image_fails_the_verification(cli, run, folder, tmp_path):
    run("evaluate", "fid", folder, "digits", "-o", tmp_path / "r.json")
    save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), folder / "000.png")
    done = cli("evaluate", "verify", tmp_path / "r.json")
    assert done.code == DATA and "the fake images changed" in done.out and "could not be reproduced" in done.err


def test_a_closed_pipe_and_a_dumb_terminal_leave_no_trace(tmp_path):
    command = f"{sys.executable} -m diffaccel evaluate fid digits:heldout digits --json | head -c 1"
    plain = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=plain)
    assert done.stdout == "{" and done.stderr == ""
