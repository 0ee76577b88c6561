"""Settings of a pruning run, and the recipe of its recovery. Importing this needs neither torch nor diffusers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.config import build, merge, to_dict
from ..core.errors import UsageError, unknown
from ..training.recipes import RunConfig, read_recipe, recipes, resolve
from .scores import get_criterion

COSTS = {"parameters": "parameters", "macs": "macs", "latency": "seconds"}
"""What a ratio counts, by the names of the command line; `survey.COSTS` are the values."""
WAYS = {
    "ascending": "lowest scores first until enough is saved, as LD-Pruner; what is not needed then is put back",
    "greedy": "lowest score for what is saved first",
    "knapsack": "lowest sum of scores that saves enough, as LAPTOP-Diff",
    "searched": "lowest joint loss, by evolution from what the other three choose",
    "iterative": "one after the other, scores computed again in between",
}
"""How operators are chosen, in words: by `selection.SOLVERS`, or by `joint`."""
_FREE = ("device", "batch_size")  # may change when a run is continued: what they affect is equal up to rounding


@dataclass
class PruningConfig:
    """Attributes:
    model: teacher name or model folder.
    method: what scores operators, a name in `scores.CRITERIA`.
    ratio: share of the cost that is saved, in [0, 1).
    cost: one of `COSTS`.
    select: one of `WAYS`; "auto" for the method's own.
    evaluations: joint losses of the way "searched".
    single: whether single convolutions of residual blocks may go, too.
    samples, steps: of the runs that scores are computed on.
    prompts: of a text-to-image model, a file or another model's; None for its own.
    guidance_scale: of all that is drawn; None for what the pipeline's call does by itself.
    curve: ratios of the trade-off curve besides ``ratio``; those that cannot be reached are left out.
    repeats: rounds in which time is measured; 0 measures none.
    num: images of a Fréchet distance; 0 measures none.
    reference: real images or statistics, see `evaluate.sources.resolve`; None for those of a named teacher, and for images
        that the whole model draws where there are none.
    seed: of everything random.
    batch_size: samples drawn at once.
    device: "auto", "cpu" or "cuda".
    """

    model: str
    method: str = "laptop"
    ratio: float = 0.3
    cost: str = "parameters"
    select: str = "auto"
    evaluations: int = 200
    single: bool = False
    samples: int = 16
    steps: int = 10
    prompts: str | None = None
    guidance_scale: float | None = None
    curve: tuple[float, ...] = (0.2, 0.35, 0.5)
    repeats: int = 5
    num: int = 1000
    reference: str | None = None
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"

    def __post_init__(self):
        own = get_criterion(self.method).solver
        if self.cost not in COSTS:
            raise unknown("cost", self.cost, COSTS)
        if self.select not in ("auto", *WAYS):
            raise unknown("way to select", self.select, ("auto", *WAYS))
        self.select = own if self.select == "auto" else self.select
        for ratio in (self.ratio, *self.curve):
            if not 0.0 <= ratio < 1.0:
                raise UsageError(f"A ratio is the share to be saved, from 0 to below 1, such as 0.35; got {ratio:g}.")
        least = {"evaluations": 1, "samples": 2, "steps": 2, "repeats": 0, "num": 0, "seed": 0, "batch_size": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        if self.num == 1:
            raise UsageError("A Fréchet distance needs at least 2 images; num=0 measures none.")
        if self.cost == "latency" and not self.repeats:
            raise UsageError("To save latency, time must be measured: give repeats of at least 1.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise UsageError(f"guidance_scale must be finite, got {self.guidance_scale:g}.")

    def stored(self) -> dict[str, Any]:
        """What a run cannot be continued without, as plain data."""
        return {key: value for key, value in to_dict(self).items() if value is not None and key not in _FREE}


def resolve_pruning(
    given: Mapping[str, Any],
    recover: int | None = None,
    recovery: Mapping[str, Any] | None = None,
    assignments: Sequence[str] = (),
    stored: Mapping[str, Any] | None = None,
) -> tuple[PruningConfig, RunConfig | None]:
    """Settings of a run and of its recovery.

    Args:
        given: fields of `PruningConfig`.
        recover: training steps; 0 for no recovery, None for what is stored, else none.
        recovery: more of the recovery's settings, such as {"method": {"features": "plain"}, "data": "digits"}.
        assignments: its settings as for ``--set``, such as "trainer.batch_size=32".
        stored: settings of the run to be continued, which the others lie over.

    Raises:
        UsageError: unknown or wrong settings, settings of a recovery that there is none of.
    """
    stored, recovery = dict(stored or {}), dict(recovery or {})
    config = build(PruningConfig, {**stored.pop("pruning", {}), **given})
    if recover is not None and recover < 0:
        raise UsageError(f"--recover takes training steps, 0 for none; got {recover}.")
    if not (stored if recover is None else recover):
        if recovery or assignments:
            raise UsageError(
                "Settings of a recovery have no effect without one: give --recover STEPS, such as --recover 500."
            )
        return config, None
    name = f"{config.model}-recovery"
    base = stored or read_recipe("prune", name if name in recipes("prune") else "recovery")
    flags: dict[str, Any] = {"teacher": config.model, "trainer": {}}
    if not stored:  # what has been settled for the run holds for its recovery, unless that is told otherwise
        flags["trainer"]["seed"] = config.seed
        flags["method"] = {} if config.guidance_scale is None else {"guidance_scale": config.guidance_scale}
    if given.get("device") in ("auto", "cpu", "cuda"):
        flags["trainer"]["device"] = config.device
    if recover is not None:
        flags["trainer"]["steps"] = recover
    return config, resolve(merge(base, flags), None, list(assignments), recovery)
