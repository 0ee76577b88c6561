"""Teacher and students of a comparison by the same measure: equal numbers of images, from the same noise."""

from collections.abc import Sequence

import torch

from ..core.images import sheet
from ..generation import generate
from .guidance_sweep import ACCURACY
from .html import thumbnails
from .run import evaluate_images
from .sources import DATASETS, ImageSource, resolve

SEED = 1  # of the images, whatever a student was trained with
_SMALL = 32  # images up to this size are shown by the hundred


class Judge:
    """Measures generators against one reference.

    Args:
        reference: real images or their statistics, see `sources.resolve`.
        num: images of each model; plug-in distances compare at equal numbers only.
        prompts: of a text-to-image model, in turn.
        features: see `settings.Settings`.
        device: torch device; default CUDA where there is one.

    Raises:
        UsageError, DataError, MissingWeightsError: a reference that cannot be used.
    """

    def __init__(
        self,
        reference: str,
        num: int,
        prompts: Sequence[str] | None = None,
        features: str = "auto",
        device: str | None = None,
    ):
        self.reference, self.num, self.prompts, self.features, self.device = reference, num, prompts, features, device
        source = resolve(reference)
        vectors = isinstance(source, ImageSource) or source.statistics.vectors is not None
        self._metrics = ("fid", "prdc") if vectors else ("fid",)
        name = reference.partition(":")[0]
        kind = "classes" if prompts is None else "prompts"
        self._recognise = ACCURACY.get((name, kind)) if name in DATASETS else None

    def __call__(self, model: str, **drawing) -> tuple[dict, torch.Tensor]:
        """What a model draws, in numbers and in a picture.

        Args:
            model: teacher name or model folder.
            **drawing: arguments of `generation.generate`, such as ``steps``.

        Returns:
            JSON-able "fd", "ci95", "bias_corrected", "precision", "recall", "accuracy" (the last three None where they are
            unknown), "nfe", "metric" and "warnings"; and a sheet of the first images, uint8 (C, height, width).

        Raises:
            UsageError, DataError, MissingWeightsError, NumericalError: see `generate` and `evaluate_images`.
        """
        batches = generate(model, self.num, seed=SEED, prompts=self.prompts, device=self.device, **drawing)
        parts = list(batches)
        images = torch.cat([part for part, _ in parts])
        labels = None if parts[0][1] is None else torch.cat([part for _, part in parts])
        report = evaluate_images((images, labels), self.reference, self._metrics, self.features)
        found = {result.kind: result for result in report.results}
        shown = labels if self.prompts is None else batches.prompts
        values = {
            "fd": found["FD"].value,
            "bias_corrected": found["FD"].bias_corrected,
            "ci95": found["FD"].ci95 and list(found["FD"].ci95),
            **{name: found[name].value if name in found else None for name in ("precision", "recall")},
            "accuracy": self._recognise(images, shown) if self._recognise and shown is not None else None,
            "nfe": batches.nfe,
            "metric": found["FD"].metric,
            "warnings": list(report.warnings),
        }
        return values, _sheet(images)


def _sheet(images: torch.Tensor) -> torch.Tensor:
    """The first images, ten a line: a hundred small ones, or twenty."""
    small = max(images.shape[2:]) <= _SMALL
    return sheet(thumbnails(images[: 100 if small else 20], _SMALL if small else 2 * _SMALL), 10, gutter=1)
