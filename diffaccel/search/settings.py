"""How a search is done."""

import math
from dataclasses import asdict, dataclass

from ..core.errors import UsageError, unknown
from .space import GENES

STRATEGIES = ("evolution", "s3", "times")


@dataclass(frozen=True)
class Settings:
    """How a search is done.

    Args:
        nfe: network calls of a run, a guidance pair counted once.
        strategy: "evolution", "s3" (evolution guided by a predictor), or "times" (evolution of times alone).
        evaluations: candidates that are scored; None to take as many as ``seconds`` allow.
        seconds: time for all of it, of which the evaluations are what remains after hand-set schedules and validation.
        samples: per candidate.
        validation: samples of each of the two fresh draws; None for twice ``samples``.
        seed: of the search and of the noise.
        genes: what of a schedule may be searched, of `space.GENES`.
        skip_layers: most of a network call, by its cost, that may be left out, in [0, 1); what is saved is spent on more
            calls, so that a run costs ``nfe`` whole calls at most. 0 leaves nothing out.
        skip_scaling: also scale the features that a U-Net's way up takes over from its way down.

    Raises:
        UsageError: a number out of range, an unknown strategy.
    """

    nfe: int
    strategy: str = "evolution"
    evaluations: int | None = 1000
    seconds: float | None = None
    samples: int = 256
    validation: int | None = None
    seed: int = 0
    genes: tuple[str, ...] = GENES
    skip_layers: float = 0.0
    skip_scaling: bool = False

    def __post_init__(self):
        if not 0.0 <= self.skip_layers < 1.0:
            raise UsageError(f"skip_layers must lie in [0, 1); got {self.skip_layers!r}.")
        if self.strategy not in STRATEGIES:
            raise unknown("search strategy", self.strategy, STRATEGIES)
        for name in ("nfe", "samples", "evaluations"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1; got {value!r}.")
        if (self.evaluations is None) == (self.seconds is None):
            raise UsageError("The budget of a search is either a number of evaluations or a time.")
        if self.seconds is not None and not 0.0 < self.seconds < math.inf:
            raise UsageError(f"The time of a search must be above 0 seconds; got {self.seconds!r}.")

    def identity(self) -> dict:
        """What scores and their order depend on, as JSON types."""
        return {**asdict(self), "genes": list(self.genes)}

    @property
    def fresh(self) -> int:
        """Samples of a fresh draw."""
        return self.validation or 2 * self.samples
