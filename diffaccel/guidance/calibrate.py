"""Which cap on the norm of guidance suits a model: the norms that occur without one."""

import inspect
from dataclasses import asdict, dataclass, field, replace

import torch

from ..core.errors import GuidanceError, NumericalError, UsageError
from .attach import guide
from .context import Context
from .functional import norm
from .rules import APG, UNCOND, Rule

SHARES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Norms:
    """Norms of guidance differences in one evaluation, each as 10 %, 50 % and 90 % quantile over samples.

    Attributes:
        rho: noise-to-signal ratio σ/α, infinite for pure noise; None where the scheduler does not tell.
        difference: ‖d‖ of d = c − u in the space of the rule.
        accumulated: ‖d‖ after momentum, which is what a cap acts on.
    """

    rho: float | None
    difference: tuple[float, float, float]
    accumulated: tuple[float, float, float]


@dataclass(frozen=True)
class Calibration:
    """What a run of `APG` without a cap tells; prints as a table.

    Attributes:
        rule: the rule of the run.
        norms: of its evaluations, in order.
        norm_threshold: the cap to start from: the median of ‖d‖ after momentum over all evaluations and samples, so that
            it would act on half of them. Good for this model, image size, scale and space.
    """

    rule: APG
    norms: tuple[Norms, ...]
    norm_threshold: float

    def to_dict(self) -> dict:
        """The calibration as plain data that JSON can hold; an infinite σ/α as None."""
        settings = {key: value for key, value in asdict(self.rule).items() if key != "norm_threshold"}
        rows = [asdict(row) | {"rho": row.rho if row.rho != float("inf") else None} for row in self.norms]
        return {"norm_threshold": self.norm_threshold, "rule": settings, "evaluations": rows}

    def __str__(self) -> str:
        cells = [("evaluation", "σ/α", "‖c − u‖", "10 %", "90 %", "with momentum", "10 %", "90 %")]
        for index, row in enumerate(self.norms, start=1):
            numbers = (row.rho, *(part[i] for part in (row.difference, row.accumulated) for i in (1, 0, 2)))
            cells.append((str(index), *("?" if number is None else f"{number:.4g}" for number in numbers)))
        return "\n".join(
            "  ".join(f"{cell:>{max(8, len(head))}}" for cell, head in zip(row, cells[0], strict=True)) for row in cells
        )


@dataclass(frozen=True, eq=False)
class Recorder(APG):
    """`APG` that keeps the norms it meets, over any number of runs of one length.

    Attributes:
        kept: by evaluation: σ/α, and the norms of all samples before and after momentum.
    """

    kept: dict[int, tuple[float | None, list, list]] = field(default_factory=dict, repr=False)

    @property
    def title(self):
        return APG.__name__  # which is what the user gave

    def difference(self, difference, onto, context):
        guided = super().difference(difference, onto, context)
        _, before, after = self.kept.setdefault(context.step, (_rho(context), [], []))
        before.append(norm(difference).flatten().cpu())
        after.append(norm(context.memory["difference"] if self.momentum else difference).flatten().cpu())
        return guided

    def calibration(self) -> Calibration:
        """What was recorded.

        Raises:
            GuidanceError: nothing, or branches that agree everywhere.
            NumericalError: a norm that is not finite.
        """
        if not self.kept:
            raise GuidanceError("The rule never acted in this run; calibrate with a wider interval, or without one.")
        whole = {step: (rho, *map(torch.cat, norms)) for step, (rho, *norms) in sorted(self.kept.items())}
        threshold = float(torch.cat([after for _, _, after in whole.values()]).quantile(0.5))
        if not all(bool(part.isfinite().all()) for _, *parts in whole.values() for part in parts):
            raise NumericalError(f"The run diverged at guidance scale {self.scale:g}; calibrate with a smaller one.")
        if threshold == 0.0:
            raise GuidanceError(
                "Both branches of this run agree, so there is no guidance; give it a condition that matters."
            )
        norms = tuple(Norms(rho, _quantiles(before), _quantiles(after)) for rho, before, after in whole.values())
        rule = APG(**{name: getattr(self, name) for name in APG.__dataclass_fields__})
        return Calibration(rule, norms, threshold)


def recording(rule: Rule | float) -> tuple[Rule, Recorder]:
    """A rule with a recorder in place of its `APG`, and that recorder.

    Args:
        rule: `APG`, or a wrapper around one; its cap is left out. A number is the scale of the default one.

    Raises:
        UsageError: another rule, or a scale at which there is no guidance.
    """
    if isinstance(rule, (int, float)):
        rule = APG(rule)
    if isinstance(getattr(rule, "rule", None), Rule):
        inner, recorder = recording(rule.rule)
        return replace(rule, rule=inner), recorder
    if not isinstance(rule, APG):
        raise UsageError(f"Only APG has a cap to calibrate; got {rule!r}, pass APG(…) or a guidance scale.")
    if UNCOND not in rule.requires:
        raise UsageError("There is no guidance at scale 1; calibrate at the scale that you mean to use.")
    recorder = Recorder(**{**vars(rule), "norm_threshold": None})
    return recorder, recorder


def calibrate_guidance(pipe, rule: Rule | float = 7.5, *args, **arguments) -> Calibration:
    """Run a pipeline once under `APG` without a cap, and propose a cap to start from.

        calibration = diffaccel.calibrate_guidance(pipe, 10, ["a red apple", "a dog"], output_type="latent")
        rule = diffaccel.APG(10, norm_threshold=calibration.norm_threshold)

    Args:
        pipe: a pipeline that `guide` takes.
        rule: the guidance scale, or an `APG`, in an `Interval` or `Rescale` too.
        *args, **arguments: of the call of the pipeline, as in ordinary use. Its guidance scale may be left out.

    Raises:
        UsageError: a rule without a cap, a scale of 1; and as `guide` does.
        NumericalError: the run diverged.
    """
    rule, recorder = recording(rule)
    with guide(pipe, rule):
        signature = inspect.signature(pipe.__call__)
        missing = signature.parameters.keys() - signature.bind_partial(*args, **arguments).arguments
        if "guidance_scale" in missing and "true_cfg_scale" not in signature.parameters:
            arguments["guidance_scale"] = 2.0  # any that runs both branches
        pipe(*args, **arguments)
    return recorder.calibration()


def _quantiles(values: torch.Tensor) -> tuple[float, float, float]:
    return tuple(values.quantile(torch.tensor(SHARES, dtype=values.dtype)).tolist())


def _rho(context: Context) -> float | None:
    try:
        return context.level.rho
    except GuidanceError:  # rules in raw space work without
        return None
