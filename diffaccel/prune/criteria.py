"""What the removal of operators costs in quality; lower is better."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from ..core.errors import unknown
from ..core.rng import KeyedRandom
from .calibration import Calibration, digest
from .surgery import Maps, removed

_REDUCED = {"element": (0,), "channel": (0, *range(2, 9)), "global": tuple(range(9))}


class Criterion(ABC):
    """A loss of sets of operators, on a calibration.

    Args:
        calibration: of the whole network; names and maps are those of its network.
        maps: linear maps by name, see `fit.fit_maps`, for operators that would be replaced by these.
    """

    name: str

    def __init__(self, calibration: Calibration, maps: Maps | None = None):
        self.calibration, self.network, self.maps = calibration, calibration.network, dict(maps or {})

    @abstractmethod
    def loss(self, names: Iterable[str]) -> float:
        """The loss with all of these removed at once; the network is as it was afterwards.

        Raises:
            UsageError: names that cannot be removed, or not together.
        """

    def settings(self) -> dict:
        """What scores depend on, as plain JSON."""
        return {"method": self.name, "linear": digest(self.maps) if self.maps else None, **self.calibration.settings()}

    def _removed(self, names: Iterable[str]):
        names = list(names)
        return removed(self.network, names, {name: self.maps[name] for name in names if name in self.maps})


class LDPruner(Criterion):
    """How far mean and standard deviation of final latents move (Castells et al. 2024, LD-Pruner, arXiv 2404.11936).

    Args:
        calibration, maps: see `Criterion`.
        reduce: see `latent_distance`.

    Raises:
        UsageError: unknown ``reduce``.
    """

    name = "ld-pruner"

    def __init__(self, calibration: Calibration, maps: Maps | None = None, reduce: str = "element"):
        super().__init__(calibration, maps)
        if reduce not in _REDUCED:
            raise unknown("reduction", reduce, _REDUCED)
        self.reduce = reduce

    def loss(self, names):
        reference = self._reference
        with self._removed(names):
            return latent_distance(reference, self.calibration.latents(), self.reduce)

    def settings(self):
        return {**super().settings(), "reduce": self.reduce}

    @functools.cached_property
    def _reference(self) -> torch.Tensor:
        return self.calibration.latents()


class Laptop(Criterion):
    """Mean squared change of the network's output at states of its own runs (Zhang et al. 2024, LAPTOP-Diff, arXiv 2404.11098)."""

    name = "laptop"

    def loss(self, names):
        reference = self._reference
        with self._removed(names):
            total = sum(
                (new - old).double().square().sum() for new, old in zip(self._outputs(), reference, strict=True)
            )
        return float(total) / sum(old.numel() for old in reference)

    def _outputs(self):
        return (output.cpu() for output in self.calibration.outputs())

    @functools.cached_property
    def _reference(self) -> list[torch.Tensor]:
        return list(self._outputs())


class Magnitude(Criterion):
    """Mean absolute value of the weights that go, a baseline that looks at nothing else; of several, their sum."""

    name = "magnitude"

    def loss(self, names):
        return float(sum(self._one(name) for name in names))

    def _one(self, name: str) -> float:
        before = dict(self.network.named_parameters())
        with self._removed([name]):
            kept = dict(self.network.named_parameters())
        gone = [weight.detach().double().abs() for key, weight in before.items() if key not in kept]
        return float(sum(one.sum() for one in gone) / max(1, sum(one.numel() for one in gone)))

    def settings(self):
        return {"method": self.name, "model": self.calibration.settings()["model"]}


class Random(Criterion):
    """A random number for each name, the baseline that every score must beat; of several, their sum.

    Args:
        calibration, maps: see `Criterion`.
        seed: of the numbers.
    """

    name = "random"

    def __init__(self, calibration: Calibration, maps: Maps | None = None, seed: int = 0):
        super().__init__(calibration, maps)
        self.seed = seed

    def loss(self, names):
        streams = [hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]
        return float(sum(KeyedRandom(self.seed).uniform(f"prune/{one}", 0, 0, 1).item() for one in streams))

    def settings(self):
        return {"method": self.name, "seed": self.seed}


def latent_distance(reference: torch.Tensor, modified: torch.Tensor, reduce: str = "element") -> float:
    """‖mean(Z₀) − mean(Z)‖₂ + ‖std(Z₀) − std(Z)‖₂ over samples (Castells et al. 2024).

    Args:
        reference, modified: (N, C, …) final latents from the same noise, N > 1.
        reduce: whether moments are taken for each "element" of the latents, each "channel", or "global"ly.

    Returns:
        Zero for equal latents; not a number where latents are not finite.
    """
    axes = [axis for axis in _REDUCED[reduce] if axis < reference.ndim]
    moments = [(one.double().mean(axes), one.double().std(axes)) for one in (reference, modified)]
    return float(sum((old - new).norm() for old, new in zip(*moments, strict=True)))
