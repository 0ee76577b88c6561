"""Comparing reports: intervals that cover what they claim, verdicts that do not depend on the order, loud refusals."""

import json
import math
from dataclasses import replace

import pytest
import torch

from diffaccel.core.errors import DataError, UsageError
from diffaccel.evaluate.compare import compare_reports, interval_of_difference
from diffaccel.evaluate.report import Measurement, Report

_Z = 1.959963984540054


def _identity(name, **changes):
    return {"name": name, "dim": 64, "sha256": "ab" * 32, "preprocessing": "none", "dtype": "float32", **changes}


def _report(*results, fake="f1", real="r1", features=None, real_kind="folder", **settings) -> Report:
    names = dict.fromkeys(result.metric.partition("-")[2] for result in results)
    return Report(
        list(results),
        [_identity(name) for name in names] if features is None else features,
        {"kind": "folder", "name": "a", "count": 100, "digest": fake},
        real and {"kind": real_kind, "name": "b", "count": 100, "digest": real},
        settings=settings,
    )


def _fd(corrected, half=0.1, value=9.0, metric="FD-x", n=100, better="lower"):
    return Measurement(metric, value, corrected, (corrected - half, corrected + half), "m", n, 100, better)


def _one(first, second, **changes):
    comparison = compare_reports(_report(first, fake="f1", **changes), _report(second, fake="f2", **changes))
    assert len(comparison.rows) == 1
    return comparison.rows[0]


def test_half_widths_add_in_quadrature():
    row = _one(_fd(1.0, 0.3), _fd(3.0, 0.4))
    assert row.difference == 2.0 and row.basis == "bias-corrected"
    assert row.ci95 == pytest.approx((1.5, 2.5), abs=1e-15)
    assert row.verdict == "first is better"


def test_interval_covers_the_difference_of_normal_estimates():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([0.3, 0.7]) + 1
    covered = 0
    for first, second in draws.tolist():
        interval = interval_of_difference(
            first, (first - 0.3 * _Z, first + 0.3 * _Z), second, (second - 0.7 * _Z, second + 0.7 * _Z)
        )
        covered += interval[0] <= 0 <= interval[1]
    assert covered / len(draws) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / len(draws)))


def test_interval_covers_the_difference_of_shares_near_the_edge():
    """Unsymmetric (Wilson 1927) intervals of small shares: symmetrised ones would be off at both ends."""

    def wilson(share, n):
        middle, scale = share + _Z**2 / (2 * n), 1 + _Z**2 / n
        half = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
        return (middle - half) / scale, (middle + half) / scale

    generator, n, p = torch.Generator().manual_seed(0), 60, torch.tensor([0.03, 0.12], dtype=torch.float64)
    draws = (torch.rand(4000, n, 2, generator=generator, dtype=torch.float64) < p).double().mean(1)
    missed = [0, 0]
    for first, second in draws.tolist():
        low, high = interval_of_difference(first, wilson(first, n), second, wilson(second, n))
        assert -1 <= low <= second - first <= high <= 1
        missed[0] += low > 0.09
        missed[1] += high < 0.09
    assert 0.93 <= 1 - sum(missed) / len(draws) <= 0.98 and min(missed) > 0


@pytest.mark.parametrize(("miss", "factor"), [((1.0, 1.0), 0.0), ((1.0, -1.0), math.sqrt(2))])
def test_what_a_shared_reference_does_to_the_interval(miss, factor):
    """|m − r|² of two known means m against one estimated r: errors cancel or add, as the note says."""
    generator = torch.Generator().manual_seed(0)
    error = 0.01 * torch.randn(4000, generator=generator, dtype=torch.float64)
    distances = [(m - error) ** 2 for m in miss]
    quadrature = math.sqrt(sum(float(d.var()) for d in distances))
    assert float((distances[1] - distances[0]).std()) / quadrature == pytest.approx(factor, abs=0.01)
    notes = compare_reports(_report(_fd(1.0)), _report(_fd(2.0), fake="f2")).notes
    assert any("same real images" in note and "√2" in note for note in notes)


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("second", [1.0, 1.14, 1.15, 0.85])
def test_exchanging_the_reports_flips_signs_and_verdicts(better, second):
    reports = _report(_fd(1.0, better=better)), _report(_fd(second, better=better), fake="f2")
    there, back = compare_reports(*reports).rows[0], compare_reports(*reversed(reports)).rows[0]
    assert back.difference == -there.difference
    assert back.ci95 == (-there.ci95[1], -there.ci95[0])
    flipped = {"first is better": "second is better", "second is better": "first is better"}
    assert back.verdict == flipped.get(there.verdict, there.verdict)
    half = 0.1 * math.sqrt(2)
    if abs(second - 1) < half:
        assert there.verdict == "cannot tell apart"
    else:
        assert there.verdict == f"{'first' if (second > 1) == (better == 'lower') else 'second'} is better"


