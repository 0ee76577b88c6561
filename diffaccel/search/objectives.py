"""What a schedule is judged by. Every candidate gets the same noise."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from ..core.errors import UsageError
from ..samplers.searched import PlanFile
from .subjects import Subject, fine_plan


class Objective(ABC):
    """A score of samples, lower is better.

    Attributes:
        name: as in files and on the command line.
        unit: one line saying what the number is.
        once: network calls per sample that every new noise costs besides.
    """

    name: str
    unit: str
    once: int = 0

    @abstractmethod
    def score(self, subject: Subject, file: PlanFile, seed: int, count: int) -> float:
        """The score of a plan on ``count`` samples from this noise."""


class Paired(Objective):
    """A distance between a plan's samples and those of the model's own fine trajectory from the same noise.

    A distance to a fixed reference has a floor, that of the sample's own deviation from its distribution, which a search
    learns to cancel; here it is the same on both sides. Needs no data.

    Args:
        distance: (samples, samples of the fine trajectory) → score; both (count, …) float32 on the CPU.
        name, unit: see `Objective`.
        decoded: give it images in [−1, 1] in place of final states, where these are latents.
        fine_steps: network calls of the fine trajectory, DEIS of the third order on a grid that is dense at the clean end.
    """

    def __init__(self, distance, name: str, unit: str, decoded: bool = False, fine_steps: int = 100):
        self.distance, self.name, self.unit, self.decoded = distance, name, unit, decoded
        self.fine_steps = self.once = fine_steps
        self._targets: dict[tuple[int, int], torch.Tensor] = {}

    def score(self, subject, file, seed, count):
        draw = subject.images if self.decoded else subject.draw
        if (seed, count) not in self._targets:
            self._targets[seed, count] = draw(subject.file(fine_plan(subject.schedule, self.fine_steps)), seed, count)
        return float(self.distance(draw(file, seed, count), self._targets[seed, count]))


class Trajectory(Paired):
    """Root mean square distance to where the model's own fine trajectory leads from the same noise. Needs no data.

    Args:
        fine_steps: network calls of the fine trajectory, DEIS of the third order on a grid that is dense at the clean end.
    """

    def __init__(self, fine_steps: int = 100):
        super().__init__(_rmse, "trajectory", "RMSE to the fine trajectory", fine_steps=fine_steps)


def _rmse(samples: torch.Tensor, fine: torch.Tensor) -> float:
    return float((samples - fine).double().square().mean().sqrt())


class Samples(Objective):
    """Any function of the final states: a Fréchet or kernel distance to reference statistics, or a user's own.

    Args:
        measure: final states (count, …) float32 on the CPU → score, lower is better.
        name, unit: see `Objective`.
        decoded: give it images in [−1, 1] in place of final states, where these are latents.
    """

    def __init__(self, measure: Callable[[torch.Tensor], float], name: str, unit: str, decoded: bool = False):
        if not callable(measure):
            raise UsageError(f"An objective is a function of samples; got {measure!r}.")
        self.measure, self.name, self.unit, self.decoded = measure, name, unit, decoded

    def score(self, subject, file, seed, count):
        drawn = (subject.images if self.decoded else subject.draw)(file, seed, count)
        return float(self.measure(drawn))
