"""The rules that place network calls between the noisiest and the cleanest level: `GRIDS`."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .errors import UsageError
from .quantiles import beta_quantile
from .schedule import VE, Flow, NoiseSchedule, VPDiscrete, VPLinear

# Align Your Steps: noise levels rho of the ten calls.
AYS_SIGMAS = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}


_REFERENCE = VPLinear(t_min=0.0, t_max=float("inf"))  # whose time the grid "fast" divides, whatever the model's own is


@dataclass(frozen=True)
class Span:
    """What a rule fills with network calls.

    Attributes:
        schedule: whose times these are.
        top, bottom: the first call and the cleanest one that is allowed.
        end: the time that rules in t step towards: the clean image, or the level at which the run ends.
        clean: whether the run ends at the clean image.
    """

    schedule: NoiseSchedule
    top: float
    bottom: float
    end: float
    clean: bool


@dataclass(frozen=True)
class GridKind:
    """A rule for placing the network calls; ``points(span, count, options)`` returns their times.

    Attributes:
        in_noise: the rule places noise levels between two ends, not times. On a flow only the ends are shifted then, as
            in diffusers, and not every level.
    """

    name: str
    summary: str
    source: str
    points: Callable[[Span, int, "Options"], torch.Tensor]
    in_noise: bool = False


@dataclass(frozen=True)
class Options:
    """Parameters of single rules.

    Attributes:
        steps_offset: added to the times of leading on a discrete table.
        power: exponent of the power rules: kappa of quadratic (None: 2) and of fast (None: 1.75), rho of karras (None: 7).
        start: noise level rho of the first call of fast, at most; None: max(20, 4 per call).

    Raises:
        UsageError: a power or a start that is not a positive number.
    """

    steps_offset: int = 0
    power: float | None = None
    start: float | None = None

    def __post_init__(self):
        for name, value in (("grid_power", self.power), ("grid_start", self.start)):
            if value is not None and not 0.0 < value < float("inf"):
                raise UsageError(f"{name} must be a number above 0, or None for the rule's own; got {value!r}.")


def _fractions(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64) / count


def _ramp(top, bottom, count: int) -> torch.Tensor:
    return top + (bottom - top) * torch.linspace(0.0, 1.0, count, dtype=torch.float64)


def _trailing(span, count, options):
    if isinstance(span.schedule, VPDiscrete):
        size = span.top + 1.0
        return torch.round(size - size * _fractions(count)) - 1.0
    return span.top + (span.end - span.top) * _fractions(count)


def _leading(span, count, options):
    if isinstance(span.schedule, VPDiscrete):
        stride = int(span.top + 1) // count
        return torch.arange(count - 1, -1, -1, dtype=torch.float64) * stride + options.steps_offset
    return span.bottom + (span.top - span.bottom) * _fractions(count).flip(0)


def _linspace(span, count, options):
    times = torch.linspace(span.top, span.bottom, count, dtype=torch.float64)
    return torch.round(times) if isinstance(span.schedule, VPDiscrete) else times


def _quadratic(span, count, options):
    kappa = options.power or 2.0
    origin = span.schedule.t_clean
    top, bottom, end = ((time - origin) ** (1.0 / kappa) for time in (span.top, span.bottom, span.end))
    times = origin + (top + (end - top) * _fractions(count)) ** kappa
    times[0] = span.top
    return times if times[-1] >= span.bottom else _pinned(span, origin + _ramp(top, bottom, count) ** kappa)


def _fast(span, count, options):
    if isinstance(span.schedule, Flow):
        return _trailing(span, count, options)
    power = options.power or 1.75
    top, bottom, end = span.schedule.rho(torch.tensor([span.top, span.bottom, span.end], dtype=torch.float64))
    if span.clean:
        end = torch.zeros_like(end)
    first = float(top)
    # VE states are not in the scale of the noise, and networks for zero terminal SNR are trained to start from pure noise.
    if not isinstance(span.schedule, VE) and first < 1000.0:
        first = min(first, options.start or max(20.0, 4.0 * count))
    if first <= float(bottom):
        raise UsageError(
            f"grid_start must be above {float(bottom):.3g}, the cleanest level of the model; got {first:g}."
        )
    edges = _REFERENCE.t_from_rho(torch.stack([torch.full_like(top, first), bottom, end])) ** (1.0 / power)
    times = (edges[0] + (edges[2] - edges[0]) * _fractions(count)) ** power
    if times[-1] < edges[1] ** power:
        times = _ramp(edges[0], edges[1], count) ** power
    times = span.schedule.t_from_rho(_REFERENCE.rho(times))
    if first == float(top):
        times[0] = span.top
    return times


def _karras(span, count, options):
    rho = options.power or 7.0
    return _times(span, _ramp(*_ends(span) ** (1.0 / rho), count) ** rho)


def _exponential(span, count, options):
    return _times(span, torch.exp(_ramp(*_ends(span).log(), count)))


def _beta(span, count, options):
    top, bottom = _ends(span)
    return _times(span, bottom + (top - bottom) * beta_quantile(_ramp(1.0, 0.0, count), 0.6))


def _log_snr(span, count, options):
    top, bottom = span.schedule.rho(_edges(span)).log()
    if torch.isinf(top):  # pure noise has no log-SNR: space the rest as if it lay as far out as the cleanest call does
        top = -bottom
    return _pinned(span, span.schedule.t_from_rho(torch.exp(_ramp(top, bottom, count))))


def _ays(name: str):
    def points(span, count, options):
        if isinstance(span.schedule, Flow):
            raise UsageError(f"Grid {name!r} is a table for VP and EDM models; for a flow pass 'trailing' or 'beta'.")
        # The ends of the table are those of its model's range, so every model gets its own there, and levels outside it
        # are left out. The lowest knot is where the run ends: one more knot than calls.
        top, bottom = span.schedule.rho(_edges(span)).tolist()
        knots = np.log([top, *(level for level in AYS_SIGMAS[name][1:] if bottom < level < top), bottom])
        positions = np.linspace(0.0, len(knots) - 1.0, count + 1)[:-1]
        levels = np.exp(np.interp(positions, np.arange(len(knots)), knots))
        times = span.schedule.t_from_rho(torch.from_numpy(levels))
        times[0] = span.top
        return times

    return points


def _edges(span) -> torch.Tensor:
    return torch.tensor([span.top, span.bottom], dtype=torch.float64)


def _ends(span) -> torch.Tensor:
    """Noise levels of the two edges: rho, but σ on a flow, whose rho starts at infinity."""
    return (span.schedule.sigma if isinstance(span.schedule, Flow) else span.schedule.rho)(_edges(span))


def _times(span, levels: torch.Tensor) -> torch.Tensor:
    """Times of noise levels of the kind that `_ends` returns."""
    on_flow = isinstance(span.schedule, Flow)
    return _pinned(span, levels * span.schedule.t_max if on_flow else span.schedule.t_from_rho(levels))


def _pinned(span, times: torch.Tensor) -> torch.Tensor:
    """Undo the rounding of the way through noise levels and back at the two edges."""
    times[0] = span.top
    if len(times) > 1:
        times[-1] = span.bottom
    return times


_LIN = "Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, table 2"
_KARRAS = "Karras et al. 2022 (EDM), eq. 5"
_LEE = "Lee et al. 2024, Beta Sampling is All You Need"
_AYS = "Sabour, Fidler & Kreis 2024, Align Your Steps"
GRIDS = {
    kind.name: kind
    for kind in (
        GridKind("trailing", "uniform in t, the first call at pure noise", _LIN, _trailing),
        GridKind("leading", "uniform in t from the clean end, never reaches pure noise", _LIN, _leading),
        GridKind("linspace", "uniform in t with a call at both ends of the table", _LIN, _linspace),
        GridKind("quadratic", "uniform in t^(1/power), power 2", "Zhang & Chen 2023 (DEIS)", _quadratic),
        GridKind(
            "fast",
            "uniform in (time of the linear VP schedule)^(1/power), power 1.75, from rho = max(20, 4 per call) at most",
            "benchmarks/samplers.py",
            _fast,
        ),
        GridKind("karras", "uniform in rho^(1/power), power 7 (flow: in sigma)", _KARRAS, _karras, True),
        GridKind("exponential", "uniform in log rho (flow: in log sigma)", "diffusers", _exponential, True),
        GridKind("log-snr", "uniform in log rho, on flows too", "Lu et al. 2022 (DPM-Solver)", _log_snr, True),
        GridKind("beta", "Beta(0.6, 0.6) quantiles in rho (flow: in sigma), dense at both ends", _LEE, _beta, True),
        GridKind("ays-sd15", "optimised for Stable Diffusion 1.5", _AYS, _ays("ays-sd15"), True),
        GridKind("ays-sdxl", "optimised for Stable Diffusion XL", _AYS, _ays("ays-sdxl"), True),
        GridKind("ays-svd", "optimised for Stable Video Diffusion", _AYS, _ays("ays-svd"), True),
    )
}
