"""Time grids: at which noise levels a sampler calls the network.

A grid of N steps has N+1 nodes: N network calls, noisiest first, and the end level. The end is the clean image
("zero": α = 1, σ = 0) or the cleanest level of training ("sigma_min").
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .errors import UsageError, unknown
from .schedule import Flow, NoiseSchedule, VPDiscrete

ENDS = ("zero", "sigma_min")
SHIFT_TYPES = ("exponential", "linear")


@dataclass(frozen=True)
class Grid:
    """Nodes of one sampling run, float64, noisiest first, N+1 of each.

    Attributes:
        schedule: the noise schedule that the times belong to.
        times: native times, strictly decreasing. A clean end node has time 0, or −1 on a discrete table, whose
            time 0 is still noisy.
        alpha, sigma: native noise level of the nodes; α may be 0 at the first node and σ at the last.
    """

    schedule: NoiseSchedule
    times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]

    def __post_init__(self):
        if not len(self.times) == len(self.alpha) == len(self.sigma) >= 2:
            raise UsageError("A grid needs at least two nodes and as many alphas and sigmas as times.")
        if any(later >= earlier for earlier, later in itertools.pairwise(self.times)):
            raise UsageError(f"Grid times must be strictly decreasing, the end included; got {_short(self.times)}.")

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


@dataclass(frozen=True)
class GridKind:
    """A rule for placing the network calls; ``points(schedule, count, end_time, options)`` returns their times."""

    name: str
    summary: str
    source: str
    points: Callable[[NoiseSchedule, int, float, "Options"], torch.Tensor]


@dataclass(frozen=True)
class Options:
    """Parameters of single rules: ``steps_offset`` of leading, exponent ``kappa`` of quadratic, ``karras_rho``."""

    steps_offset: int = 0
    kappa: float = 2.0
    karras_rho: float = 7.0


def _fractions(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64) / count


def _trailing(schedule, count, end_time, options):
    if isinstance(schedule, VPDiscrete):
        size = schedule.t_max + 1.0
        return torch.round(size - size * _fractions(count)) - 1.0
    return schedule.t_max + (end_time - schedule.t_max) * _fractions(count)


def _leading(schedule, count, end_time, options):
    if isinstance(schedule, VPDiscrete):
        stride = int(schedule.t_max + 1) // count
        return torch.arange(count - 1, -1, -1, dtype=torch.float64) * stride + options.steps_offset
    return schedule.t_min + (schedule.t_max - schedule.t_min) * _fractions(count).flip(0)


def _linspace(schedule, count, end_time, options):
    times = torch.linspace(schedule.t_max, schedule.t_min, count, dtype=torch.float64)
    return torch.round(times) if isinstance(schedule, VPDiscrete) else times


def _quadratic(schedule, count, end_time, options):
    power = 1.0 / options.kappa
    top, floor = schedule.t_max**power, max(end_time, 0.0) ** power
    times = (top + (floor - top) * _fractions(count)) ** options.kappa
    if times[-1] >= schedule.t_min:
        return times
    bottom = schedule.t_min**power
    return (top + (bottom - top) * torch.linspace(0.0, 1.0, count, dtype=torch.float64)) ** options.kappa


def _karras(schedule, count, end_time, options):
    edges = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    # A flow starts at rho = ∞, so there the rule is applied to σ itself, as diffusers does.
    top, bottom = (schedule.sigma(edges) if isinstance(schedule, Flow) else schedule.rho(edges)) ** (
        1.0 / options.karras_rho
    )
    level = (top + (bottom - top) * torch.linspace(0.0, 1.0, count, dtype=torch.float64)) ** options.karras_rho
    times = level * schedule.t_max if isinstance(schedule, Flow) else schedule.t_from_rho(level)
    return _pin_ends(times, schedule)


def _log_snr(schedule, count, end_time, options):
    top, bottom = schedule.rho(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).log()
    if torch.isinf(top):  # pure noise has no log-SNR: space the rest as if it lay as far out as t_min does
        top = -bottom
    level = torch.exp(top + (bottom - top) * torch.linspace(0.0, 1.0, count, dtype=torch.float64))
    return _pin_ends(schedule.t_from_rho(level), schedule)


def _pin_ends(times, schedule):
    """Undo the rounding of the way through rho and back at the two ends."""
    times[0] = schedule.t_max
    if len(times) > 1:
        times[-1] = schedule.t_min
    return times


_LIN = "Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, table 2"
GRIDS = {
    kind.name: kind
    for kind in (
        GridKind("trailing", "uniform in t, the first call at pure noise; best at few steps", _LIN, _trailing),
        GridKind("leading", "uniform in t from the clean end, never reaches pure noise", _LIN, _leading),
        GridKind("linspace", "uniform in t with a call at both ends of the table", _LIN, _linspace),
        GridKind("quadratic", "uniform in t^(1/kappa), kappa = 2", "Zhang & Chen 2023 (DEIS)", _quadratic),
        GridKind("karras", "uniform in rho^(1/7) (flow: sigma^(1/7))", "Karras et al. 2022 (EDM), eq. 5", _karras),
        GridKind("log-snr", "uniform in the logarithm of rho", "Lu et al. 2022 (DPM-Solver)", _log_snr),
    )
}


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move flow noise levels σ ∈ [0, 1] towards noise: sσ/(1 + (s−1)σ) (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


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
        end: "zero" or "sigma_min". With "sigma_min" the end level itself is never a network call.
        options: parameters of single rules.
        shift: flow only, applied to every rule in t and to ``sigmas``; 1 changes nothing.
        shift_terminal: flow only, the σ that the last call is stretched to after shifting.
        timesteps: explicit native times of the calls, strictly decreasing, taken as they are.
        sigmas: explicit levels of the calls, rho for VP and VE, σ for flow (then shifted); a last 0 is the end node.

    Raises:
        UsageError: unknown kind or end, a bad number of steps, levels that are off the table or not decreasing.
    """
    if kind not in GRIDS:
        raise unknown("grid", str(kind), GRIDS)
    if end not in ENDS:
        raise unknown("final_sigmas_type", str(end), ENDS)
    if timesteps is not None and sigmas is not None:
        raise UsageError("Pass either timesteps or sigmas, not both.")
    explicit = timesteps if timesteps is not None else sigmas
    if explicit is None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise UsageError(f"num_inference_steps must be a whole number of at least 1; got {steps!r}.")
        times = _placed(schedule, steps, kind, end, options or Options())
    else:
        times = _explicit_times(schedule, timesteps, sigmas)
        if steps is not None and steps not in (len(times), len(explicit)):
            raise UsageError(f"num_inference_steps is {steps} but {len(times)} timesteps or sigmas were given.")
    if isinstance(schedule, Flow) and timesteps is None and (explicit is not None or kind not in ("karras", "log-snr")):
        times = schedule.t_max * shift_sigma(times / schedule.t_max, shift)
    if isinstance(schedule, Flow) and timesteps is None and shift_terminal:
        times = schedule.t_max - (schedule.t_max - times) * (1.0 - shift_terminal) / (1.0 - times[-1] / schedule.t_max)
    return _with_end(schedule, times, end)


