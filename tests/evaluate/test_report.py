"""The record of an evaluation: complete in JSON, and nothing else passes for one."""

import json

import pytest
import torch

from diffaccel.core.errors import DataError
from diffaccel.evaluate.report import SCHEMA, Measurement, Report, load_report, number


@pytest.fixture
def report() -> Report:
    return Report(
        [
            Measurement("FD-digits64", 0.8, 0.1, (-0.2, 0.4), "jackknife", 355, 1442),
            Measurement("precision-digits64", 0.9, n_fake=355, n_real=1442, better="higher"),
        ],
        [{"name": "digits64", "sha256": "ab", "preprocessing": "uint8/127.5 − 1"}],
        {"kind": "folder", "name": "Bilder/größer", "count": 355, "digest": "12"},
        {"kind": "statistics", "name": "ref.npz", "count": None},
        settings={"fake": "Bilder/größer", "real": "ref.npz", "metrics": ["fid", "prdc"], "steps": None},
        warnings=["few images"],
        environment={"device": "cpu", "versions": {"torch": "2"}},
        run={"wall_s": 1.5},
        samples={"fake": [torch.zeros(1, 8, 8, dtype=torch.uint8)]},
    )


def test_json_round_trip_loses_only_the_samples(report, tmp_path):
    report.save(tmp_path / "r.json")
    loaded = load_report(tmp_path / "r.json")
    assert loaded == report and loaded.samples == {}
    assert loaded.results[0].ci95 == (-0.2, 0.4) and loaded.results[1].ci95 is None
    assert loaded.to_json() == report.to_json() and str(loaded) == str(report)


def test_results_are_found_by_label_and_by_kind(report):
    assert report["FD"] is report["FD-digits64"] is report.results[0]
    assert report["precision"].better == "higher" and report.value == 0.8
    with pytest.raises(KeyError, match="FD, precision"):
        report["recall"]


def test_every_digit_of_a_number_survives(report, tmp_path):
    value = 0.1 + 0.2
    Report([Measurement("FD-x", value, value / 3, (value / 7, 1e-300))], [], report.fake, None).save(
        tmp_path / "r.json"
    )
    result = load_report(tmp_path / "r.json").results[0]
    assert (result.value, result.bias_corrected, result.ci95) == (value, value / 3, (value / 7, 1e-300))


def _set(content, *path_and_value):
    *path, last, value = path_and_value
    for step in path:
        content = content[step]
    content[last] = value


@pytest.mark.parametrize(
    "change",
    [
        ("results", []),
        ("results", "abc"),
        ("results", 0, "value", None),
        ("results", 0, "value", "small"),
        ("results", 0, "ci95", 3),
        ("results", 0, "surprise", 1),
        ("results", 0, "value", "1.5"),
        ("results", 0, "value", True),
        ("results", 0, "ci95", ["a", "b"]),
        ("results", 0, "ci95", [1]),
        ("results", 0, "metric", 3),
        ("results", 0, "better", "up"),
        ("features", 3),
        ("features", [{}]),
        ("fake", None),
        ("fake", {}),
        ("settings", []),
        ("schema", SCHEMA + 1),
    ],
    ids=str,
)
def test_damaged_content_is_refused(report, tmp_path, change):
    content = report.to_dict()
    _set(content, *change)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"r\.json"):
        load_report(tmp_path / "r.json")


@pytest.mark.parametrize("key", ["results", "features", "fake", "real", "settings", "warnings", "environment", "run"])
def test_missing_parts_are_refused(report, tmp_path, key):
    content = report.to_dict()
    del content[key]
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"r\.json"):
        load_report(tmp_path / "r.json")


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[1]", b"null", b'"text"', b'{"schema": 1}', b'{"schema": 2', b"[" * 100_000]
)
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(DataError, match=r"r\.json is not"):
        load_report(tmp_path / "r.json")


def test_unreadable_paths_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(DataError, match="cannot be read"):
            load_report(path)


def test_numbers_keep_three_significant_digits():
    assert [number(v) for v in (0.81234, 25, -0.01, 0.0, 0.00123456, -1.5e-7)] == [
        "0.8123",
        "25.0000",
        "-0.0100",
        "0.0000",
        "0.00123",
        "-1.5e-07",
    ]
    assert number(float("nan")) == "nan"


def test_file_names_that_are_not_utf8_survive(report, tmp_path):
    report.fake["skipped"] = [{"name": "bad\udcff.png", "reason": "the file is empty"}]
    report.save(tmp_path / "r.json")
    assert load_report(tmp_path / "r.json") == report
