"""Doing a report again: what changed is named, what only differs is noted, what cannot be repeated is refused."""

import copy
from dataclasses import replace

import pytest

from diffaccel.core.errors import DataError, UsageError
from diffaccel.core.images import save_png
from diffaccel.evaluate.report import Measurement, Report, load_report
from diffaccel.evaluate.verify import verify_report
from diffaccel.models.data import load_digits


def _report(**changes) -> Report:
    report = Report(
        [Measurement("FD-digits64", 0.8123, 0.001, (-0.2, 0.202), "jackknife", 355, 1442)],
        [{"name": "digits64", "dim": 64, "sha256": "ab", "preprocessing": "none", "dtype": "float32"}],
        {"kind": "folder", "name": "samples", "count": 355, "digest": "12" * 32},
        {"kind": "dataset", "name": "digits:train", "count": 1442, "digest": "9f" * 32},
        settings={"fake": "samples", "real": "digits", "metrics": ["fid"], "features": "auto", "num": 2000},
        environment={"device": "cpu", "versions": {"diffaccel": "0.1.0", "torch": "2.6"}},
    )
    return replace(report, **changes)


def _result(**changes) -> list[Measurement]:
    return [replace(_report().results[0], **changes)]


def _verify(repeated: Report, report: Report | None = None, **options):
    return verify_report(report or _report(), evaluate=lambda **settings: repeated, **options)


def test_the_recorded_settings_are_repeated_with_replaced_paths():
    asked = []

    def evaluate(**settings):
        asked.append(settings)
        return _report()

    report = _report()
    before = copy.deepcopy(report.settings)
    assert verify_report(report, evaluate=evaluate).matches
    assert verify_report(report, fake="elsewhere", evaluate=evaluate).matches
    before["download"] = False  # whatever the report allowed
    assert asked == [before, {**before, "fake": "elsewhere"}]


def test_a_repetition_matches_without_differences():
    verification = _verify(_report())
    assert (verification.matches, verification.differences, verification.notes) == (True, [], [])
    assert str(verification) == "The report was reproduced."
    assert verification.to_dict()["repeated"] == _report().to_dict()


def test_changed_images_are_named():
    repeated = _report(fake={"kind": "folder", "name": "samples", "count": 354, "digest": "9f" * 32})
    verification = _verify(repeated)
    assert verification.differences == [
        "the fake images changed: 355 files with digest 121212121212…, now 354 files with digest 9f9f9f9f9f9f…"
    ]
    assert not verification.matches and "not reproduced" in str(verification)
    statistics = {"kind": "statistics", "name": "r.npz", "count": None, "source": {"digest": "9f" * 32}}
    assert _verify(_report(real=statistics), _report(real=statistics)).matches
    assert "the real side is gone" in _verify(_report(real=None)).differences


def test_changed_numbers_are_named():
    assert _verify(_report(results=_result(value=0.813))).differences == ["FD-digits64 was 0.8123, now 0.813"]
    assert _verify(_report(results=_result(value=0.81230123))).differences == ["FD-digits64 was 0.8123, now 0.812301"]
    found = _verify(_report(results=_result(bias_corrected=None, ci95=(-0.2, 0.21)))).differences
    assert found == [
        "the bias-corrected FD-digits64 was 0.001, now not there",
        "the upper limit of FD-digits64 was 0.202, now 0.21",
    ]
    assert len(_verify(_report(results=_result(ci95=None))).differences) == 2
    assert len(_verify(_report(results=_result(value=float("nan")))).differences) == 1
    nan = _report(results=_result(value=float("nan")))
    assert _verify(nan, nan).matches


def test_tolerance_is_relative_to_the_largest_number_of_a_metric():
    """A corrected value of 0.001 ± 0.2 is reproduced when it is right on the scale of its interval."""
    assert _verify(_report(results=_result(bias_corrected=0.001 + 7e-7))).matches
    assert not _verify(_report(results=_result(bias_corrected=0.001 + 9e-7))).matches
    assert not _verify(_report(results=_result(value=0.8123 + 7e-7)), tolerance=0).matches
    assert _verify(_report(results=_result(value=0.8))).matches is False
    assert _verify(_report(results=_result(value=0.8)), tolerance=0.02).matches
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="tolerance"):
            _verify(_report(), tolerance=tolerance)


def test_missing_and_additional_metrics_are_named():
    both = [*_result(), Measurement("KID-digits64", 0.1)]
    assert _verify(_report(), _report(results=both)).differences == ["KID-digits64 is missing now"]
    assert _verify(_report(results=both)).differences == ["KID-digits64 was not in the report"]


def test_changed_features_are_named():
    identity = _report().features[0]
    changed = _report(features=[{**identity, "sha256": "cd"}])
    assert _verify(changed).differences == ["the features digits64 changed: sha256 was ab, now cd"]
    other = _verify(_report(features=[{**identity, "name": "random-conv"}])).differences
    assert len(other) == 2 and "digits64 are not used any more" in other[0]


def test_versions_devices_and_warnings_are_notes():
    environment = {"device": "cuda", "versions": {"diffaccel": "0.1.0", "torch": "2.7"}}
    verification = _verify(_report(environment=environment, warnings=["few images"]))
    assert verification.matches
    assert verification.notes == ["torch was 2.6, now 2.7", "device was cpu, now cuda", "new warning: few images"]


def test_images_that_were_in_memory_must_be_given():
    settings = {**_report().settings, "fake": None}
    report = _report(
        settings=settings, fake={"kind": "tensor", "name": "the tensor", "count": 355, "digest": "12" * 32}
    )
    with pytest.raises(UsageError, match=r"fake images of the report were in memory.*--fake"):
        _verify(_report(), report)
    assert _verify(report, report, fake="samples").matches
    # A metric of one side has no real images to give.
    one_sided = _report(settings={**_report().settings, "real": None}, real=None)
    assert _verify(one_sided, one_sided).matches


def test_code_of_a_report_runs_only_when_it_is_named():
    report = _report(settings={**_report().settings, "features": "module:their.code:Net"})
    with pytest.raises(UsageError, match=r"--features module:their\.code:Net"):
        _verify(report, report)
    assert _verify(report, report, features="module:their.code:Net").matches


def test_settings_of_a_newer_version_are_refused():
    with pytest.raises(DataError, match=r"'wavelets'.*0\.1\.0"):
        _verify(_report(), _report(settings={**_report().settings, "wavelets": 3}))


def _folder(path, images):
    path.mkdir()
    for index, image in enumerate(images):
        save_png(image, path / f"{index:03d}.png")
    return path


def test_a_real_report_through_its_file(tmp_path):
    from diffaccel.evaluate.run import evaluate_images

    folder = _folder(tmp_path / "a", load_digits("heldout")[0][:60])
    evaluate_images(str(folder), "digits", ("fid",)).save(tmp_path / "r.json")
    report = load_report(tmp_path / "r.json")
    assert verify_report(report).matches
    (folder / "007.png").write_bytes((folder / "008.png").read_bytes())
    verification = verify_report(report)
    assert "the fake images changed: 60 files" in verification.differences[0]
    assert any(line.startswith("FD-digits64 was") for line in verification.differences)
    folder.rename(tmp_path / "b")
    with pytest.raises(DataError):
        verify_report(report)
    assert verify_report(report, fake=str(tmp_path / "b")).differences == verification.differences
