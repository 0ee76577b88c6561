"""The page of one run: its pictures over time, and its metrics beside what they should look like."""

import html
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..core.config import read_yaml
from ..core.errors import DataError
from ..core.files import write_atomic
from ..core.images import decode_image
from .charts import line_chart
from .html import document, figure, record, table, thumbnails
from .report import load_report

_PICTURES, _EDGE = 8, 320  # sample sheets that are shown, and their size
_POINTS = 50  # of a curve
_STYLE = ".signal { display: inline-block; width: 480px; max-width: 100%; vertical-align: top; margin: 0 1rem 1rem 0; }"


@dataclass(frozen=True)
class Signal:
    """What metrics say about a run.

    Attributes:
        pattern: of their names in metrics.jsonl; ``*`` stands for anything.
        healthy: what they should look like, one line.
        level: the right value, where there is one.
    """

    pattern: str
    healthy: str
    level: float | None = None


SIGNALS = (
    Signal(
        "validation/FD-*",
        "falls, then levels; the number to judge by (few samples, so compare it along a run and at equal settings only)",
    ),
    Signal("validation/one_step_std_ratio", "near 1; lower is the blur that consistency training tends to", 1.0),
    Signal("validation/one_step_drift", "near 0"),
    Signal("*/std_ratio", "comes near 1: spread of the student's samples over that of real ones; falling later is collapse", 1.0),
    Signal("*/drift", "comes near 0: how far the mean of the samples is off, in standard deviations; rising, brightness or colour drifts"),
    Signal("*/sample_std", "comes near the standard deviation of the data; falling later is collapse"),
    Signal(
        "student/disagreement",
        "falls from near 1: critic against teacher, as a share of the way from sample to teacher; rising, the critic "
        "cannot follow (more critic_steps, lower student rate)",
    ),
    Signal("student/score_difference", "falls; zero would mean that critic and teacher are the same"),
    Signal("student/distance_to_teacher", "rises from near 0 while samples leave the teacher's blurred mean, then levels"),
    Signal("student/mismatch", "falls under each node of disback and starts again at 1 under the next"),
    Signal("student/node", "counts down to 0, the real teacher, well before the end"),
    Signal("critic/denoising", "rises while the student leaves the teacher's mean, then levels"),
    Signal(
        "critic/discriminator_accuracy_clean_fifth",
        "clearly above 0.5 while the student is bad, towards 0.5 as it gets good; 1 throughout is too strong a discriminator",
        0.5,
    ),
    Signal(
        "critic/discriminator_accuracy",
        "closer to 0.5: near pure noise the distributions coincide and 0.5 is right",
        0.5,
    ),
    Signal("discriminator/accuracy", "above 0.5, below 1: at 1 the student learns nothing from the discriminator", 0.5),
    Signal(
        "student/ratio_mean_bin*",
        "near 1: the density ratio's mean under the student is exactly 1 at every time; far off is a bad discriminator",
        1.0,
    ),
    Signal("student/ratio_std", "moderate; near 0 the discriminator sees no difference, above 3 few samples count"),
    Signal("student/weight_std", "above 0, where the divergence acts; near 0 it is plain dmd"),
    Signal("student/adversarial", "wavers about a level; rising steadily, the discriminator wins"),
    Signal("student/regression", "falls, then levels"),
    Signal("student/consistency", "falls quickly, then slowly; its value says little of the samples, so look at the pictures"),
    Signal("student/mean_square", "falls; what is left is what one network cannot do in so few steps"),
    Signal("matching/relative_error", "falls well below 1 before the student is matched by distribution"),
    Signal("*/loss", "the critic's settles; the student's says little where only its gradient counts, not its value"),
    Signal("*/grad_norm_*", "settles below the clip (1 unless it was set); peaks late in a run ask for a lower rate"),
)  # fmt: skip
"""In the order of the page; a metric belongs to the first whose pattern fits it."""


def signals_table() -> str:
    """`SIGNALS` as Markdown, for the documentation."""
    rows = [f"| `{signal.pattern}` | {signal.healthy} |" for signal in SIGNALS]
    return "\n".join(["| metric | healthy |", "|---|---|", *rows])


