"""Pages of distillation: a comparison made up of numbers, and runs made up of files."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from distilling import draw, tiny_task

import diffaccel
from diffaccel.core.config import to_yaml
from diffaccel.core.errors import DataError
from diffaccel.core.images import save_png
from diffaccel.distill.registry import METHODS, get_method
from diffaccel.evaluate.distill_page import MANY, ONE, gained, header, lines, notes, page, run_lines, write_comparison
from diffaccel.evaluate.run_page import SIGNALS, curve, read_metrics, signal_of, signals_table, write_run_page


def made_up_run(folder: Path, values: dict[str, list], pictures: int = 2) -> Path:
    """A run folder with metrics by name, logged every tenth step, and sample sheets."""
    (folder / "samples").mkdir(parents=True)
    trainer = {"steps": 10 * len(next(iter(values.values()))), "batch_size": 8}
    settings = {"teacher": "<digits>", "method": {"name": "dmd", "student_steps": 2}, "trainer": trainer}
    (folder / "config.yaml").write_text(to_yaml(settings))
    rows = [dict(zip(values, line, strict=True)) for line in zip(*values.values(), strict=True)]
    text = [json.dumps({"step": 10 * index + 10, **row}) for index, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
    for index in range(pictures):
        save_png(torch.full((1, 40, 40), index, dtype=torch.uint8), folder / "samples" / f"step-{10 * index:06d}.png")
    return folder


def measured(name: str, fd: float, **more) -> dict:
    """What a judge says of a model."""
    rest = {"ci95": [fd - 0.5, fd + 0.5], "bias_corrected": fd, "precision": 0.75, "recall": 0.5, "accuracy": 0.875}
    return {"name": name, "fd": fd, **rest, "nfe": 1, "metric": "FD-digits64", "warnings": [], **more}


@pytest.fixture
def content(tmp_path) -> dict:
    """Two seeds of one method, none of another, in folders that are there."""
    spent = {"steps": 40, "cpu_seconds": 8.0, "wall_seconds": 10.0, "data": None}
    runs = [measured(f"dmd-seed-{seed}", fd, seed=seed, gain=0.9, **spent) for seed, fd in ((0, 2.0), (1, 4.0))]
    for run, last in zip(runs, (2.0, 8.0), strict=True):
        made_up_run(tmp_path / run["name"], {"validation/FD-digits64": [16.0, 8.0, 4.0, last]})
    teacher = [measured("many", 1.0, nfe=50), measured("one", 11.0)]
    (tmp_path / "sheets").mkdir()
    for run in [*runs, *teacher]:
        save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "sheets" / f"{run['name']}.png")
    rows = [{"label": MANY, "runs": teacher[:1]}, {"label": ONE, "runs": teacher[1:]}, {"label": "dmd", "runs": runs}]
    rows.append({"label": "sid:alpha=<2>", "runs": []})
    failure = {"label": "sid:alpha=<2>", "seed": 0, "text": "The loss is nan.", "exit_code": 5}
    settings = {"teacher": "digits", "steps": 40}
    return {"settings": settings, "metric": "FD-digits64", "num": 100, "reference": "digits", "image_seed": 1,
            "rows": rows, "failures": [failure], "warnings": ["few images"], "versions": {}}  # fmt: skip


def charts(text: str) -> list[ElementTree.Element]:
    """Every drawing of a page; ill-formed ones raise."""
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_gain_is_the_share_of_the_way_from_one_step_to_fifty(content):
    assert [gained(content["rows"], fd) for fd in (11.0, 1.0, 6.0)] == [0.0, 1.0, 0.5]
    content["rows"][1]["runs"][0]["fd"] = 1.0
    assert gained(content["rows"], 2.0) is None


def test_means_and_each_seed(content):
    cells = dict(zip(header(content), lines(content)[2], strict=True))
    assert cells["FD-digits64"] == f"3.000 ± {math.sqrt(2):.3f}" and cells["by seed"] == "2.000 / 4.000"
    assert (cells["seeds"], cells["gain"], cells["accuracy"], cells["data"]) == ("2", "0.900 ± 0.000", "87.5 %", "none")
    assert set(lines(content)[3][1:]) == {"–"}  # every run of it failed
    one = dict(zip(header(content), run_lines(content)[3], strict=True))
    assert (one["seeds"], one["FD-digits64"], one["by seed"]) == ("1", "4.000", "3.50 … 4.50")


def test_notes_say_when_distances_compare_and_what_failed(content):
    text = "\n".join(notes(content))
    assert "100 images" in text and "this number of images only" in text
    assert "sid:alpha=<2>, seed 0, failed: The loss is nan." in text and "Warning: few images" in text


def test_page_is_one_safe_file(content, tmp_path):
    write_comparison(content, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert "<script" not in text and "http" not in text and "<2>" not in text and "sid:alpha=&lt;2&gt;" in text
    assert text.count("data:image/png;base64,") == 3  # two of the teacher, one of each method that has a run
    assert "href='dmd-seed-1/report.html'" in text


def test_curves_are_means_over_seeds_by_steps_and_by_time(content, tmp_path):
    by_step, by_time = charts(page(content, tmp_path))
    places = [[(c.get("cx"), c.get("cy")) for c in chart.iter("circle")] for chart in (by_step, by_time)]
    assert len(places[0]) == 4 and [y for _, y in places[0]] == [y for _, y in places[1]]
    heights = [float(y) for _, y in places[0]]  # 16, 8, 4, 5 on a logarithmic axis
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    share = (heights[2] - heights[3]) / (heights[2] - heights[1])
    assert share == pytest.approx(math.log2(5 / 4), abs=0.01)
    assert {"10", "40"} <= {label.text for label in by_step.iter("text")}
    assert {"2", "8"} <= {label.text for label in by_time.iter("text")}  # 8 seconds for 40 steps


def test_run_page_shows_pictures_and_signals(tmp_path):
    values = {
        "critic/std_ratio": [0.5, 0.75, 1.0],
        "student/disagreement": [1.0, math.nan, 0.5],
        "student/odd": [1, 2, 3],
    }
    values |= {f"student/ratio_mean_bin{k}": [1.0, 1.0, 1.0 + k] for k in range(3)}
    folder = made_up_run(tmp_path / "run", values, pictures=30)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "critic/std_ra')  # in the making
    text = write_run_page(folder).read_text()
    assert len(charts(text)) == 3 and text.count("Healthy:") == 3
    assert text.count("data:image/png;base64,") == 8 and ">step 0<" in text and ">step 290<" in text
    assert "&lt;digits&gt;, distilled by dmd" in text and "<digits>" not in text and "http" not in text
    assert "Also in metrics.jsonl: student/odd." in text
    assert all(f"● student/ratio_mean_bin{k}" in text for k in range(3))


def test_run_page_of_a_run_that_ended_early(tmp_path):
    folder = made_up_run(tmp_path / "run", {"student/loss": [1.0, 2.0, 3.0]}, pictures=0)
    (folder / "metrics.jsonl").write_text('{"step": 10, "student/loss": 1.0}\n')
    assert "10 of 30" in write_run_page(folder).read_text()
    (folder / "metrics.jsonl").unlink()
    assert write_run_page(folder).read_text().count("<svg") == 0
    with pytest.raises(DataError, match="holds no run"):
        write_run_page(tmp_path)


def test_several_students_have_a_page_each(tmp_path):
    folder = made_up_run(tmp_path / "run", {"student/loss": [1.0]}, pictures=0)
    for name in ("student-0", "student-1"):
        made_up_run(folder / name, {"critic/drift": [1.0, 2.0]})
    text = write_run_page(folder).read_text()
    assert "href='student-0/report.html'" in text and "href='student-1/report.html'" in text
    assert "Healthy:" in (folder / "student-1" / "report.html").read_text()


def test_curves_are_thinned_to_means():
    rows = [{"step": step, "a": float(step % 2)} for step in range(1, 201)] + [{"step": 300, "b": 1.0}]
    points = curve(rows, "a")
    assert len(points) == 50 and points[0] == (4, 0.5) and points[-1] == (200, 0.5)


def test_metrics_of_finished_lines_only(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "x')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_the_documentation_has_the_same_table():
    path = Path(diffaccel.__file__).parents[1] / "docs" / "distillation.md"
    assert signals_table() in path.read_text(encoding="utf-8")


def test_no_signal_is_hidden_by_another():
    for signal in SIGNALS:
        assert signal_of(signal.pattern.replace("*", "x")) is signal


SMALL = {"pairs": {"pairs": 6, "pair_steps": 1}, "disback": {"record_steps": 0}, "multi-student": {"student": 0},
         "f-distill": {"gan_weight": 0.1}, "consistency": {"adversarial_weight": 0.1}}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_metric_of_every_method_is_explained(name, tmp_path):
    settings = SMALL.get(name, {})
    method_class = get_method(name).load(settings)
    method = method_class(tiny_task(data=True), method_class.Config(**settings))
    method.begin(tmp_path)
    logged = {f"validation/{key}" for key in method.validate(method.roles["student"])}
    for phase in method.phases(1000):
        logged |= {f"{phase.name}/{key}" for key in method.loss(phase, draw(stream=f"{phase.name}/0")).metrics}
    assert logged and [key for key in logged if signal_of(key) is None] == []