def test_without_an_interval_there_is_no_verdict():
    bare = Measurement("FD-x", 5.0, n_fake=100, n_real=100)
    row = _one(bare, Measurement("FD-x", 50.0, n_fake=100, n_real=100))
    assert (row.basis, row.difference, row.ci95, row.verdict) == ("plug-in", 45.0, None, "no interval")
    # One corrected, one not: only the plug-in values mean the same.
    row = _one(bare, _fd(1.0, value=7.0))
    assert (row.basis, row.difference, row.verdict) == ("plug-in", 2.0, "no interval")
    assert _one(_fd(1.0), replace(_fd(2.0), bias_corrected=math.nan)).verdict == "no interval"
    spread = Measurement("IS-x", 9.0, deviation=0.1, method="deviation of 10 parts, not a confidence interval")
    assert _one(spread, replace(spread, value=1.0)).verdict == "no interval"


def test_values_without_correction_are_compared_with_a_word():
    share = Measurement("recall-x", 0.5, None, (0.45, 0.56), "m", 100, 100, "higher")
    other = replace(share, value=0.9, ci95=(0.85, 0.93), n_fake=200)
    comparison = compare_reports(_report(share), _report(other, fake="f2"))
    assert comparison.rows[0].verdict == "second is better" and comparison.rows[0].basis == "plug-in"
    assert any("want of a bias correction: recall-x" in note for note in comparison.notes)
    assert any(note.startswith("Warning: the fake sides have 100 and 200 images") for note in comparison.notes)


def test_unbiased_metrics_and_corrected_values_may_have_unequal_numbers():
    kid = Measurement("KID-x", 0.1, None, (0.0, 0.2), "m", 100, 100)
    pairs = [(kid, replace(kid, n_fake=200)), (_fd(1.0, n=100), _fd(1.0, n=200))]
    for first, second in pairs:
        notes = compare_reports(_report(first), _report(second, fake="f2")).notes
        assert not any("Warning" in note or "plug-in" in note for note in notes)


def test_an_interval_without_the_draw_of_the_fakes_gives_no_verdict():
    """Recall and coverage of two draws of one generator differ by more than their intervals, which vary the reals."""
    share = Measurement(
        "recall-x", 0.5, None, (0.45, 0.56), "Wilson interval, the fake side as given", 100, 100, "higher"
    )
    comparison = compare_reports(_report(share), _report(replace(share, value=0.9, ci95=(0.85, 0.93)), fake="f2"))
    assert comparison.rows[0].verdict == "no interval" and comparison.rows[0].ci95 is None
    assert any(note.startswith("No verdict on recall-x") for note in comparison.notes)


