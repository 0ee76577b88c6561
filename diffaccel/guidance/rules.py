"""Guidance rules: what an evaluation needs of the network, and how its predictions are combined.

A rule is an immutable description; what it remembers during a run lives in the `Context`. Scales are those of diffusers:
1 is the conditional prediction.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..core.errors import GuidanceError, UsageError, unknown
from . import functional
from .base import COND, UNCOND, Extra, Rule, Wrapper, check_number, is_number
from .context import Context


@dataclass(frozen=True)
class CFG(Rule):
    """Classifier-free guidance u + scale·(c − u).

    Args:
        scale: 1 is the conditional prediction, and then the other is not computed.
    """

    scale: float = 7.5

    def __post_init__(self):
        check_number(self, "scale")

    @property
    def requires(self):
        return frozenset({COND}) if self.scale == 1.0 else super().requires

    def __call__(self, predictions, context):
        c = predictions[COND]
        return c if self.scale == 1.0 else functional.classifier_free(c, predictions[UNCOND], self.scale)


@dataclass(frozen=True)
class APG(Rule):
    """Adaptive projected guidance: no oversaturation at high scales (Sadat et al. 2025, algorithm 1).

    The guidance difference, with momentum and a cap on its norm, loses the part parallel to the conditional prediction.

    Args:
        scale: as in `CFG`.
        eta: share of the parallel part that is kept; 1 with no cap and no momentum is CFG.
        norm_threshold: cap on the norm of the difference in ``space``, None for none; it grows with the square root of
            the number of values, so see `calibrate`.
        momentum: of a running sum of differences, in (−1, 1); negative values push away from the past.
        space: "x0" as in the paper (needs the scheduler's noise level), or "raw" for the network's own output.
        anchor: prediction that scale − 1 (cond, the paper) or scale (uncond, diffusers) differences are added to.

    Raises:
        UsageError: a value out of range.
    """

    scale: float = 7.5
    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = -0.5
    space: str = "x0"
    anchor: str = COND

    def __post_init__(self):
        check_number(self, "scale")
        check_number(self, "eta")
        check_number(self, "momentum", -1.0, 1.0, open_ends=True)
        if self.norm_threshold is not None:
            check_number(self, "norm_threshold", 0.0, math.inf, open_ends=True)
        for name, known in (("space", ("x0", "raw")), ("anchor", (COND, UNCOND))):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)

    @property
    def requires(self):
        return frozenset({COND}) if self.scale == 1.0 and self.anchor == COND else super().requires

    @classmethod
    def from_diffusers_guider(cls, guider) -> Rule:
        """The rule that computes what a diffusers AdaptiveProjectedGuidance does, its interval and rescaling included.

        Raises:
            UsageError: a guider of another class, or one with norms over some axes only.
        """
        if (
            type(guider).__name__ != "AdaptiveProjectedGuidance"
            or guider.adaptive_projected_guidance_norm_dim is not None
        ):
            raise UsageError(f"Pass an AdaptiveProjectedGuidance of diffusers without norm_dim; got {guider!r}.")
        scale, span, original = guider.guidance_scale, (guider._start, guider._stop), guider.use_original_formulation
        if not guider._enabled or span[0] >= span[1] or math.isclose(scale, 0.0 if original else 1.0):
            return CFG(1.0)
        cap, momentum = guider.adaptive_projected_guidance_rescale, guider.adaptive_projected_guidance_momentum or 0.0
        end = (scale + 1.0, COND) if original else (scale, UNCOND)
        rule = cls(end[0], guider.eta, cap if cap > 0 else None, momentum, "raw", end[1])
        rule = Rescale(rule, guider.guidance_rescale) if guider.guidance_rescale > 0 else rule
        return rule if span == (0.0, 1.0) else _IntervalOfDiffusers(rule, fraction_range=span)

    def __call__(self, predictions, context):
        c = predictions[COND]
        if UNCOND not in self.requires:
            return c
        u = predictions[UNCOND]
        a, b = context.level.affine("sample") if self.space == "x0" else (0.0, 1.0)
        if b == 0.0:  # at the clean end the state is x0, whatever is predicted
            return c
        onto = b * c if a == 0.0 else a * context.x.to(c.dtype) + b * c
        change = self.difference(b * (c - u), onto, context) / b
        return c + (self.scale - 1.0) * change if self.anchor == COND else u + self.scale * change

    def difference(self, difference: torch.Tensor, onto: torch.Tensor, context: Context) -> torch.Tensor:
        """The difference (B, …) of two predictions after momentum, cap and projection along ``onto``."""
        if self.momentum:
            past = context.memory.get("difference")
            if past is not None and past.shape == difference.shape:
                difference = difference + self.momentum * past
            context.memory["difference"] = difference
        return functional.projected(functional.capped(difference, self.norm_threshold), onto, self.eta)


@dataclass(frozen=True)
class CFGZeroStar(Rule):
    """CFG-Zero*: the unconditional prediction scaled to fit the conditional one, for flow models (Fan et al. 2025).

    Args:
        scale: as in `CFG`.
        zero_init_steps: first evaluations in which the velocity is 0, so that the state does not move; flow models only.

    Raises:
        UsageError: a value out of range.
    """

    scale: float = 7.5
    zero_init_steps: int = 0

    def __post_init__(self):
        check_number(self, "scale")
        if not is_number(self.zero_init_steps, numbers.Integral) or self.zero_init_steps < 0:
            raise UsageError(f"zero_init_steps must be a whole number of at least 0; got {self.zero_init_steps!r}.")

    def branches(self, context):
        return frozenset({COND}) if context.step < self.zero_init_steps else self.requires

    def __call__(self, predictions, context):
        c = predictions[COND]
        if context.step < self.zero_init_steps:
            kind = context.level.prediction_type
            if kind != "flow_prediction":
                raise GuidanceError(f"zero_init_steps is for flow models, this one predicts {kind}; set it to 0.")
            return torch.zeros_like(c)
        return functional.zero_star(c, predictions[UNCOND], self.scale)


@dataclass(frozen=True)
class AutoGuidance(Rule):
    """Guidance by a worse version of the model: weak + scale·(c − weak) (Karras et al. 2024).

    Args:
        scale: as in `CFG`.
        model: the weak network: same inputs and outputs as the pipeline's own, on the same device.
    """

    scale: float = 2.0
    model: torch.nn.Module = field(default=None, repr=False)

    def __post_init__(self):
        check_number(self, "scale")
        if not isinstance(self.model, torch.nn.Module):
            raise UsageError("AutoGuidance needs model=, a second network with the inputs and outputs of the first.")

    @property
    def requires(self):
        return frozenset({COND, "weak"})

    def extra(self, branch):
        return Extra(network=self.model)

    def __call__(self, predictions, context):
        return functional.classifier_free(predictions[COND], predictions["weak"], self.scale)


@dataclass(frozen=True)
class PerpNeg(Rule):
    """Negative prompts that only remove what is not part of the positive one (Armandpour et al. 2023, Perp-Neg).

    Args:
        scale: as in `CFG`.
        negatives: one or more prompts or classes, or arguments of the pipeline's call that state a condition, such as
            {"prompt_embeds": …} with all that belongs to it there (pooled embeddings, masks). One serves every prompt of
            the call; else as many as these. The call's own negative prompt must be empty.
        weights: of the negatives, ≥ 0; one number for all or one each.

    Raises:
        UsageError: no negatives, or weights that do not fit.
    """

    scale: float = 7.5
    negatives: tuple = ()
    weights: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        check_number(self, "scale")
        several = self.negatives if isinstance(self.negatives, (tuple, list)) else (self.negatives,)
        if not several or not all(map(_states, several)):
            raise UsageError(
                'PerpNeg needs negatives, such as PerpNeg(negatives="blurry"): prompts, classes or arguments of the call that '
                f"state a condition, as prompt_embeds and class_labels do; got {self.negatives!r}."
            )
        object.__setattr__(self, "negatives", tuple(several))
        several = isinstance(self.weights, (tuple, list))
        weights = tuple(self.weights) if several else (self.weights,) * len(self.negatives)
        if len(weights) != len(self.negatives) or not all(is_number(weight) and weight >= 0 for weight in weights):
            raise UsageError(f"PerpNeg needs a weight ≥ 0 per negative ({len(self.negatives)}); got {self.weights!r}.")
        object.__setattr__(self, "weights", weights)

    @property
    def _names(self) -> list[str]:
        return [f"negative{index}" for index in range(len(self.negatives))]

    @property
    def requires(self):
        return frozenset({COND, UNCOND, *self._names})

    def extra(self, branch):
        negative = self.negatives[self._names.index(branch)]
        if isinstance(negative, Mapping):
            return Extra(arguments=negative)
        return Extra(arguments={"prompt" if isinstance(negative, str) else "class_labels": negative})

    def __call__(self, predictions, context):
        negatives = [predictions[name] for name in self._names]
        return functional.perpendicular_negatives(
            predictions[COND], predictions[UNCOND], negatives, self.weights, self.scale
        )


def _states(negative) -> bool:
    """Whether a negative states a condition."""
    if isinstance(negative, Mapping):
        kinds = ("prompt", "class", "label", "image", "embeds")
        return any(any(kind in name for kind in kinds) and "negative" not in name for name in negative)
    return isinstance(negative, str) or is_number(negative, numbers.Integral)


@dataclass(frozen=True)
class Rescale(Wrapper):
    """Another rule's result, brought towards the standard deviation of c (Lin et al. 2023); "guidance_rescale" elsewhere.

    Args:
        rule: any rule that leaves the state after the step alone.
        factor: 0 changes nothing, 1 matches the deviation; 0.7 in the paper.

    Raises:
        UsageError: a value out of range, or another rule.
    """

    rule: Rule = field(default_factory=CFG)
    factor: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "factor", 0.0, 1.0)
        if self.corrects:
            raise UsageError(
                f"{self.title} goes on after the step with its own prediction, which Rescale would change."
            )

    def __call__(self, predictions, context):
        return functional.rescaled(super().__call__(predictions, context), predictions[COND], self.factor)


@dataclass(frozen=True)
class Interval(Wrapper):
    """Another rule inside a range of noise levels or steps, the conditional prediction alone outside of it.

    Outside the range the other branches are not computed (Kynkäänniemi et al. 2024).

    Args:
        rule: any rule.
        sigma_range: (low, high], noise-to-signal ratios σ/α in which the rule acts, the same numbers for VP, EDM and
            flow models; SDXL in the paper: (0.28, 5.42).
        fraction_range: [start, stop), shares of the run's evaluations, 0 its beginning and 1 its end.

    Raises:
        UsageError: neither range, or an empty one.
    """

    rule: Rule = field(default_factory=CFG)
    sigma_range: tuple[float, float] | None = None
    fraction_range: tuple[float, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.sigma_range is None and self.fraction_range is None:
            raise UsageError("Interval needs sigma_range=(low, high) or fraction_range=(start, stop).")
        for name, high in (("sigma_range", math.inf), ("fraction_range", 1.0)):
            ends = getattr(self, name)
            if ends is not None:
                two = isinstance(ends, (tuple, list)) and len(ends) == 2 and is_number(ends[0])
                if not (two and (is_number(ends[1]) or ends[1] == high) and 0.0 <= ends[0] < ends[1] <= high):
                    raise UsageError(f"{name} must be two numbers, 0 ≤ low < high ≤ {high:g}; got {ends!r}.")
                object.__setattr__(self, name, tuple(map(float, ends)))

    @staticmethod
    def _whole(end: float) -> int:
        """The first evaluation at or after an end, which may be a rounding error away."""
        return math.ceil(end - 1e-9)

    def active(self, context: Context) -> bool:
        """Whether the rule acts in this evaluation.

        Raises:
            GuidanceError: the position in the run is needed and unknown.
        """
        if self.fraction_range is not None:
            if context.steps is None:
                raise GuidanceError("The number of evaluations of this run is unknown; use sigma_range.")
            first, last = (self._whole(end * context.steps) for end in self.fraction_range)
            if not first <= context.step < last:
                return False
        return self.sigma_range is None or inside(self.sigma_range, context.level.rho)

    def branches(self, context):
        return super().branches(context) if self.active(context) else frozenset({COND})

    def __call__(self, predictions, context):
        return super().__call__(predictions, context) if self.active(context) else predictions[COND]

    def correct(self, state, context):
        return super().correct(state, context) if self.active(context) else state


class _IntervalOfDiffusers(Interval):
    """Ends as guiders of diffusers round them."""

    _whole = staticmethod(int)


def inside(sigma_range: tuple[float, float], rho: float) -> bool:
    """Whether a noise-to-signal ratio lies in (low, high]."""
    return sigma_range[0] < rho <= sigma_range[1]


@dataclass(frozen=True)
class CFGPlusPlus(Rule):
    """CFG++: denoise with guidance, renoise with the unconditional prediction (Chung et al. 2025).

    The state after the step is corrected by σ'·(ε_u − ε_guided), which is the paper's step for first-order samplers and
    its first-order part for multistep ones. Those that extrapolate ε (DEIS, iPNDM, LMS) take up only a part of it, those
    that extrapolate x0 (DPM-Solver++) all.

    Args:
        scale: the paper's λ in [0, 1]; 0.6 is about CFG at 7.5.

    Raises:
        UsageError: a scale outside [0, 1].
    """

    scale: float = 0.6

    def __post_init__(self):
        check_number(self, "scale", 0.0, 1.0)

    def __call__(self, predictions, context):
        c, u = predictions[COND], predictions[UNCOND]
        _, to_noise = context.level.affine("epsilon")
        context.memory["correction"] = (context.target.kept * to_noise * self.scale) * (u - c)
        return functional.classifier_free(c, u, self.scale)

    def correct(self, state, context):
        return state + context.memory.pop("correction").to(state.dtype)
