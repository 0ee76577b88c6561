"""Several generators, one reference, equal numbers of images: the table behind every claim."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.images import labelled, save_png, sheet
from ..generation import generate
from ..models.data import load_digits
from ..models.teachers import load_pipeline
from .classes import class_report
from .report import Report
from .run import evaluate_fid


@dataclass(frozen=True)
class Contender:
    """A model with its sampling settings; ``steps`` and ``sampler`` None mean the model's own."""

    label: str
    model: str
    steps: int | None = None
    sampler: str | None = None


@dataclass
class Row:
    """One line of a comparison.

    Attributes:
        label: what was measured.
        nfe: network evaluations per image; 0 for real images.
        report: Fréchet distance to the reference with its uncertainty.
        classes: `classes.class_report`; empty where classes are unknown.
        images_per_second: generation speed in this run on this machine; None for real images.
        samples: ten images of each class, one class a line of ten, uint8 (100, 1, 8, 8).
    """

    label: str
    nfe: int
    report: Report
    classes: dict
    images_per_second: float | None
    samples: torch.Tensor = field(repr=False)

    def to_dict(self) -> dict:
        """JSON-able content, without the samples."""
        speed = self.images_per_second and round(self.images_per_second, 1)
        facts = {"label": self.label, "nfe": self.nfe, "images_per_second": speed}
        return {**facts, "fd": self.report.results[0].to_dict(), "classes": self.classes}

    def cells(self) -> list[str]:
        """Cells of the table for people, under `HEADER`."""
        low, high = self.report.ci95 or (float("nan"), float("nan"))
        corrected = self.report.bias_corrected
        diversity = [row["diversity"] for row in self.classes.get("classes", []) if row["diversity"] is not None]
        return [
            self.label,
            str(self.nfe) if self.nfe else "–",
            str(self.report.n_fake),
            f"{self.report.value:.3f}",
            f"{corrected:.3f}" if corrected is not None else "–",
            f"{low:.2f} … {high:.2f}",
            f"{100 * self.classes['accuracy']:.1f} %" if self.classes else "–",
            f"{sum(diversity) / len(diversity):.1f}" if diversity else "–",
            f"{self.images_per_second:.0f}" if self.images_per_second else "–",
        ]


HEADER = ["model", "NFE", "N", "FD-digits64", "corrected", "95 % interval", "class accuracy", "diversity", "images/s"]


def compare_digits(contenders: list[Contender], num: int = 1000, seed: int = 0) -> list[Row]:
    """Measure generators of digits against the real training digits; the last row is real held-out digits.

    All contenders start from the same noise and labels, ten classes in turn.

    Args:
        num: images per contender; plug-in distances compare at equal ``num`` only.
        seed: of the generated images.

    Raises:
        UsageError, DataError, MissingWeightsError: see `generation.generate`.
    """
    rows = []
    for contender in contenders:
        pipeline = load_pipeline(contender.model)
        started = time.monotonic()
        batches = list(generate(pipeline, num, steps=contender.steps, sampler=contender.sampler, seed=seed))
        seconds = time.monotonic() - started
        nfe = contender.steps or pipeline.config.num_inference_steps
        images = torch.cat([batch for batch, _ in batches])
        labels = torch.cat([batch for _, batch in batches])
        rows.append(_row(contender.label, nfe, images, labels, num / seconds))
    return [*rows, _row("real, held out", 0, *load_digits("heldout"), None)]


def gain(rows: dict[str, float], teacher_one: str, teacher_many: str, student: str) -> float:
    """Share of the teacher's quality that a one-step student recovers.

    (FD teacher@1 − FD student@1) / (FD teacher@1 − FD teacher@many), from plug-in distances by label.
    """
    return (rows[teacher_one] - rows[student]) / (rows[teacher_one] - rows[teacher_many])


def save_overview(rows: list[Row], path: Path) -> None:
    """One PNG: the sheets of all rows side by side under their labels, one class a line."""
    save_png(labelled([[(row.label, sheet(row.samples, scale=3, gutter=1)) for row in rows]]), path)


def _row(label: str, nfe: int, images: torch.Tensor, labels: torch.Tensor, speed: float | None) -> Row:
    report = evaluate_fid((images, labels), "digits")
    order = torch.cat([torch.nonzero(labels == k)[:10, 0] for k in range(10)])
    return Row(label, nfe, report, class_report(images, labels, load_digits()), speed, images[order])
