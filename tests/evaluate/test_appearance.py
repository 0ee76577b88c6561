"""Saturation, contrast and clipped values: closed forms, independence of how images were read, verdicts."""

import colorsys
import json
import math
import statistics

import pytest
import torch
from typer.testing import CliRunner

from diffaccel.cli.evaluate import app
from diffaccel.core.errors import DataError
from diffaccel.core.images import save_png
from diffaccel.evaluate.collect import VECTORS, collect
from diffaccel.evaluate.compare import compare_reports
from diffaccel.evaluate.features.appearance import AppearanceFeatures
from diffaccel.evaluate.jackknife import Z_975
from diffaccel.evaluate.report import Measurement, Report, load_report
from diffaccel.evaluate.report_page import report_page
from diffaccel.evaluate.run import evaluate_images, write_statistics
from diffaccel.evaluate.sources import TensorSource
from diffaccel.models.data import load_digits

KINDS = AppearanceFeatures.KINDS
LABELS = [label for kind in KINDS for label in (kind, f"{kind} of real images")]


def _noise(count, size=16, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def _flat(*colour):
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 6, 5)


def _folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(image, path / f"{index:03d}.png")
    return path


HALVES = torch.cat([_flat(0, 0, 0), _flat(255, 255, 255)], dim=1)
RED_AND_BLACK = torch.cat([_flat(0, 0, 0), _flat(255, 0, 0)], dim=2)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (_flat(128, 128, 128), (0, 0, 0)),
        (_flat(77, 77, 78), (1 / 78, 0, 0)),
        (_flat(0, 0, 0), (0, 0, 1)),
        (_flat(255, 0, 0), (1, 0, 1)),
        (_flat(200, 50, 100), (0.75, 0, 0)),
        (_flat(1, 0, 0), (1, 0, 2 / 3)),  # saturation does not know how dark a colour is
        (HALVES, (0, 0.5, 1)),
        (RED_AND_BLACK, (0.5, 0.299 / 2, 1)),
    ],
)
def test_closed_forms(image, expected):
    found = AppearanceFeatures()(image[None])[0]
    assert torch.equal(found, torch.tensor(expected, dtype=torch.float32))


def test_pixel_by_pixel_with_the_standard_library():
    image = _noise(1, 5, seed=1)[0]
    image[:, 0, 0], image[:, 1, 1] = 0, 255
    pixels = [tuple(value / 255 for value in pixel) for pixel in image.flatten(1).T.tolist()]
    expected = (
        statistics.fmean(colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels),
        statistics.pstdev(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in pixels),
        statistics.fmean(value in (0, 1) for pixel in pixels for value in pixel),
    )
    assert AppearanceFeatures()(image[None])[0].tolist() == pytest.approx(expected, rel=6e-8)  # float32 holds them


def test_uniform_noise_has_the_expected_values():
    """6·(m − l) of the 256³ colours have the largest value m and the smallest value l < m."""
    saturation = sum(6 * (m - low) ** 2 / m for m in range(256) for low in range(m)) / 256**3
    contrast = math.hypot(0.299, 0.587, 0.114) * math.sqrt((256**2 - 1) / 12) / 255
    report = evaluate_images(_noise(200, 64), None, ("appearance",))
    for kind, expected in zip(KINDS, (saturation, contrast, 2 / 256), strict=True):
        low, high = report[kind].ci95
        assert low < expected < high and report[kind].n_fake == 200 and report[kind].n_real is None
        assert report[kind].metric == f"{kind}-pixels"


def test_the_interval_is_that_of_the_mean_over_images():
    contrast = evaluate_images(torch.stack([HALVES, HALVES * 0]), None, ("appearance",))["contrast"]  # 1/2 and 0
    error = math.sqrt(1 / 8) / math.sqrt(2)
    assert contrast.value == 0.25
    assert contrast.ci95 == pytest.approx((0.25 - Z_975 * error, 0.25 + Z_975 * error), rel=1e-15)


def test_grey_equals_its_repetition_in_three_channels():
    grey = _noise(20, channels=1)
    results = [evaluate_images(side, None, ("appearance",)).results for side in (grey, grey.expand(-1, 3, -1, -1))]
    assert results[0] == results[1] and results[0][0].value == 0 and results[0][1].value > 0.2


def test_colours_count_though_other_features_are_grey():
    report = evaluate_images(_noise(30, 8), "digits", ("fid", "appearance"), "digits64")
    alone = evaluate_images(_noise(30, 8), "digits", ("fid",), "digits64")
    assert report["FD"] == alone["FD"] and report["saturation"].value > 0.6
    assert [result.kind for result in report.results] == ["FD", *LABELS]
    assert report["saturation of real images"].value == 0 and report["contrast of real images"].n_real > 1000


def test_batches_workers_and_sizes_of_neighbours_do_not_change_a_bit(tmp_path, monkeypatch):
    images = _noise(40)
    folder = _folder(tmp_path / "a", images)
    expected = evaluate_images(images, None, ("appearance",)).results
    for block, workers in ((1, 0), (7, 1), (256, 2)):
        monkeypatch.setattr("diffaccel.evaluate.collect._BLOCK", block)
        assert evaluate_images(folder, None, ("appearance",), workers=workers).results == expected
    extractor, other = AppearanceFeatures(), _noise(1, 9, seed=3)[0]
    alone = torch.cat([extractor(image[None]) for image in images])
    assert torch.equal(extractor([other, *images, other])[1:-1], alone)


