"""The result of a Fréchet evaluation: one record for people, JSON and tests."""

import json
from dataclasses import asdict, dataclass, field

from ..core.files import write_atomic
from ..core.versions import library_versions

SCHEMA = 1


@dataclass(frozen=True)
class FrechetReport:
    """A Fréchet distance with all that is needed to judge and repeat it; no times, so equal inputs give equal reports.

    Attributes:
        metric: label with the features in it, e.g. "FD-digits64".
        value: plug-in distance, the number to compare with publications (biased upwards by about 1/N).
        bias_corrected, ci95: jackknife estimate and 95 % interval, None if not available (see `jackknife`).
        n_fake, n_real: images per side; None for a statistics file that does not tell.
        features: identity of the extractor (name, dim, sha256, preprocessing).
        fake, real: description of the sides (kind, name, count, digest, …).
        warnings: sentences about what weakens the number.
        versions: of Python and the packages that take part.
    """

    metric: str
    value: float
    bias_corrected: float | None
    ci95: tuple[float, float] | None
    n_fake: int | None
    n_real: int | None
    features: dict
    fake: dict
    real: dict
    warnings: list[str] = field(default_factory=list)
    versions: dict = field(default_factory=library_versions)

    def to_dict(self) -> dict:
        """JSON-able content with a schema number."""
        content = asdict(self)
        content["ci95"] = list(self.ci95) if self.ci95 else None
        return {"schema": SCHEMA, "interval_method": "delete-10-group jackknife" if self.ci95 else None, **content}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path) -> None:
        """Write `to_json` to a file, atomically."""
        write_atomic(path, self.to_json() + "\n")

    def __str__(self) -> str:
        lines = [f"{self.metric}: {self.value:.4f}"]
        if self.ci95:
            low, high = self.ci95
            lines.append(
                f"  bias-corrected {self.bias_corrected:.4f}, 95 % interval {low:.4f} to {high:.4f} (jackknife)"
            )
        lines.append(f"  fake {_side(self.fake, self.n_fake)}")
        lines.append(f"  real {_side(self.real, self.n_real)}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _side(details: dict, count: int | None) -> str:
    number = "unknown number of images" if count is None else f"{count} images"
    return f"{details['name']} ({details['kind']}, {number})"
