"""Scores that need no real images: Inception Score (Salimans et al. 2016) and CLIP score (Hessel et al. 2021)."""

import torch

from ...core.errors import DataError, NumericalError
from ...core.rng import KeyedRandom
from ..jackknife import Estimate, normal_interval
from .checks import checked, checked_pair


def assign_splits(count: int, splits: int = 10, seed: int = 0) -> torch.Tensor:
    """Assign samples to equal parts of a random order: (count,) int64 in [0, splits).

    Part sizes are those of `torch.chunk`, as in torchmetrics: ⌈count/splits⌉, the last ones smaller or empty.
    """
    assigned = torch.empty(count, dtype=torch.long)
    order = KeyedRandom(seed).permutation("Inception Score splits", 0, count)
    assigned[order] = torch.arange(count) // max(-(-count // splits), 1)
    return assigned


class ScoreSums:
    """Sums over class probabilities that the Inception Score needs, per split; float64, O(splits·C) memory.

    Attributes:
        counts: (splits,) int64 samples.
        probabilities: (splits, C) sums of p(y|x).
        negentropies: (splits,) sums of Σ_y p(y|x)·log p(y|x).
    """

    def __init__(self, num_classes: int, splits: int = 10):
        self.counts = torch.zeros(splits, dtype=torch.int64)
        self.probabilities = torch.zeros(splits, num_classes, dtype=torch.float64)
        self.negentropies = torch.zeros(splits, dtype=torch.float64)

    def update(self, logits: torch.Tensor, split: torch.Tensor) -> "ScoreSums":
        """Add class scores (n, C) before the softmax and the splits (n,) they belong to (`assign_splits`); returns self.

        Raises:
            DataError: other shapes, or splits out of range.
            NumericalError: NaN or infinite scores.
        """
        splits, num_classes = self.probabilities.shape
        if logits.ndim != 2 or logits.shape[1] != num_classes or split.shape != logits.shape[:1]:
            raise DataError(
                f"Class scores must be (n, {num_classes}) and splits (n,), got {tuple(logits.shape)} and "
                f"{tuple(split.shape)}."
            )
        if len(split) and not 0 <= int(split.min()) <= int(split.max()) < splits:
            raise DataError(f"Splits must lie in 0 … {splits - 1}.")
        logs = checked(logits, least=0, what="class scores").log_softmax(dim=1)
        probabilities, split = logs.exp(), split.to(logs.device)
        member = torch.nn.functional.one_hot(split, splits).to(logs)
        self.counts += torch.bincount(split, minlength=splits).cpu()
        self.probabilities += (member.T @ probabilities).cpu()
        self.negentropies += (member.T @ (probabilities * logs).sum(1)).cpu()
        return self

    def merge(self, *others: "ScoreSums") -> "ScoreSums":
        """Return the sums of this set and the others; none of them is changed.

        Raises:
            DataError: another number of classes or splits.
        """
        if any(other.probabilities.shape != self.probabilities.shape for other in others):
            raise DataError("Only scores with the same numbers of classes and splits can be merged.")
        everything = [part.tensors() for part in (self, *others)]
        return self.from_tensors({key: torch.stack([part[key] for part in everything]).sum(0) for key in everything[0]})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Content as tensors whose shapes depend on splits and C only."""
        return {"counts": self.counts, "probabilities": self.probabilities, "negentropies": self.negentropies}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "ScoreSums":
        """Inverse of `tensors`."""
        splits, num_classes = tensors["probabilities"].shape
        result = cls(num_classes, splits)
        for key, tensor in tensors.items():
            setattr(result, key, tensor.clone())
        return result

    def compute(self) -> tuple[float, float | None]:
        """Mean and standard deviation over splits of exp(E KL(p(y|x) ‖ p(y))): 1 … C, higher is better.

        The deviation has splits−1 in the denominator, as in torchmetrics (Salimans' code: splits), is None with one
        split, and is no confidence interval. Empty splits do not count.

        Raises:
            DataError: no samples.
        """
        used = self.counts > 0
        if not bool(used.any()):
            raise DataError("The Inception Score needs images, got none.")
        counts = self.counts[used]
        marginal = self.probabilities[used] / counts[:, None]
        scores = (self.negentropies[used] / counts - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std()) if len(scores) > 1 else None


def clip_score(image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> Estimate:
    """Mean of max(100·cos, 0) over images (N, d) and their texts (N, d): 0 … 100, with a normal interval.

    Raises:
        DataError: another number of texts than images, or embeddings of different lengths.
        NumericalError: an embedding that is 0 or not finite.
    """
    if image_embeddings.shape != text_embeddings.shape:
        shapes = tuple(image_embeddings.shape), tuple(text_embeddings.shape)
        raise DataError(f"Images and texts must have embeddings of one shape, got {shapes[0]} and {shapes[1]}.")
    images, texts = checked_pair(image_embeddings, text_embeddings, least=1)
    lengths = images.norm(dim=1) * texts.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise NumericalError("An embedding is 0 and has no direction; check the images and the extractor.")
    cosines = (images * texts).sum(1) / lengths
    return normal_interval((100.0 * cosines).clamp_min(0.0))