class _Share:
    """One of several processes, as `collect` sees it; what the others find is handed over."""

    device, world = torch.device("cpu"), 2

    def __init__(self, rank, theirs=None):
        self.rank, self.theirs, self.found = rank, theirs, {}

    def agree(self, work):
        return work()

    def gather_json(self, content):
        self.found["json"] = json.loads(json.dumps(content))
        return [content, *([self.theirs["json"]] if self.theirs else [])]

    def each(self, tensors):
        self.found["tensors"] = tensors
        yield tensors
        if self.theirs:
            yield self.theirs["tensors"]


def test_processes_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr("diffaccel.evaluate.collect._BLOCK", 8)
    images, space = _noise(50), AppearanceFeatures()
    second = _Share(1)
    first = _Share(0, second.found)
    for share in (second, first):
        read = collect(TensorSource("tensor", "noise", images), {space: {VECTORS}}, share)
    assert torch.equal(read.sides[space].vectors, space(images))


def test_statistics_have_no_pixels(tmp_path):
    for name, options in (("plain.npz", {}), ("vectors.npz", {"vectors": True})):
        write_statistics("digits", tmp_path / name, **options)
        with pytest.raises(DataError, match=f"{name} holds statistics; appearance needs images"):
            evaluate_images(tmp_path / name, "digits", ("appearance",))
        report = evaluate_images(tmp_path / name, "digits", ("fid", "appearance"))
        assert [result.kind for result in report.results] == ["FD"]
        assert any("appearance is left out" in warning for warning in report.warnings)
        report = evaluate_images("digits:heldout", tmp_path / name, ("appearance",))
        assert [result.kind for result in report.results] == list(KINDS)
        assert any("holds no images" in warning for warning in report.warnings)


def _result(value, half, label="saturation", real=False):
    counts = {"n_real": 100} if real else {"n_fake": 100}
    return Measurement(f"{label}-pixels", value, None, (value - half, value + half), "m", better="closer", **counts)


def _report(value, half, aim, fake, real="r", aim_half=0.01):
    results = [_result(value, half)]
    results += [] if aim is None else [_result(aim, aim_half, "saturation of real images", True)]
    identity = {"name": "pixels", "dim": 3, "sha256": "0", "preprocessing": "p", "dtype": "float32"}
    sides = ({"kind": "folder", "name": name, "count": 100, "digest": name} for name in (fake, real))
    return Report(results, [identity], *sides, environment={})


@pytest.mark.parametrize(
    ("values", "aim", "verdict"),
    [
        ((0.3, 0.5), 0.2, "first is better"),
        ((0.3, 0.5), 0.6, "second is better"),
        ((0.3, 0.5), 0.34, "first is better"),
        ((0.3, 0.5), 0.405, "cannot tell apart"),  # the aim may lie on either side of the midpoint
        ((0.3, 0.301), 0.6, "cannot tell apart"),  # the values may be equal
        ((0.3, 0.5), None, "no reference"),
    ],
)
def test_closer_to_the_real_images_is_better(values, aim, verdict):
    reports = [_report(value, 0.01, aim, str(value)) for value in values]
    there, back = compare_reports(*reports), compare_reports(*reversed(reports))
    flipped = {"first is better": "second is better", "second is better": "first is better"}
    assert there.rows[0].verdict == verdict and back.rows[0].verdict == flipped.get(verdict, verdict)
    assert any("No verdict on saturation" in note for note in there.notes) == (aim is None)
    assert len(there.rows) == 1 and "saturation-pixels ◎" in str(there)


def test_other_real_images_are_no_common_aim():
    comparison = compare_reports(_report(0.3, 0.01, 0.2, "a"), _report(0.5, 0.01, 0.2, "b", real="other"))
    assert comparison.rows[0].verdict == "no reference"
    assert any("real sides differ" in note for note in comparison.notes)


def test_verdicts_are_rarely_wrong_where_none_is_closer():
    """Values that are truly 0.3 and 0.5 are equally far from 0.4: a verdict is an error, in 5 % of draws."""
    error = 0.01
    draws = error * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = 0
    for first, second, aim in (draws + torch.tensor([0.3, 0.5, 0.4])).tolist():
        reports = [_report(value, Z_975 * error, aim, str(value), aim_half=Z_975 * error) for value in (first, second)]
        wrong += compare_reports(*reports).rows[0].verdict != "cannot tell apart"
    assert wrong / len(draws) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / len(draws)))


def _run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_verb_the_page_and_the_comparison(tmp_path):
    train = load_digits("train")[0][:60]
    sides = {"same": load_digits("heldout")[0][:60], "burnt": (2 * train.long() - 60).clamp(0, 255).to(torch.uint8)}
    for name, images in sides.items():
        folder, path = _folder(tmp_path / name, images), tmp_path / f"{name}.json"
        printed = json.loads(_run("appearance", folder, "digits", "--json", "-o", path))
        assert [result["metric"] for result in printed["results"]] == [f"{label}-pixels" for label in LABELS]
        assert {result["better"] for result in printed["results"]} == {"closer"}
    text = _run("compare", tmp_path / "same.json", tmp_path / "burnt.json")
    verdicts = {line.split("-")[0]: line for line in text.splitlines() if "-pixels" in line}
    assert all("first is better" in verdicts[kind] for kind in ("contrast", "clipped"))
    assert "cannot tell apart" in verdicts["saturation"]  # grey images have none
    page = report_page(load_report(tmp_path / "burnt.json"))
    assert "closer to real images" in page and "clipped of real images-pixels" in page
    assert _run("appearance", tmp_path / "same").startswith("saturation-pixels: 0.0000")


def test_all_includes_them():
    results = json.loads(_run("all", "digits:heldout", "digits", "--no-interval", "--json"))["results"]
    assert [result["metric"] for result in results][-6:] == [f"{label}-pixels" for label in LABELS]
