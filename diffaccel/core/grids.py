"""Time grids: at which noise levels a sampler calls the network.

A grid of N steps has N+1 nodes: N network calls, noisiest first, and the end level. The end is the clean image
("zero": α = 1, σ = 0) or the cleanest level of training ("sigma_min"). The rules themselves are in `spacings`.
"""

import functools
import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import UsageError, unknown
from .schedule import Flow, NoiseSchedule, VPDiscrete
from .spacings import GRIDS, Options, Span

ENDS = ("zero", "sigma_min")
SHIFT_TYPES = ("exponential", "linear")


@dataclass(frozen=True)
class Grid:
    """Nodes of one sampling run, float64, noisiest first, N+1 of each.

    Attributes:
        schedule: the noise schedule that the times belong to.
        times: native times, strictly decreasing; a clean end node has the schedule's ``t_end``.
        alpha, sigma: noise level of the nodes: native, but the last in the scale of results
            (`NoiseSchedule.end_from_rho`). α may be 0 at the first node and σ at the last.
    """

    schedule: NoiseSchedule
    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    def __post_init__(self):
        if not len(self.times) == len(self.alpha) == len(self.sigma) >= 2:
            raise UsageError("A grid needs at least two nodes and as many alphas and sigmas as times.")
        if not all(later < earlier for earlier, later in itertools.pairwise(self.times)):  # a NaN fails, too
            raise UsageError(f"Grid times must be strictly decreasing, the end included; got {_short(self.times)}.")
        if not all(later < earlier for earlier, later in itertools.pairwise(self.rho)):
            raise UsageError(f"Noise levels must be strictly decreasing, the end included; got {_short(self.rho)}.")

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.times) - 1

    @functools.cached_property
    def rho(self) -> tuple[float, ...]:
        """σ/α of the nodes; infinite where α = 0."""
        return tuple(s / a if a > 0 else float("inf") for a, s in zip(self.alpha, self.sigma, strict=True))

    def tail(self, start: int) -> "Grid":
        """The grid without its first ``start`` steps."""
        return Grid(self.schedule, self.times[start:], self.alpha[start:], self.sigma[start:])


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move flow noise levels σ ∈ [0, 1] towards noise: sσ/(1 + (s−1)σ) (Esser et al. 2024, eq. 23)."""
    return sigma / (sigma + (1.0 - sigma) / shift)  # so written, 1 stays exactly 1


def shift_from_mu(mu: float, kind: str = "exponential") -> float:
    """The shift that a resolution-dependent ``mu`` stands for: e^mu ("exponential") or mu ("linear").

    Raises:
        UsageError: unknown kind.
    """
    if kind not in SHIFT_TYPES:
        raise unknown("time_shift_type", str(kind), SHIFT_TYPES)
    return float(torch.tensor(mu, dtype=torch.float64).exp()) if kind == "exponential" else float(mu)


def make_grid(
    schedule: NoiseSchedule,
    steps: int | None = None,
    kind: str = "trailing",
    *,
    end: str = "zero",
    options: Options | None = None,
    shift: float = 1.0,
    shift_terminal: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Grid:
    """Place the network calls of one run.

    Args:
        schedule: noise schedule of the model.
        steps: number of steps N ≥ 1; may be left out with explicit timesteps or sigmas.
        kind: a name in `GRIDS`. On a discrete table trailing, leading and linspace give whole timesteps as diffusers
            computes them; where that would repeat one or leave the table, the same span is divided evenly instead.
        end: "zero" or "sigma_min". With "sigma_min" the end level is not a node to call the network at.
        options: parameters of single rules.
        shift: flow only; moves every level of a rule in t, the two ends of a rule in noise, and ``sigmas``.
        shift_terminal: flow only, the σ that the last call is stretched to after shifting.
        timesteps: explicit native times of the calls, strictly decreasing, taken as they are. Like ``sigmas`` a list, a
            numpy array or a tensor.
        sigmas: explicit levels of the calls, rho for VP, VE and EDM, σ for flow (then shifted); a last 0 is the end
            node. On a flow a rule in noise (karras, beta, …) takes only their ends and number, as in diffusers, because
            pipelines for flows pass evenly spaced ones whatever the scheduler.

    Raises:
        UsageError: unknown kind or end, a bad number of steps, levels that are off the table or not decreasing.
    """
    if kind not in GRIDS:
        raise unknown("grid", str(kind), GRIDS)
    if end not in ENDS:
        raise unknown("final_sigmas_type", str(end), ENDS)
    if timesteps is not None and sigmas is not None:
        raise UsageError("Pass either timesteps or sigmas, not both.")
    explicit = None
    if timesteps is not None or sigmas is not None:
        explicit, given = _explicit_times(schedule, timesteps, sigmas)
        if steps is not None and steps not in (len(explicit), given):
            raise UsageError(f"num_inference_steps is {steps} but {len(explicit)} timesteps or sigmas were given.")
        steps = len(explicit)
    elif not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < 1:
        raise UsageError(f"num_inference_steps must be a whole number of at least 1; got {steps!r}.")

    if not shift > 0.0:
        raise UsageError(f"The shift of a flow must be above 0, 1 for none; got {shift!r}.")

    clean, edges = end == "zero", torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    # Where "sigma_min" ends: below every call, also where a shift moves these towards the clean image.
    last = min(schedule.t_min, float(_shifted(schedule, edges, shift)[1]))
    if timesteps is not None:
        times = explicit
    elif GRIDS[kind].in_noise and (explicit is None or isinstance(schedule, Flow)):
        edges = _shifted(schedule, edges if explicit is None else explicit, shift, shift_terminal)
        span = Span(schedule, float(edges[0]), float(edges[-1]), schedule.t_clean if clean else last, clean)
        times = _placed(span, steps, kind, end, options or Options())
    else:
        span = Span(schedule, *edges.tolist(), schedule.t_clean if clean else schedule.t_min, clean)
        times = _placed(span, steps, kind, end, options or Options()) if explicit is None else explicit
        times = _shifted(schedule, times, shift, shift_terminal)
    return _with_end(schedule, times, end, last)


def _shifted(schedule, times, shift, terminal=None):
    """The times of a flow after its shift and the stretch to the terminal σ; others as they are."""
    if not isinstance(schedule, Flow):
        return times
    sigma = shift_sigma(times / schedule.t_max, shift)
    if terminal and sigma[-1] < 1.0:  # a single call at pure noise cannot be stretched
        sigma = 1.0 - (1.0 - sigma) * (1.0 - terminal) / (1.0 - sigma[-1])
    return sigma * schedule.t_max


def _placed(span, steps, kind, end, options):
    points = GRIDS[kind].points

    def legal(times):
        above = times[-1] > span.end if end == "sigma_min" else times[-1] >= span.bottom
        return bool(above and times[0] <= span.top and (times.diff() < 0).all())

    times = points(span, steps, options)
    if end == "sigma_min" and times[-1] <= span.end:
        times = points(span, steps + 1, options)[:-1]  # the rule's last point is the end node
    if legal(times):
        return times
    # Where the rule starts, if it does start above the end: leading may not, with more steps than the table has times.
    first = times[0].clamp(max=span.top) if steps > 1 and times[0] > times[-1] else span.top
    if end == "sigma_min":
        return torch.linspace(float(first), span.end, steps + 1, dtype=torch.float64)[:-1]
    last = min(max(float(times[-1]), span.bottom), float(first))
    return torch.linspace(float(first), last if last < first else span.bottom, steps, dtype=torch.float64)


def _explicit_times(schedule, timesteps, sigmas):
    """The times of explicit calls, and how many numbers were given for them."""
    given = timesteps if sigmas is None else sigmas
    try:  # float() takes numbers of any library, on any device
        numbers = given.tolist() if hasattr(given, "tolist") else [float(value) for value in given]
        values = torch.tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError):
        values = torch.empty(0)
    if values.ndim != 1 or values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise UsageError("timesteps and sigmas must be non-empty lists of finite numbers.")
    count = len(values)
    if sigmas is None:
        low = min(schedule.t_clean, schedule.t_min)
        slack = 1e-6 * (schedule.t_max - low)  # times that went through float32
        if values.max() > schedule.t_max + slack or values.min() < low - slack:
            raise UsageError(
                f"timesteps must lie between {schedule.t_min:g} and {schedule.t_max:g}; got {_short(values.tolist())}."
            )
        if values[-1] == schedule.t_clean < schedule.t_min and count > 1:
            values = values[:-1]  # the clean image of a flow
        return values.clamp(low, schedule.t_max), count
    if values[-1] == 0 and count > 1:
        values = values[:-1]
    if isinstance(schedule, Flow):
        if values.max() > 1.0 or values.min() <= 0.0:
            raise UsageError(f"Flow sigmas must lie in (0, 1]; got {_short(values.tolist())}.")
        return values * schedule.t_max, count
    low, high = float(schedule.rho(schedule.t_min)), float(schedule.rho(schedule.t_max))
    if values.max() > 1.01 * high or values.min() < 0.99 * low:
        raise UsageError(f"sigmas must lie between {low:.4g} and {high:.4g}; got {_short(values.tolist())}.")
    times = schedule.t_from_rho(values)
    whole = torch.round(times)
    on_table = isinstance(schedule, VPDiscrete) & (torch.abs(times - whole) < 1e-6)
    return torch.where(on_table, whole, times), count


def _with_end(schedule, times, end, last):
    alpha, sigma = schedule.level(times)
    end_time = schedule.t_end if end == "zero" else last
    end_alpha, end_sigma = schedule.end_from_rho(0.0 if end == "zero" else schedule.rho(end_time))
    return Grid(
        schedule,
        (*times.tolist(), end_time),
        (*alpha.tolist(), float(end_alpha)),
        (*sigma.tolist(), float(end_sigma)),
    )


def _short(values) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return f"[{shown}, …]" if len(values) > 4 else f"[{shown}]"