def write_run_page(folder: str | Path) -> Path:
    """Write report.html into the folder of a distillation, finished or not, and return its path.

    Shown are the sample sheets over time, the curves of `SIGNALS`, the distance of report.json if there is one, and
    all settings. Several students have a page each in their folders, and links to them here.

    Raises:
        DataError: no run in the folder, or a damaged file.
        UsageError: its config.yaml is not readable, or the folder cannot be written to.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{folder} holds no run (no config.yaml).")
    settings, metrics = read_yaml(folder / "config.yaml"), read_metrics(folder)
    method, trainer = settings.get("method", {}), settings.get("trainer", {})
    title = f"{settings.get('teacher') or 'Model'}, distilled by {method.get('name')}"
    pictures, curves = _pictures(folder), _curves(metrics)
    students = [write_run_page(path.parent) for path in sorted(folder.glob("student-*/config.yaml"))]
    links = ", ".join(f"<a href='{path.parent.name}/report.html'>{path.parent.name}</a>" for path in students)
    others = sorted({name for row in metrics for name in row if signal_of(name) is None} - {"step", "seconds"})
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        table((), _facts(folder, metrics, method, trainer)),
        f"<p>Pictures over time and signals of each: {links}.</p>" if links else "",
        *(["<h2>The same noise over time</h2>", *pictures] if pictures else []),
        *(["<h2>Signals, and what they should look like</h2>", *curves] if curves else []),
        f"<p class='small'>Also in metrics.jsonl: {html.escape(', '.join(others))}.</p>" if others else "",
        "<h2>Settings</h2>",
        record(settings),
    ]
    write_atomic(folder / "report.html", document(title, parts, _STYLE))
    return folder / "report.html"


def read_metrics(folder: Path) -> list[dict]:
    """The complete lines of a run's metrics.jsonl, of which the last may be in the making."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def signal_of(name: str) -> Signal | None:
    """The signal that a metric belongs to."""
    return next((signal for signal in SIGNALS if fnmatchcase(name, signal.pattern)), None)


def curve(rows: Iterable[Mapping], name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric wherever it is there and finite, thinned to means of neighbours."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    size = -(-len(found) // _POINTS) or 1
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def _facts(folder: Path, metrics: Sequence[Mapping], method: Mapping, trainer: Mapping) -> list[list[str]]:
    done, steps = max((row["step"] for row in metrics), default=0), trainer.get("steps")
    facts = {
        "network evaluations of the student": str(method.get("student_steps", 1)),
        "training steps": f"{done} of {steps}" if metrics and done < steps else f"{steps}",
        "samples a step": str(trainer.get("batch_size", "")),
    }
    if (folder / "report.json").is_file():
        report = load_report(folder / "report.json")
        limits = "" if report.ci95 is None else ", without bias {:.3f} … {:.3f} (95 %)".format(*report.ci95)
        facts[report.metric] = f"{report.value:.3f} on {report.n_fake} images{limits}"
    return [[name, value] for name, value in facts.items()]


def _pictures(folder: Path) -> list[str]:
    found = sorted((folder / "samples").glob("step-*.png"))
    if len(found) > _PICTURES:  # the first, the last, and some evenly between them
        found = [found[round(index * (len(found) - 1) / (_PICTURES - 1))] for index in range(_PICTURES)]
    shown = []
    for path in found:
        image = decode_image(path.read_bytes()).tensor
        shown.append(figure(f"step {int(path.stem.partition('-')[2])}", thumbnails([image], _EDGE)[0], smooth=True))
    return shown


def _curves(metrics: Sequence[Mapping]) -> list[str]:
    names = list(dict.fromkeys(name for row in metrics for name in row))
    parts = []
    for signal in SIGNALS:
        own = {name: curve(metrics, name) for name in names if signal_of(name) is signal}
        lines = {name: [(x, y, 0.0) for x, y in points] for name, points in own.items() if points}
        if not lines:
            continue
        logarithmic = signal.pattern.startswith("validation/FD") and min(y for p in own.values() for _, y in p) > 0.0
        levels = {} if signal.level is None else {"": signal.level}
        title = signal.pattern if len(lines) > 1 else next(iter(lines))
        chart = line_chart(title, lines, levels, "training step", zero=signal.level is None, logarithmic=logarithmic)
        parts.append(f"<div class='signal'>{chart}<p class='small'>Healthy: {html.escape(signal.healthy)}.</p></div>")
    return parts