def _placed(schedule, steps, kind, end, options):
    end_time = schedule.t_min if end == "sigma_min" else 0.0
    points = GRIDS[kind].points

    def legal(times):
        above = times[-1] > schedule.t_min if end == "sigma_min" else times[-1] >= schedule.t_min
        return bool(above and times[0] <= schedule.t_max and (times.diff() < 0).all())

    times = points(schedule, steps, end_time, options)
    if end == "sigma_min" and times[-1] <= schedule.t_min:
        times = points(schedule, steps + 1, end_time, options)[:-1]  # the rule's last point is the end node
    if legal(times):
        return times
    first = times[0].clamp(schedule.t_min, schedule.t_max) if steps > 1 else schedule.t_max
    if end == "sigma_min":
        return torch.linspace(float(first), schedule.t_min, steps + 1, dtype=torch.float64)[:-1]
    last = min(max(float(times[-1]), schedule.t_min), float(first))
    return torch.linspace(float(first), last if last < first else schedule.t_min, steps, dtype=torch.float64)


def _explicit_times(schedule, timesteps, sigmas):
    values = torch.as_tensor(list(timesteps if sigmas is None else sigmas), dtype=torch.float64)
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise UsageError("timesteps and sigmas must be non-empty lists of finite numbers.")
    if sigmas is None:
        if values.max() > schedule.t_max or values.min() < 0:
            raise UsageError(
                f"timesteps must lie between {schedule.t_min:g} and {schedule.t_max:g}; got {_short(values.tolist())}."
            )
        return values
    if values[-1] == 0 and len(values) > 1:
        values = values[:-1]
    if isinstance(schedule, Flow):
        if values.max() > 1.0 or values.min() <= 0.0:
            raise UsageError(f"Flow sigmas must lie in (0, 1]; got {_short(values.tolist())}.")
        return values * schedule.t_max
    low, high = float(schedule.rho(schedule.t_min)), float(schedule.rho(schedule.t_max))
    if values.max() > 1.01 * high or values.min() < 0.99 * low:
        raise UsageError(f"sigmas must lie between {low:.4g} and {high:.4g}; got {_short(values.tolist())}.")
    times = schedule.t_from_rho(values)
    whole = torch.round(times)
    on_table = isinstance(schedule, VPDiscrete) & (torch.abs(times - whole) < 1e-6)
    return torch.where(on_table, whole, times)


def _with_end(schedule, times, end):
    if end == "zero":
        alpha, sigma = schedule.level(times)
        end_time = -1.0 if isinstance(schedule, VPDiscrete) else 0.0
        return Grid(schedule, (*times.tolist(), end_time), (*alpha.tolist(), 1.0), (*sigma.tolist(), 0.0))
    times = torch.cat([times, torch.tensor([schedule.t_min], dtype=torch.float64)])
    alpha, sigma = schedule.level(times)
    return Grid(schedule, tuple(times.tolist()), tuple(alpha.tolist()), tuple(sigma.tolist()))


def _short(values) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return f"[{shown}, …]" if len(values) > 4 else f"[{shown}]"
