"""A report checked by doing it again: same images, same features, same numbers?"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ..core.errors import DataError, UsageError
from .report import Measurement, Report, image_set

_FLOOR = 1e-3  # scale of a number below which differences count as if it were this large


@dataclass(frozen=True)
class Verification:
    """What became of a report when it was repeated.

    Attributes:
        matches: nothing that decides a number differs.
        differences: one sentence each.
        notes: sentences about what differs without deciding a number: versions, devices, names.
        repeated: the new report.
    """

    matches: bool
    differences: list[str]
    notes: list[str]
    repeated: Report = field(repr=False)

    def to_dict(self) -> dict:
        """JSON-able content."""
        return {
            "matches": self.matches,
            "differences": self.differences,
            "notes": self.notes,
            "repeated": self.repeated.to_dict(),
        }

    def __str__(self) -> str:
        verdict = "The report was reproduced." if self.matches else "The report was not reproduced."
        lines = [verdict, *(f"  {line}" for line in self.differences), *(f"  note: {line}" for line in self.notes)]
        return "\n".join(lines)


def verify_report(
    report: Report,
    *,
    fake=None,
    real=None,
    features: str | None = None,
    unverified: bool = False,
    download: bool = False,
    tolerance: float = 1e-6,
    evaluate: Callable[..., Report] | None = None,
) -> Verification:
    """Repeat an evaluation with its recorded settings and compare everything that decides its numbers.

    Args:
        report: what to check.
        fake, real: where that side is now, if not where it was; any side of `run.evaluate_images`.
        features: must name the class of a report that used one ("module:pkg.mod:Class"), since verifying runs its code.
        unverified: accept that the report did not insist on published weights.
        download: allow weights to be fetched; what the report allowed does not count.
        tolerance: largest difference of two numbers, relative to the largest of value and interval limits.
        evaluate: used in place of `run.evaluate_images`.

    Raises:
        UsageError: images that were only in memory and are not given, a class that was not named, or a tolerance
            below 0.
        DataError: settings that this version does not know, or sides that cannot be read any more.
    """
    if not tolerance >= 0:
        raise UsageError(f"The tolerance must be 0 or more, got {tolerance}.")
    settings = _settings(report, {"fake": fake, "real": real})
    if settings.get("verify") is False and not unverified:
        raise UsageError(
            "The report used weights other than the published ones; if that is right, add --unverified-weights."
        )
    settings["download"] = download
    used = str(settings.get("features"))
    if used.startswith("module:") and used != features:
        raise UsageError(
            f"The report used the class {used}, whose code would run; if you trust it, add --features {used}."
        )
    if evaluate is None:
        from .run import evaluate_images as evaluate
    try:
        repeated = evaluate(**settings)
    except DataError as error:
        if "does not exist" in str(error):
            raise DataError(
                f"{error} Relative paths of a report start where it was made; name the sides again with --fake and --real."
            ) from None
        raise
    differences = [
        *_sides(report, repeated),
        *_features(report.features, repeated.features),
        *_results(report, repeated, tolerance),
    ]
    return Verification(not differences, differences, _notes(report, repeated), repeated)


def _settings(report: Report, given: dict) -> dict:
    from .settings import Settings

    known = {"fake", "real", *(entry.name for entry in fields(Settings))}
    unknown = [key for key in report.settings if key not in known]
    if unknown:
        raise DataError(
            f"The report has the setting {unknown[0]!r}, which this version does not know; verify it with the version "
            f"that made it ({_versions(report).get('diffaccel', 'not recorded')})."
        )
    settings = dict(report.settings)
    for key, description in (("fake", report.fake), ("real", report.real)):
        if given[key] is not None:
            settings[key] = given[key]
        elif description is not None and settings.get(key) is None:
            raise UsageError(
                f"The {key} images of the report were in memory ({description.get('name')}); give them to verify it: "
                f"{key}=IMAGES, or --{key} PATH."
            )
    return settings


def _sides(old: Report, new: Report) -> list[str]:
    found = []
    for key in ("fake", "real"):
        before, after = getattr(old, key), getattr(new, key)
        if (before is None) != (after is None):
            found.append(f"the {key} side is {'new' if before is None else 'gone'}")
        elif before is not None and [before.get("count"), image_set(before)] != [after.get("count"), image_set(after)]:
            found.append(f"the {key} images changed: {_images(before)}, now {_images(after)}")
    return found


def _images(side: dict) -> str:
    count = "an unknown number of" if side.get("count") is None else side["count"]
    what = "files" if side.get("kind") in ("folder", "zip") else "images"
    return f"{count} {what} with {f'digest {image_set(side)[:12]}…' if image_set(side) else 'no digest'}"


def _features(old: list[dict], new: list[dict]) -> list[str]:
    before, after = ({identity.get("name"): identity for identity in side} for side in (old, new))
    found = []
    for name in dict.fromkeys([*before, *after]):
        if name not in after or name not in before:
            found.append(f"the features {name} {'were not used before' if name in after else 'are not used any more'}")
            continue
        for key in dict.fromkeys([*before[name], *after[name]]):
            was, now = before[name].get(key), after[name].get(key)
            if was != now:
                found.append(f"the features {name} changed: {key} was {was}, now {now}")
    return found


def _results(old: Report, new: Report, tolerance: float) -> list[str]:
    before, after = ({result.metric: result for result in report.results} for report in (old, new))
    found = []
    for metric in dict.fromkeys([*before, *after]):
        if metric not in after or metric not in before:
            found.append(f"{metric} {'was not in the report' if metric in after else 'is missing now'}")
        else:
            found += _numbers(before[metric], after[metric], tolerance)
    return found


def _numbers(old: Measurement, new: Measurement, tolerance: float) -> list[str]:
    """One sentence per number that moved; a corrected value near 0 is judged on the scale of its interval."""
    numbers = [
        (old.metric, old.value, new.value),
        (f"the bias-corrected {old.metric}", old.bias_corrected, new.bias_corrected),
        (f"the deviation of {old.metric}", old.deviation, new.deviation),
        *(
            (f"the {end} limit of {old.metric}", old.ci95 and old.ci95[index], new.ci95 and new.ci95[index])
            for index, end in enumerate(("lower", "upper"))
        ),
    ]
    scale = max([_FLOOR, *(abs(was) for _, was, _ in numbers if was is not None and math.isfinite(was))])
    return [
        f"{name} was {_digits(was, now)}, now {_digits(now, was)}"
        for name, was, now in numbers
        if not _close(was, now, tolerance * scale)
    ]


def _close(was: float | None, now: float | None, allowed: float) -> bool:
    if was is None or now is None:
        return was is now
    if not (math.isfinite(was) and math.isfinite(now)):
        return was == now or (math.isnan(was) and math.isnan(now))
    return abs(was - now) <= allowed


def _digits(value: float | None, other: float | None) -> str:
    """As few digits, but four, as tell the two numbers apart."""
    if value is None:
        return "not there"
    for digits in range(4, 17):
        text = f"{value:.{digits}g}"
        if other is None or text != f"{other:.{digits}g}":
            return text
    return repr(value)


def _versions(report: Report) -> dict:
    return report.environment.get("versions") or {}


def _notes(old: Report, new: Report) -> list[str]:
    before, after = _versions(old), _versions(new)
    found = [
        f"{name} was {before.get(name, 'not recorded')}, now {after.get(name, 'not recorded')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    for key in ("device", "processes", "deterministic"):
        was, now = old.environment.get(key), new.environment.get(key)
        if was != now:
            found.append(f"{key} was {was}, now {now}")
    for key in ("fake", "real"):
        names = [(side or {}).get("name") for side in (getattr(old, key), getattr(new, key))]
        if None not in names and names[0] != names[1]:
            found.append(f"the {key} side was {names[0]}, now {names[1]}")
    found += [f"new warning: {warning}" for warning in new.warnings if warning not in old.warnings]
    return found + [f"no warning any more: {warning}" for warning in old.warnings if warning not in new.warnings]
