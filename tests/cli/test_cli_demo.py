"""`diffaccel demo`: the report around a run; the run itself is tiny here."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def demo(run, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(tiny_run, folder / "run")  # the demo continues a run that is there: this one has nothing left to do
    return folder, run("demo", "-o", folder, "--num", 100, "--quiet")


def test_table_and_files(demo):
    folder, done = demo
    assert done.err == "" and "teacher, 50 steps" in done.out and "real, held out" in done.out
    assert all((folder / name).stat().st_size > 1000 for name in ("report.html", "report.json", "overview.png"))


def test_report_is_one_safe_file(demo):
    page = (demo[0] / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") >= 4 and "What to try next" in page


def test_numbers_add_up(demo):
    report = json.loads((demo[0] / "report.json").read_text())
    fd = {row["label"]: row["fd"]["value"] for row in report["rows"]}
    one, fifty, student = fd["teacher, 1 step"], fd["teacher, 50 steps"], fd["student, 1 step"]
    assert report["gain"] == pytest.approx((one - student) / (one - fifty))
    assert [row["nfe"] for row in report["rows"]] == [50, 1, 1, 0]
    assert all(row["fd"]["n_fake"] == 100 for row in report["rows"][:3])
    assert len(report["rows"][0]["classes"]["classes"]) == 10


@pytest.mark.slow
def test_from_nothing(run, tmp_path):
    done = run("demo", "-o", tmp_path / "demo")
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["gain"] >= 0.9
    assert "Try next" in done.err