def test_real_reports_of_one_set_against_itself_and_another():
    from diffaccel.evaluate.run import evaluate_images
    from diffaccel.models.data import load_digits

    images = load_digits("heldout")[0]
    first, second, dark = (
        evaluate_images(side, "digits", ("fid", "prdc")) for side in (images[::2], images[1::2], images // 2)
    )
    verdicts = {row.metric.partition("-")[0]: row.verdict for row in compare_reports(first, second).rows}
    assert verdicts["FD"] == verdicts["precision"] == "cannot tell apart"
    assert verdicts["recall"] == verdicts["coverage"] == "no interval"
    comparison = compare_reports(first, dark)
    assert comparison.rows[0].metric == "FD-digits64" and comparison.rows[0].verdict == "first is better"
    assert any("same real images" in note for note in comparison.notes)


def test_rows_are_the_common_metrics():
    first = _report(_fd(1.0), _fd(1.0, metric="KID-x"), _fd(1.0, metric="FD-y"))
    second = _report(_fd(1.0, metric="FD-y"), _fd(1.0, metric="FD-x"), _fd(1.0, metric="CMMD-z"))
    assert [row.metric for row in compare_reports(first, second).rows] == ["FD-x", "FD-y"]
    with pytest.raises(UsageError, match=r"old\.json has FD-x and new\.json has FD-random-conv: no metric"):
        compare_reports(_report(_fd(1.0)), _report(_fd(1.0, metric="FD-random-conv")), ("old.json", "new.json"))


def test_a_score_of_the_real_images_alone_is_not_compared():
    score = Measurement("IS-x", 9.0, n_fake=100, better="higher")
    real = Measurement("IS of real images-x", 9.5, n_real=100, better="higher")
    assert [row.metric for row in compare_reports(_report(score, real), _report(score, real)).rows] == ["IS-x"]


@pytest.mark.parametrize("change", [{"sha256": "cd" * 32}, {"preprocessing": "bicubic"}])
def test_other_features_are_refused(change):
    first, second = _report(_fd(1.0)), _report(_fd(1.0), features=[_identity("x", **change)])
    (key, value) = next(iter(change.items()))
    with pytest.raises(DataError, match=rf"FD-x of A .*{key} {_identity('x')[key]}.* B with {value}"):
        compare_reports(first, second, ("A", "B"))
    # Other features of a metric that is not compared do not matter.
    unused = [_identity("x"), _identity("y", **change)]
    assert compare_reports(first, _report(_fd(1.0), features=unused)).rows
    with pytest.raises(DataError, match="B does not record which features FD-x"):
        compare_reports(first, _report(_fd(1.0), features=[]), ("A", "B"))


def test_notes_about_the_sides():
    def notes(first, second):
        return "\n".join(compare_reports(first, second).notes)

    base = _report(_fd(1.0))
    assert "Warning: the real sides differ" in notes(base, _report(_fd(1.0), fake="f2", real="r2"))
    unknown = _report(_fd(1.0), fake="f2")
    assert "no digest" in notes(base, replace(unknown, real={"kind": "statistics", "name": "ref.npz"}))
    assert "same images" in notes(base, _report(_fd(1.0)))
    assert "same images" not in notes(base, _report(_fd(1.0), fake="f2"))
    # The digest of a statistics file is that of the images it was made from; on both sides, its error is not counted.
    statistics = {"kind": "statistics", "name": "ref.npz", "count": 100, "source": {"digest": "r1"}}
    exact = replace(base, real=statistics), replace(unknown, real=statistics)
    assert "real" not in notes(*exact) and "same real images" in notes(exact[0], unknown)


def test_settings_that_change_the_meaning_are_named():
    notes = compare_reports(_report(_fd(1.0), resize=64, k=None), _report(_fd(1.0), fake="f2", k=5)).notes
    assert [note for note in notes if "Warning" in note] == [
        "Warning: the reports were made with resize 64 and None, which changes numbers."
    ]
    mixed = _report(_fd(1.0), fake="f2", features=[_identity("x", dtype="bfloat16")])
    assert any("float32 and bfloat16" in note for note in compare_reports(_report(_fd(1.0)), mixed).notes)


def test_text_is_aligned_and_json_is_complete():
    reports = _report(_fd(1.0), _fd(123.0, metric="KID-x")), _report(_fd(2.0), _fd(1.0, metric="KID-x"), fake="f2")
    comparison = compare_reports(*reports, ("runs/a.json", "runs/b.json"))
    lines = str(comparison).splitlines()
    assert lines[:2] == ["first:  runs/a.json", "second: runs/b.json"]
    header, *rows = lines[3:6]
    for column in ("compared", "verdict", "95 % interval"):
        at = header.index(column)
        assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert "+1.0000" in rows[0] and "first is better" in rows[0] and "-122.0000" in rows[1]
    content = json.loads(json.dumps(comparison.to_dict()))
    assert content["names"] == ["runs/a.json", "runs/b.json"] and content["notes"] == comparison.notes
    assert content["rows"][0]["ci95"] == list(comparison.rows[0].ci95)
    assert "first:" not in str(compare_reports(*reports))
