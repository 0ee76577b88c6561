"""Two reports against each other: which generator is better, and whether the samples suffice to say so."""

import math
from dataclasses import asdict, dataclass

from ..core.errors import DataError, UsageError
from .report import Measurement, Report, image_set, number

# Their mean does not, or hardly, depend on N.
_UNBIASED = ("KID", "KID subsets", "CMMD", "CLIPScore", "FD∞", "saturation", "contrast", "clipped")
_ONE_SIDED = ("IS", "CLIPScore")
# Settings that change what a label means, with what None stands for.
_CONVENTIONS = {"resize": None, "k": 5, "splits": 10, "kid_subset_size": 1000}


@dataclass(frozen=True)
class Difference:
    """One metric of both reports.

    Attributes:
        metric: label with the features in it.
        better: "lower", "higher" or "closer" (to that of real images).
        basis: what is compared: "bias-corrected" or "plug-in" values.
        first, second: the compared values.
        difference: second − first.
        ci95: 95 % interval of the difference, None where a report has none, or one without the draw of the fakes.
        verdict: "first is better", "second is better", "cannot tell apart", "no interval", or "same images" where both
            fake sides are, or "no reference" where closer is better and the reports do not have one number to be close to.
    """

    metric: str
    better: str
    basis: str
    first: float
    second: float
    difference: float
    ci95: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What two reports say about their fake sides.

    Attributes:
        names: what to call the reports.
        rows: one `Difference` per metric that both have, in the order of the first.
        notes: sentences about what weakens the comparison; "Warning: …" for those that can turn it over.
    """

    names: tuple[str, str]
    rows: list[Difference]
    notes: list[str]

    def to_dict(self) -> dict:
        """JSON-able content."""
        rows = [asdict(row) | {"ci95": list(row.ci95) if row.ci95 else None} for row in self.rows]
        return {"names": list(self.names), "rows": rows, "notes": self.notes}

    def __str__(self) -> str:
        header = ["metric", "compared", "first", "second", "second − first", "95 % interval", "verdict"]
        cells = [header, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = (2, 3, 4)
        lines = [f"first:  {self.names[0]}", f"second: {self.names[1]}", ""] if self.names != DEFAULT_NAMES else []
        for line in cells:
            padded = (
                cell.rjust(width) if index in numeric else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            lines.append("  ".join(padded).rstrip())
        return "\n".join([*lines, "", *self.notes] if self.notes else lines)


DEFAULT_NAMES = ("first", "second")


def compare_reports(first: Report, second: Report, names: tuple[str, str] = DEFAULT_NAMES) -> Comparison:
    """Compare the fake sides of two reports by every metric that both have.

    Bias-corrected values are compared where both reports have them, else the plug-in values. Exchanging the reports
    changes the signs and the verdicts and nothing else.

    Raises:
        UsageError: no metric in common.
        DataError: a metric was computed with different features, i.e. another extractor, weights or preprocessing.
    """
    names = tuple(map(str, names))
    theirs = {result.metric: result for result in second.results if not _of_real_images(result)}
    pairs = [(r, theirs[r.metric]) for r in first.results if r.metric in theirs and not _of_real_images(r)]
    if not pairs:
        had = [", ".join(result.metric for result in report.results) for report in (first, second)]
        raise UsageError(
            f"{names[0]} has {had[0]} and {names[1]} has {had[1]}: no metric is in both; evaluate both images with the "
            "same metrics and features."
        )
    for result, _ in pairs:
        _same_features(result.metric, first, second, names)
    rows = [_difference(*pair, _same_fakes(first, second), _aim(pair[0], first, second)) for pair in pairs]
    return Comparison(names, rows, _notes(first, second, pairs, rows))


def confidence_interval(result: Measurement) -> tuple[float, float] | None:
    """The 95 % interval of a result; None where there is none."""
    return result.ci95 if result.ci95 is not None and all(map(math.isfinite, result.ci95)) else None


def interval_of_difference(
    first: float, first_ci: tuple[float, float], second: float, second_ci: tuple[float, float]
) -> tuple[float, float]:
    """95 % interval of second − first for independent estimates, from the intervals of each.

    The distances from an estimate to its limits are added in quadrature, side by side, so that unsymmetric intervals
    of shares are used as they are (Zou & Donner 2008); for symmetric ones it is the quadrature of half-widths.
    """
    down = math.sqrt(_square(first_ci[1] - first) + _square(second - second_ci[0]))
    up = math.sqrt(_square(first - first_ci[0]) + _square(second_ci[1] - second))
    return second - first - down, second - first + up


def _square(distance: float) -> float:
    return max(distance, 0.0) ** 2


def _of_real_images(result: Measurement) -> bool:
    """A score of the reference alone says nothing about the generators."""
    return result.n_fake is None and result.n_real is not None and result.kind.endswith("of real images")


def _fake_as_given(result: Measurement) -> bool:
    """Whether the interval leaves out the draw of the fake images, which is what a comparison must be sure against."""
    return "the fake side" in (result.method or "")


def _same_features(metric: str, first: Report, second: Report, names: tuple[str, str]) -> None:
    label = metric.partition("-")[2]
    found = [next((f for f in report.features if f.get("name") == label), None) for report in (first, second)]
    if None in found:
        lacking = names[found.index(None)]
        raise DataError(f"{lacking} does not record which features {metric} was computed with; evaluate again.")
    for key in ("sha256", "preprocessing"):
        mine, their = (identity.get(key) for identity in found)
        if mine != their:
            raise DataError(
                f"{metric} of {names[0]} was computed with features of {key} {mine}, that of {names[1]} with {their}: "
                "the numbers do not compare; evaluate both with the same features."
            )


def _same_fakes(first: Report, second: Report) -> bool:
    return image_set(first.fake) is not None and image_set(first.fake) == image_set(second.fake)


def _aim(result: Measurement, first: Report, second: Report) -> Measurement | None:
    """The result of the real images, where both reports have it of the same ones."""
    label = result.metric.replace("-", " of real images-", 1)
    found = [next((r for r in report.results if r.metric == label), None) for report in (first, second)]
    same = image_set(first.real) is not None and image_set(first.real) == image_set(second.real)
    return found[0] if same and None not in found else None


def _difference(first: Measurement, second: Measurement, same_fakes: bool, aim: Measurement | None) -> Difference:
    corrected = first.bias_corrected is not None and second.bias_corrected is not None
    values = [result.bias_corrected if corrected else result.value for result in (first, second)]
    intervals = [None if _fake_as_given(result) else confidence_interval(result) for result in (first, second)]
    # Where only one is corrected its interval is centred on the corrected value and does not belong to the plug-in one.
    mixed = (first.bias_corrected is None) != (second.bias_corrected is None)
    difference = values[1] - values[0]
    interval, verdict = None, "same images" if same_fakes else "no interval"
    if not same_fakes and None not in intervals and not mixed and math.isfinite(difference):
        interval = interval_of_difference(values[0], intervals[0], values[1], intervals[1])
        verdict = (
            _nearer(first, second, aim, interval) if first.better == "closer" else _verdict(interval, first.better)
        )
    basis = "bias-corrected" if corrected else "plug-in"
    return Difference(first.metric, first.better, basis, *values, difference, interval, verdict)


def _verdict(interval: tuple[float, float], better: str) -> str:
    low, high = interval
    if low <= 0 <= high:
        return "cannot tell apart"
    return "second is better" if (high < 0) == (better == "lower") else "first is better"


def _nearer(first: Measurement, second: Measurement, aim: Measurement | None, interval: tuple[float, float]) -> str:
    """Which value is nearer to the aim: the one on its side of the midpoint of both.

    Both the difference of the values and that of aim and midpoint must be sure; errors of a verdict are then at most
    as frequent as those of the less sure of the two.
    """
    if aim is None or confidence_interval(aim) is None:
        return "no reference"
    middle = (first.value + second.value) / 2
    half = (interval[1] - interval[0]) / 4
    low, high = interval_of_difference(middle, (middle - half, middle + half), aim.value, aim.ci95)
    if low <= 0 <= high:
        return "cannot tell apart"
    return _verdict(interval, "higher" if low > 0 else "lower")


def _notes(first: Report, second: Report, pairs: list, rows: list[Difference]) -> list[str]:
    notes = _about_real_sides(first, second, pairs, rows)
    given = [result.metric for result, other in pairs if _fake_as_given(result) or _fake_as_given(other)]
    if given:
        notes.append(
            f"No verdict on {', '.join(given)}: the intervals take the fake images as given, and two draws of one "
            "generator differ by more than these say."
        )
    aimless = [row.metric for row in rows if row.verdict == "no reference"]
    if aimless:
        notes.append(
            f"No verdict on {', '.join(aimless)}: neither lower nor higher is better, and the reports have no number of "
            "the same real images to be close to; evaluate both against one set of real images."
        )
    biased = [
        (result, other)
        for (result, other), row in zip(pairs, rows, strict=True)
        if row.basis == "plug-in" and result.kind not in _UNBIASED
    ]
    if biased:
        labels = ", ".join(result.metric for result, _ in biased)
        notes.append(f"Compared are plug-in values, for want of a bias correction: {labels}.")
    unequal = [pair for pair in biased if None not in (n := [r.n_fake for r in pair]) and n[0] != n[1]]
    if unequal:
        labels, counts = ", ".join(pair[0].metric for pair in unequal), [result.n_fake for result in unequal[0]]
        notes.append(
            f"Warning: the fake sides have {counts[0]} and {counts[1]} images, and plug-in values depend on that "
            f"({labels}); compare equal numbers."
        )
    for key, default in _CONVENTIONS.items():
        used = [default if (s := report.settings.get(key)) is None else s for report in (first, second)]
        if used[0] != used[1]:
            notes.append(f"Warning: the reports were made with {key} {used[0]} and {used[1]}, which changes numbers.")
    dtypes = [{f.get("name"): f.get("dtype") for f in report.features} for report in (first, second)]
    notes += [
        f"Features {name} were computed in {dtype} and {dtypes[1][name]}, which changes the last digits."
        for name, dtype in dtypes[0].items()
        if dtypes[1].get(name, dtype) != dtype
    ]
    if _same_fakes(first, second):
        notes.append("Both fake sides are the same images, so every difference comes from how they were evaluated.")
    return notes


def _about_real_sides(first: Report, second: Report, pairs: list, rows: list[Difference]) -> list[str]:
    if first.real is None or second.real is None or all(mine.kind in _ONE_SIDED for mine, _ in pairs):
        return []
    digests = image_set(first.real), image_set(second.real)
    if None in digests:
        return ["Warning: a real side has no digest, so whether both reports used the same one is not known."]
    if digests[0] != digests[1]:
        return [
            f"Warning: the real sides differ ({first.real.get('name')}, digest {digests[0][:12]}…, and "
            f"{second.real.get('name')}, digest {digests[1][:12]}…): the difference is not one between generators."
        ]
    exact = all(side.get("kind") == "statistics" and not side.get("vectors") for side in (first.real, second.real))
    if exact or all(row.ci95 is None or row.better == "closer" for row in rows):  # of the fake images alone
        return []
    return [
        "Both used the same real images, whose sampling error intervals with it count twice: where both miss the "
        "real images in the same way it cancels and the intervals are too wide; where they miss in opposite ways it "
        "adds up and they can be too narrow, at most by a factor of √2."
    ]


def _cells(row: Difference) -> list[str]:
    interval = "–" if row.ci95 is None else " to ".join(_signed(limit) for limit in row.ci95)
    arrow = {"lower": "↓", "higher": "↑", "closer": "◎"}[row.better]
    values = [number(row.first), number(row.second), _signed(row.difference)]
    return [f"{row.metric} {arrow}", row.basis, *values, interval, row.verdict]


def _signed(value: float) -> str:
    return number(value) if value <= 0 or math.isnan(value) else f"+{number(value)}"
