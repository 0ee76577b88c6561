"""`diffaccel compare guidance`: its three files, what it prints, and what it refuses."""

import json
import re

import pytest
from networks import tiny_unet

from diffaccel.core.errors import NumericalError
from diffaccel.core.imagefiles import read_images

TINY = ("compare", "guidance", "digits", "--num", 60, "--steps", 2, "--sampler", "ddim")


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "new" / "guidance"
    more = ("--rules", "cfg,rescale:apg", "--scales", "2, 7.5", "--seeds", "1,2", "--set", "apg.norm_threshold=0.5")
    return folder, run(*TINY, *more, "-o", folder)


def test_table_and_files(compared):
    folder, done = compared
    assert sorted(path.name for path in folder.iterdir()) == ["guidance.png", "report.html", "report.json"]
    rows = [line.split()[:2] for line in done.out.splitlines()[2:8]]
    wanted = [["unguided", "1"], ["cfg", "2"], ["cfg", "7.5"], ["rescale:apg", "2"], ["rescale:apg", "7.5"]]
    assert rows == [*wanted, ["real", "images"]]
    assert "±" in done.out and "overshoot" in done.out and done.err == ""


def test_report_holds_every_run(compared):
    report = json.loads((compared[0] / "report.json").read_text())
    assert report["settings"]["options"] == {"apg": {"norm_threshold": 0.5}} and report["settings"]["seeds"] == [1, 2]
    for row in report["rows"]:
        values = [run["fd"] for run in row["runs"]]
        assert row["mean"]["fd"] == pytest.approx(sum(values) / 2)
        assert [run["seed"] for run in row["runs"]] == [1, 2] and 0 <= row["mean"]["recall"] <= 1
        fd = row["runs"][0]["report"][0]
        assert fd["metric"] == "FD-digits64" and fd["value"] == values[0] and fd["n_fake"] == 60
    assert [row["nfe"] for row in report["rows"]] == [2, 4, 4, 4, 4]


def test_page_is_one_safe_file_with_the_picture(compared):
    page = (compared[0] / "report.html").read_text()
    assert "<script" not in page and "http" not in page and page.count("<svg") == 4
    assert "data:image/png;base64," in page and "rescale:apg" in page
    picture = read_images([compared[0] / "guidance.png"])
    assert (
        picture.shape[-1] > 2 * 160 and picture.shape[-2] > 3 * 128
    )  # two scales; two rules, and the line of references


def test_json_on_stdout_is_the_report(run, tmp_path):
    done = run(*TINY, "--scales", 3, "--rules", "cfg++", "--scales", "0.5", "-o", tmp_path / "out", "--json")
    assert json.loads(done.out) == json.loads((tmp_path / "out/report.json").read_text())


def test_one_seed_shows_the_interval_of_its_distance(run, tmp_path):
    done = run(*TINY, "--num", 200, "--scales", 3, "--rules", "cfg", "-o", tmp_path / "out")
    row = json.loads((tmp_path / "out/report.json").read_text())["rows"][1]["runs"][0]
    low, high = row["report"][0]["ci95"]
    assert "without bias, 95 %" in done.out
    assert re.search(rf"cfg .* {row['fd']:.2f} +{low:.2f} … {high:.2f} ", done.out), done.out


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("'apg'", ("--rules", "cfg,agp")),
        ("rescale:cfg", ("--rules", "rescale")),
        ("at least one of scales", ("--scales", "")),
        ("at least one of rules", ("--rules", ",")),
        ("at least one of seeds", ("--seeds", "")),
        ("--scales takes numbers", ("--scales", "2,high")),
        ("--seeds takes numbers", ("--seeds", "1.5")),
        ("got nan", ("--scales", "nan")),
        ("no effect on cfg", ("--rules", "cfg", "--set", "apg.eta=0")),
        ("'eta'", ("--set", "apg.etaa=0")),
        ("RULE.NAME=VALUE", ("--set", "eta=0")),
        ("'ddim'", ("--sampler", "dim")),
        ("--num", ("--num", 5)),
        ("steps", ("--steps", 0)),
        ("try cpu", ("--device", "cpuu")),
    ],
)
def test_bad_input(refuse, words, more):
    refuse(2, words, *TINY, "-o", "out", *more)


def test_models_that_cannot_be_compared(refuse, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(tiny_unet(None), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    refuse(2, ["no classes", "digits"], "compare", "guidance", tmp_path / "ddpm", "-o", "out")
    refuse(2, "'digits'?", "compare", "guidance", "digit", "-o", "out")
    refuse(4, "weights", "compare", "guidance", "dit", "-o", "out")


def test_nothing_is_overwritten(refuse, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    refuse(2, ["not an empty folder", "--output"], *TINY, "-o", "out")
    refuse(2, "not an empty folder", *TINY, "-o", "out/old.txt")
    refuse(3, "nowhere", *TINY, "-o", "new", "--reference", "./nowhere")
    assert not (tmp_path / "new").exists()


def test_the_folder_is_tried_before_anything_is_drawn(refuse, tmp_path, monkeypatch):
    from diffaccel.evaluate import guidance_sweep

    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(guidance_sweep, "sweep_guidance", None)
        refuse(2, "Cannot write", *TINY, "-o", "file/new/out")
        refuse(2, "too long", *TINY, "-o", "x" * 300)
        refuse(2, "too long", "sample", "digits", "-o", "x" * 300)

    def fails(*_, **__):
        raise NumericalError("diverged")

    monkeypatch.setattr(guidance_sweep, "sweep_guidance", fails)
    refuse(5, "diverged", *TINY, "-o", "new/out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_infinite_end_is_valid_json(run, tmp_path):
    run(*TINY, "--num", 6, "--scales", 3, "--rules", "interval:cfg", "--set", "interval.sigma_range=[3e-1,inf]", "-o", tmp_path / "out")  # fmt: skip
    report = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)
    assert report["settings"]["options"] == {"interval": {"sigma_range": [0.3, "Infinity"]}}
