"""What `optimize` found: to read, to draw and to undo."""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..core.files import write_atomic
from .accelerations import BIT_EQUAL, Switch
from .waterfall import save_waterfall

KEPT, NOT_KEPT, NOT_APPLICABLE, FAILED = "kept", "not kept", "not applicable", "failed"


@dataclass(frozen=True)
class Cost:
    """Of one image: seconds, and bytes of a whole run at its peak (None where that cannot be seen)."""

    seconds: float
    bytes: int | None


@dataclass(frozen=True)
class Trial:
    """One acceleration on top of those kept before it.

    Attributes:
        name: see `ACCELERATIONS`.
        outcome: "kept", "not kept", "not applicable" or "failed".
        reason: a clause.
        exact: "bit-equal" or "rounding".
        without, used: costs, measured in turn within one run; None where it was not tried.
        difference: mean absolute difference of the images, in levels of 8 bits.
        detail: what the acceleration tells of itself.
        switch: of what is kept.
    """

    name: str
    outcome: str
    reason: str
    exact: str
    without: Cost | None = None
    used: Cost | None = None
    difference: float | None = None
    detail: dict | None = field(default=None, repr=False)
    switch: Switch | None = field(default=None, repr=False, compare=False)

    @property
    def ratio(self) -> float | None:
        """How many times as fast with it."""
        return self.used and self.without.seconds / self.used.seconds


@dataclass
class OptimizeReport:
    """What was tried on a pipeline, and what is in use until ``undo``.

    Attributes:
        pipeline: name of its class.
        environment: device and versions that times depend on.
        steps: sampling steps of the measured runs, None for a run of the user's own.
        trials: in the order in which they were made.
        first, last: costs of the pipeline as it came and with all that is kept, measured in turn at the end; None without
            measuring, and ``last`` where nothing is kept.
        difference: between their images, as for `Trial`.
        settings: arguments of `optimize` that decide what is applied.
    """

    pipeline: str
    environment: dict[str, str]
    steps: int | None
    trials: tuple[Trial, ...]
    first: Cost | None
    last: Cost | None
    difference: float | None
    settings: dict = field(default_factory=dict)
    switches: ExitStack = field(repr=False, default_factory=ExitStack)

    @property
    def kept(self) -> list[str]:
        """Names of what is in use."""
        return [trial.name for trial in self.trials if trial.outcome == KEPT]

    def undo(self) -> None:
        """Make the pipeline what it was; without effect the second time."""
        self.switches.close()

    def explain(self) -> str:
        """A table of the trials, the total, and how to use it in Python."""
        lines = [
            f"{self.pipeline} on {self.environment['device']}" + ("" if self.steps is None else f", {self.steps} steps")
        ]
        width = max(len(trial.name) for trial in self.trials) if self.trials else 0
        for trial in self.trials:
            lines.append(f"  {trial.name:<{width}}  {trial.outcome:<14}  {trial.reason}{_costs(trial)}")
        if self.last is not None:
            ratio, change = self.first.seconds / self.last.seconds, _change(self.difference)
            lines.append(
                f"together: {_ms(self.first)} ms per image before, {_ms(self.last)} with them ({ratio:.2f}×)"
                f"{_memory(self.first, self.last)}, {change}"
            )
        elif self.first is not None:
            lines.append(f"nothing pays here: {_ms(self.first)} ms per image")
        if self.kept and self.first is not None:
            only = ", ".join(map(repr, self.kept))
            lines += [
                "In Python, without measuring again:",
                f"  diffaccel.optimize(pipe, only=[{only}], measure=False)",
            ]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The same as plain data, for JSON."""
        head = {"pipeline": self.pipeline, "environment": self.environment, "steps": self.steps, "kept": self.kept}
        cost = {"first": self.first and asdict(self.first), "last": self.last and asdict(self.last)}
        return {**head, **cost, "difference": self.difference, "trials": [_plain(trial) for trial in self.trials]}

    def save(self, folder: Path) -> None:
        """Write report.json and report.txt, and waterfall.png if it was measured, into a folder that exists.

        Raises:
            UsageError: they cannot be written.
        """
        write_atomic(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomic(folder / "report.txt", self.explain() + "\n")
        if self.first is not None:
            save_waterfall(self, folder / "waterfall.png")

    def __str__(self) -> str:
        return self.explain()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.undo()


def _plain(trial: Trial) -> dict:
    plain = asdict(replace(trial, switch=None)) | {"ratio": trial.ratio}
    del plain["switch"]
    if trial.difference is not None and not math.isfinite(trial.difference):
        plain["difference"] = None  # JSON has no such number; the reason tells
    return plain


def _costs(trial: Trial) -> str:
    if trial.used is None:
        return ""
    change = "" if trial.exact == BIT_EQUAL and not trial.difference else f", {_change(trial.difference)}"
    return f": {_ms(trial.without)} → {_ms(trial.used)} ms per image{_memory(trial.without, trial.used)}{change}"


def _ms(cost: Cost) -> str:
    return f"{1000 * cost.seconds:.4g}"


def _memory(before: Cost, after: Cost) -> str:
    if before.bytes is None or after.bytes is None:
        return ""
    return f", {before.bytes / 2**20:.1f} → {after.bytes / 2**20:.1f} MiB at the peak"


def _change(difference: float) -> str:
    return "images bit-equal" if difference == 0 else f"images differ by {difference:.2g}/255 on average"
