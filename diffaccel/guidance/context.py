"""What a rule may know besides the predictions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from ..core.errors import GuidanceError
from ..core.prediction import coefficients


@dataclass(frozen=True)
class Level:
    """The noise level of one evaluation and what the network's raw output means there.

    Attributes:
        alpha, sigma: native level of the network, x_native = alpha·x0 + sigma·ε.
        prediction_type: of the raw output, see `core.prediction`.
        scale: x_native = scale·x for the state x that the scheduler carries.
    """

    alpha: float
    sigma: float
    prediction_type: str
    scale: float = 1.0

    @property
    def rho(self) -> float:
        """Noise-to-signal ratio σ/α, infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else float("inf")

    def affine(self, target: str) -> tuple[float, float]:
        """(a, b) with ``target = a·x + b·prediction``.

        Args:
            target: "sample" for x0, "epsilon" for the noise, or another name in `core.prediction`.

        Raises:
            GuidanceError: the prediction does not determine the target at this level, as ε does not x0 in pure noise.
        """
        try:
            p, r = coefficients(self.prediction_type, target, self.alpha, self.sigma)
        except ZeroDivisionError:
            raise GuidanceError(
                f"A network that predicts {self.prediction_type} says nothing about {target} at α = {self.alpha:g}; use a "
                'rule in raw space, such as APG(space="raw").'
            ) from None
        return p * self.scale, r


class Target(NamedTuple):
    """The level of the state after a step, in the scale of x: to first order alpha·x0 + kept·ε, and fresh noise.

    Attributes:
        alpha, sigma: of the whole state.
        kept: share of sigma that is the predicted ε; all of it where the step adds no noise.
    """

    alpha: float
    sigma: float
    kept: float


@dataclass
class Context:
    """One evaluation of a run.

    Attributes:
        step: number of evaluations of this run before this one.
        steps: number of evaluations of the run, None where unknown.
        find_level: computes the noise level; asked at most once, and only by rules that need it.
        x: (B, …) the state as the scheduler carries it; None while the network is still to be called.
        find_target: computes the level of the state after this step.
        memory: what rules keep between the evaluations of one run; empty at its start.
    """

    step: int
    steps: int | None
    find_level: Callable[[], Level]
    x: torch.Tensor | None = None
    find_target: Callable[[], Target] | None = None
    memory: dict = field(default_factory=dict)

    @cached_property
    def level(self) -> Level:
        """The noise level of this evaluation.

        Raises:
            GuidanceError: the scheduler does not tell.
        """
        return self.find_level()

    @cached_property
    def target(self) -> Target:
        """The level of the state after this step.

        Raises:
            GuidanceError: the scheduler does not tell.
        """
        return self.find_target()
