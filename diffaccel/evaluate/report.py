"""The result of an evaluation: one record for people, JSON and tests."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import DataError
from ..core.files import write_atomic
from ..core.versions import library_versions

if TYPE_CHECKING:
    import torch

SCHEMA = 2
_PARTS = {
    "features": list,
    "fake": dict,
    "real": dict | None,
    "settings": dict,
    "warnings": list,
    "environment": dict,
    "run": dict,
}
PACKAGES = ("diffaccel", "torch", "torchmetrics", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Measurement:
    """One number with its uncertainty.

    Attributes:
        metric: label with the features in it, e.g. "FD-digits64".
        value: the number to compare with publications; for a Fréchet distance biased upwards by about 1/N.
        bias_corrected: estimate without the bias of finite samples, None where there is none.
        ci95: 95 % interval, None where there is none.
        method: how the interval or deviation was made.
        n_fake, n_real: images per side; None for a side that is not used or a statistics file that does not tell.
        better: "lower", "higher", or "closer": to that of real images, whose own result says "of real images".
        deviation: standard deviation over subsets, where that is the custom; not a confidence interval.
    """

    metric: str
    value: float
    bias_corrected: float | None = None
    ci95: tuple[float, float] | None = None
    method: str | None = None
    n_fake: int | None = None
    n_real: int | None = None
    better: str = "lower"
    deviation: float | None = None

    @property
    def kind(self) -> str:
        """The label without the features: "FD", "KID", "precision", …"""
        return self.metric.partition("-")[0]

    def to_dict(self) -> dict:
        """JSON-able content."""
        return asdict(self) | {"ci95": list(self.ci95) if self.ci95 else None}

    def __str__(self) -> str:
        line = f"{self.metric}: {number(self.value)}"
        if self.deviation is not None:
            line += f" ± {number(self.deviation)} ({self.method})"
        if not self.ci95:
            return line
        corrected = f"bias-corrected {number(self.bias_corrected)}, " if self.bias_corrected is not None else ""
        low, high = map(number, self.ci95)
        return f"{line}\n  {corrected}95 % interval {low} to {high} ({self.method})"


@dataclass(frozen=True)
class Report:
    """Everything an evaluation found, with all that is needed to judge and repeat it.

    ``value``, ``bias_corrected``, ``ci95``, ``metric``, ``n_fake`` and ``n_real`` are those of the first result.

    Attributes:
        results: `Measurement`s in the order of the metrics.
        features: identities of the extractors (name, dim, sha256, preprocessing, dtype).
        fake, real: description of the sides (kind, name, count, digest, …); real is None for metrics of one side.
        settings: all that `run.evaluate_images` was told, so that `verify` can repeat it.
        warnings: sentences about what weakens the numbers.
        environment: device, whether it computes deterministically, and versions.
        run: command, start, duration, images per second, peak memory: all that may differ between equal evaluations.
        samples: the first images of each side, lists of uint8 (C, H, W); not part of the JSON.
    """

    results: list[Measurement]
    features: list[dict]
    fake: dict
    real: dict | None
    settings: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    environment: dict = field(default_factory=lambda: {"versions": library_versions(PACKAGES)})
    run: dict = field(default_factory=dict)
    samples: "dict[str, list[torch.Tensor]]" = field(default_factory=dict, repr=False, compare=False)

    def __getattr__(self, name: str):
        if name in ("metric", "value", "bias_corrected", "ci95", "n_fake", "n_real"):
            return getattr(self.results[0], name)
        raise AttributeError(name)

    def __getitem__(self, kind: str) -> Measurement:
        """The result whose label, or label without the features, is ``kind``: report["FD"], report["recall"]."""
        for result in self.results:
            if kind in (result.metric, result.kind):
                return result
        raise KeyError(f"{kind}; there are {', '.join(result.kind for result in self.results)}")

    def to_dict(self) -> dict:
        """JSON-able content; equal evaluations give equal content but for "run"."""
        return {
            "schema": SCHEMA,
            "results": [result.to_dict() for result in self.results],
            "features": self.features,
            "fake": self.fake,
            "real": self.real,
            "settings": self.settings,
            "warnings": self.warnings,
            "environment": self.environment,
            "run": self.run,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        # File names that are not UTF-8 reach Python as lone surrogates; JSON can hold them escaped.
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()

    def save(self, path) -> None:
        """Write `to_json` to a file, atomically."""
        write_atomic(path, self.to_json() + "\n")

    def __str__(self) -> str:
        lines = [str(result) for result in self.results]
        lines.append(f"  fake {_side(self.fake)}")
        if self.real is not None:
            lines.append(f"  real {_side(self.real)}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def load_report(path) -> Report:
    """Read a report that `Report.save` wrote.

    Raises:
        DataError: unreadable, not JSON, of another schema, or with numbers that are none.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a report: {error}.") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or not content.get("results"):
        raise DataError(f"{path} is not an evaluation report of schema {SCHEMA} (found schema {schema}).")
    try:
        return report_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}.") from None


def report_of(content: dict) -> Report:
    """The report with the content of `Report.to_dict`; KeyError, TypeError or ValueError if it is none."""
    results = [Measurement(**{**r, "ci95": tuple(r["ci95"]) if r["ci95"] else None}) for r in content["results"]]
    parts = {key: content[key] for key in _PARTS}
    _check(results, parts)
    return Report(results, **parts)


def image_set(side: dict | None) -> str | None:
    """Identity of the images of a side, as they entered; of a statistics file, of the images it was made from."""
    side = side or {}
    source = side.get("source") or {}
    digest, resized = side.get("digest") or source.get("digest"), side.get("resized") or source.get("resized")
    return f"{digest}@{resized}" if digest and resized else digest


def same_images(sides: dict[str, dict]) -> bool:
    """Whether both sides hold the same images."""
    sets = [image_set(side) for side in sides.values()]
    return len(sets) == 2 and sets[0] is not None and sets[0] == sets[1]


def _check(results: list[Measurement], parts: dict) -> None:
    """Refuse what would only fail later, where no file name is known any more."""
    for result in results:
        low, high = result.ci95 or (0.0, 0.0)  # a ValueError if these are not two
        for value in (result.value, result.bias_corrected or 0.0, result.deviation or 0.0, low, high):
            if type(value) not in (int, float):
                raise TypeError(f"{value!r} is not a number")
        if not isinstance(result.metric, str) or result.better not in ("lower", "higher", "closer"):
            raise ValueError(f"{result.metric!r} with {result.better!r} is not a result")
    for key, kind in _PARTS.items():
        if not isinstance(parts[key], kind):
            raise TypeError(f"{key} is a {type(parts[key]).__name__}")
    for side in (parts["fake"], parts["real"] or parts["fake"]):
        side["name"], side["kind"]
        if not isinstance(side.get("digest"), str | None) or not isinstance(side.get("source"), dict | None):
            raise TypeError("the description of a side is none")
    if not isinstance(parts["environment"].get("versions", {}), dict):
        raise TypeError("versions are none")
    for identity in parts["features"]:
        identity["name"]


def number(value: float) -> str:
    """Four decimals, or three significant digits below 0.01."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 or not math.isfinite(value) else f"{value:.3g}"


def _side(details: dict) -> str:
    count = details.get("count")
    size = "unknown number of images" if count is None else f"{count} images"
    return f"{details['name']} ({details['kind']}, {size})"
