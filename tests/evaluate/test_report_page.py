"""The page of a report: self-contained, well-formed, true to scale, and no file name of a stranger runs in it."""

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.evaluate.html import figure_of_samples, thumbnails
from diffaccel.evaluate.report import Measurement, Report, load_report
from diffaccel.evaluate.report_page import report_page, write_report_page

_VOID = {"meta", "br", "img", "path", "circle"}


class _Page(HTMLParser):
    """Tags with their attributes, and the text; unbalanced tags raise."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _images(count=3, channels=1, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator))


def _report(*results, name="samples/", **changes) -> Report:
    results = results or (Measurement("FD-digits64", 0.8, 0.1, (-0.2, 0.4), "jackknife", 355, 1442),)
    report = Report(
        list(results),
        [{"name": "digits64", "dim": 64, "sha256": "ab" * 32, "preprocessing": "uint8/127.5 − 1"}],
        {
            "kind": "folder",
            "name": name,
            "count": 355,
            "shape": [1, 8, 8],
            "formats": {"PNG": 355},
            "digest": "12" * 32,
        },
        {"kind": "dataset", "name": "digits:train", "count": 1442, "shape": [1, 8, 8], "digest": "9f" * 32},
        settings={"fake": name, "real": "digits", "metrics": ["fid"]},
        run={"command": ["diffaccel", "evaluate", "all", name]},
        samples={"fake": _images(), "real": _images(70)},
    )
    return replace(report, **changes)


def _pictures(page: _Page) -> list[Image.Image]:
    data = [tag["src"].removeprefix("data:image/png;base64,") for tag in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(text, validate=True))) for text in data]


def test_page_is_complete_and_needs_nothing_from_outside():
    text = report_page(_report())
    page = _Page(text)
    names = {name for name, _ in page.tags}
    assert text.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}] and "title" in names
    assert not names & {"script", "link", "iframe", "a", "button", "input", "details", "object"}
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", text)
    assert all(tag["alt"] for tag in page.all("img")) and all(tag["aria-label"] for tag in page.all("svg"))
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    for expected in ("0.8000", "lower is better", "bias-corrected", "-0.2000 to 0.4000", "355", "1 × 8 × 8", "PNG 355"):
        assert expected in page.text
    assert "the first 64 of 1442" in page.text and "12" * 32 in page.text and "No warnings." in page.text


def test_names_of_strangers_are_text():
    evil = "<script>alert(1)</script>'\"&"
    skipped = [{"name": evil, "reason": evil}]
    report = _report(Measurement(f"FD-{evil}", 1.0, method=evil), name=evil, warnings=[evil])
    report = replace(report, fake={**report.fake, "skipped": skipped, evil: evil}, run={evil: [evil]})
    report = replace(report, features=[{evil: {evil: evil}}], settings={evil: None}, environment={evil: evil})
    text = report_page(report)
    page = _Page(text)
    assert "script" not in {name for name, _ in page.tags} and "<script" not in text
    assert page.text.count(evil) >= 10 and any(evil in tag["alt"] for tag in page.all("img"))


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    write_report_page(_report(name="bad\udcff"), tmp_path / "page.html")
    assert "bad\\udcff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_equal_reports_give_equal_bytes(tmp_path):
    _report().save(tmp_path / "r.json")
    loaded = replace(load_report(tmp_path / "r.json"), samples=_report().samples)
    for index, report in enumerate((_report(), _report(), loaded)):
        write_report_page(report, tmp_path / f"{index}.html")
    assert len({(tmp_path / f"{index}.html").read_bytes() for index in range(3)}) == 1


def test_samples_that_are_missing_are_explained():
    statistics = {"kind": "statistics", "name": "ref.npz", "count": None}
    page = _Page(report_page(_report(real=statistics, samples={"fake": _images()})))
    assert "real side is a statistics file, which holds no images" in page.text and len(page.all("img")) == 1
    page = _Page(report_page(_report(samples={})))
    assert page.text.count("No images to show") == 2
    assert "No images to show" not in _Page(report_page(_report(real=None, samples={"fake": _images()}))).text


def test_left_out_files_are_listed_up_to_a_limit():
    skipped = [{"name": f"x{index}.png", "reason": "the file is empty"} for index in range(25)]
    page = _Page(report_page(_report(fake={**_report().fake, "skipped": skipped})))
    assert page.text.count("the file is empty") == 20 and "and 5 more" in page.text


def _marks(result):
    """x of zero, the value, the corrected value and both ends of the interval, in the drawing."""
    text = report_page(_report(result))
    value = float(re.search(r"class='value' d='M([\d.]+)", text)[1])
    zero = re.search(r"class='zero' d='M([\d.]+)", text)
    circle = re.search(r"<circle cx='([\d.]+)'", text)
    ends = re.search(r"class='interval' d='M([\d.]+) 18H([\d.]+)'", text)
    return (*(float(m[1]) if m else None for m in (zero, circle)), value, *(map(float, ends.groups()) if ends else ()))


def test_the_drawing_is_to_scale():
    zero, corrected, value, low, high = _marks(Measurement("FD-x", 0.8, 0.1, (-0.2, 0.4)))
    scale = (value - zero) / 0.8
    assert [(x - zero) / scale for x in (corrected, low, high)] == pytest.approx([0.1, -0.2, 0.4], abs=1e-3)
    assert _marks(Measurement("FD-x", 25.0))[0] is not None  # zero is in sight, however far
    assert _marks(Measurement("IS-x", 9.0, None, (8.9, 9.1), better="higher"))[0] is None
    zero, _, value, low, high = _marks(Measurement("recall-x", 0.5, None, (0.4, 0.6), better="higher"))
    assert (zero, value, low, high) == pytest.approx((30, 150, 126, 174))  # all of [0, 1] is 240 wide
    assert _marks(Measurement("density-x", 2.0, better="higher"))[2] == 270


@pytest.mark.parametrize("value", [0.0, 1e-12, 123456.789, 1e30, -3.0])
def test_any_finite_number_can_be_drawn(value):
    for better in ("lower", "higher"):
        page = _Page(report_page(_report(Measurement("X-x", value, better=better))))
        labels = page.all("text")
        assert 1 <= len(labels) <= 8 and len(page.all("svg")) == 1


def test_a_number_that_is_none_is_not_drawn():
    page = _Page(report_page(_report(Measurement("FD-x", math.nan))))
    assert page.all("svg") == [] and "Not a finite number" in page.text


def test_a_deviation_does_not_pass_for_an_interval():
    deviating = Measurement("IS-x", 9.0, deviation=0.1, method="deviation of 10 parts, not a confidence interval")
    cards = _Page(report_page(_report(deviating))).text.partition("In the drawings")[0]
    assert "± 0.1000" in cards and "95 % interval" not in cards


def test_small_images_are_enlarged_pixel_by_pixel():
    images = _images(3)
    picture = np.asarray(_pictures(_Page(figure_of_samples("x", images)))[0])
    assert picture.shape == (2 * 2 + 64, 3 * 66 + 2)
    assert np.array_equal(picture[2 + 4 : 66 : 8, 2 + 4 : 66 : 8], images[0][0].numpy())


def test_thumbnails_of_different_sizes_keep_proportions_and_colours():
    red = torch.tensor([200, 10, 30], dtype=torch.uint8)[:, None, None].expand(3, 300, 150)
    grey = torch.full((1, 10, 40), 77, dtype=torch.uint8)
    first, second = thumbnails([red, grey], 96)
    assert first.shape == second.shape == (3, 96, 80)
    inside = (first != 255).any(0)
    assert inside.any(0).sum() == 48 and inside.any(1).sum() == 96  # 300×150 → 96×48, centred
    assert torch.equal(first[:, inside].unique(dim=1)[:, 0], red[:, 0, 0])
    assert (second == 77).all(0).sum() == 20 * 80  # 10×40 → 20×80


def test_pages_stay_small_whatever_the_images():
    noise = _images(48, 3, 200, 300)
    text = report_page(_report(samples={"fake": noise, "real": noise}))
    assert len(text) < 2_000_000
    assert len(_pictures(_Page(text))) == 2
