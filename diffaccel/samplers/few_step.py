"""How a few-step student draws: its own list of times, in training (`FewStep`) and in pipelines (`FewStepScheduler`)."""

import functools
import itertools
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..core.errors import UsageError, unknown
from ..core.grids import Grid
from ..core.schedule import EDM, VE, Flow, NoiseSchedule, VPDiscrete
from .config import configured
from .plan import Plan, Row
from .shell import PlanScheduler

NOISES = ("fresh", "predicted")


@dataclass(frozen=True)
class FewStep:
    """The times at which a student is called, what it makes of its output there, and the states in between.

    States are in native scale, clean samples in that of results; both are (B, …) of any floating dtype.

    Attributes:
        times: of the calls, native and strictly decreasing. The first is fed noise alone.
        noise: of the states in between: "fresh" (as consistency models and DMD2 sample) or "predicted" (DDIM).
        boundary: how quickly the consistency function leaves the identity, per unit of time; 10 with times 0 … 999 is
            LCM. 0 for none: the student's clean sample is the network's.
        sigma_data: scale of the data in the consistency function.

    Raises:
        UsageError: no times or times that do not fall, an unknown noise, a boundary below 0, a scale that is not above 0.
    """

    times: tuple[float, ...]
    noise: str = "fresh"
    boundary: float = 0.0
    sigma_data: float = 0.5

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(map(float, self.times)))
        if not self.times or not all(later < earlier for earlier, later in itertools.pairwise(self.times)):
            raise UsageError(f"The times of a student must fall, and be at least one; got {list(self.times)}.")
        if self.noise not in NOISES:
            raise unknown("noise between steps", str(self.noise), NOISES)
        if not self.boundary >= 0.0 or not self.sigma_data > 0.0:
            raise UsageError(
                f"boundary must be at least 0 and sigma_data above 0; got {self.boundary}, {self.sigma_data}."
            )

    @classmethod
    def trailing(
        cls, schedule: NoiseSchedule, count: int, shift: float = 1.0, start: float = 1.0, **settings
    ) -> "FewStep":
        """Times at the fractions u = start, start·(1 − 1/count), … of the schedule's index.

        Whole numbers on a table, as diffusers' trailing spacing: 999, 749, 499, 249 for four.

        Args:
            schedule: of the teacher.
            count: number of calls.
            shift: multiply the noise-to-signal ratio; for flows s' = shift·s/(1 + (shift − 1)·s), Esser et al. 2024, eq. 23.
            start: fraction of the first call, in (0, 1].
            **settings: other attributes.

        Raises:
            UsageError: a count or a shift that is not above 0, a start outside (0, 1], more calls than the table has times.
        """
        if not count >= 1 or not shift > 0.0 or not 0.0 < start <= 1.0:
            raise UsageError(
                f"A list of times needs count ≥ 1, shift > 0 and 0 < start ≤ 1; got {count}, {shift:g}, {start:g}."
            )
        u = start * (1.0 - torch.arange(count, dtype=torch.float64) / count)
        table = isinstance(schedule, VPDiscrete)
        if table or isinstance(schedule, Flow):
            times = (schedule.t_max + 1.0) * u - 1.0 if table else schedule.t_max * u
        else:
            times = schedule.time(u)
        if shift != 1.0:
            times = schedule.t_from_rho(shift * schedule.rho(times))
        times = (times.round() if table else times).clamp(min=schedule.t_min)
        return cls(tuple(times.tolist()), **settings)

    def fewer(self, count: int) -> "FewStep":
        """The first time and others evenly chosen from the list, ``count`` in all; the whole list for more than it has."""
        if count >= len(self.times):
            return self
        chosen = tuple(self.times[index * len(self.times) // count] for index in range(count))
        return replace(self, times=chosen)

    def scale(self, schedule: NoiseSchedule) -> float:
        """Standard deviation of the state before the first call; 1 where a list that starts late is fed pure noise."""
        return float(schedule.sigma(self.times[0])) if isinstance(schedule, (VE, EDM)) else schedule.initial_scale

    def start(self, schedule: NoiseSchedule, noise: torch.Tensor) -> torch.Tensor:
        """The state before the first call: standard normal noise and nothing of a sample, whatever α is there."""
        return noise * self.scale(schedule)

    def consistency(self, schedule: NoiseSchedule, x_t: torch.Tensor, x0: torch.Tensor, t) -> torch.Tensor:
        """The student's clean sample f = c_skip·x_t + c_out·x0, which is x_t at the cleanest time.

        With s = boundary·(t − t_min), c_skip = σ_d²/(s² + σ_d²) and c_out = s/√(s² + σ_d²) (Luo et al. 2023, Latent
        Consistency Models, as diffusers' LCMScheduler computes it).

        Args:
            schedule: of the states.
            x_t: the network's input.
            x0: clean sample by the network's output.
            t: time of each sample (B,), or of all.
        """
        if self.boundary == 0.0:
            return x0
        t = torch.as_tensor(t, dtype=torch.float64)
        s = self.boundary * (t - schedule.t_min)
        c_skip = self.sigma_data**2 / (s**2 + self.sigma_data**2)
        c_out = s / torch.sqrt(s**2 + self.sigma_data**2)
        rho = schedule.rho(t)
        to_result = schedule.end_from_rho(rho)[1] / schedule.level_from_rho(rho)[1]
        return _like(c_skip * to_result, x_t) * x_t + _like(c_out, x0) * x0

    def renoise(
        self, schedule: NoiseSchedule, x0: torch.Tensor, x_t: torch.Tensor, index, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state at the time after ``times[index]``: α'·x0 + σ'·z, or with ε̂ = (x_t − α·x0)/σ in place of z.

        Args:
            schedule: of the states.
            x0: the student's clean sample.
            x_t: the state that it was called with.
            index: of the call, for all samples or (B,).
            noise: standard normal z; not needed where it is predicted.
        """
        now, following = self._level(schedule, index, x_t), self._level(schedule, index + 1, x_t)
        if self.noise == "predicted":
            noise = (x_t - now[0] * x0) / now[1]
        return following[0] * x0 + following[1] * noise

    def plan(self, schedule: NoiseSchedule) -> Plan:
        """The coefficients of a run, read off `consistency` and `renoise` by giving them one unit vector each."""
        x, x0, noise = torch.eye(3, dtype=torch.float64)
        rows = []
        for index, t in enumerate(self.times):
            result = self.consistency(schedule, x, x0, t)
            if index + 1 < len(self.times):
                result = self.renoise(schedule, result, x, index, noise)
            of_x, of_x0, of_noise = result.tolist()
            rows.append(Row(t, *map(float, schedule.level(t)), "sample", (of_x,), (of_x0,), of_noise))
        return Plan(tuple(rows), name="few-step", initial=self.scale(schedule) / schedule.initial_scale)

    def _level(self, schedule: NoiseSchedule, index, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = _levels(schedule, self.times)
        if isinstance(index, torch.Tensor):
            alpha, sigma = alpha.to(index.device), sigma.to(index.device)
        return _like(alpha[index], like), _like(sigma[index], like)


class FewStepScheduler(PlanScheduler):
    """Draws from a few-step student at its own list of times; part of every exported one.

        scheduler = diffaccel.FewStepScheduler.from_config(teacher.scheduler.config, timesteps=[999, 749, 499, 249])

    The list is prepared from the start. Runs of fewer steps take that many from it, the noisiest first; a pipeline that asks
    for more (50 is what most ask for unasked) gets the list.

    Args:
        timesteps: see `FewStep.times`.
        noise, boundary: see `FewStep`.
        boundary_sigma_data: `FewStep.sigma_data`.
        **shared: see `config.common`; grids and spacings have no effect.

    Attributes:
        steps: the `FewStep` that it was made from.

    Raises:
        UsageError: no timesteps, some off the model's schedule, or see `FewStep`.
    """

    __module__ = "diffaccel"

    @configured
    def __init__(
        self,
        timesteps: list[float] | None = None,
        noise: str = "fresh",
        boundary: float = 0.0,
        boundary_sigma_data: float = 0.5,
        **shared,
    ):
        super().__init__()
        config, schedule = self.config, self.noise_schedule
        if config.timesteps is None:
            raise UsageError(
                "FewStepScheduler needs the student's list of times: "
                "FewStepScheduler.from_config(pipe.scheduler.config, timesteps=[999, 749, 499, 249])."
            )
        self.steps = FewStep(tuple(config.timesteps), config.noise, config.boundary, config.boundary_sigma_data)
        if not all(schedule.t_min <= t <= schedule.t_max for t in self.steps.times):
            raise UsageError(
                f"Networks of this schedule are called at times from {schedule.t_min:g} to {schedule.t_max:g}; "
                f"got {list(self.steps.times)}."
            )
        self.init_noise_sigma = self.steps.scale(schedule)
        self._generator: torch.Generator | list[torch.Generator] | None = None
        self.set_timesteps()

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Build from the configuration of any diffusers scheduler; its clipping was no part of a student's training.

        Raises:
            UsageError: see `PlanScheduler.from_config`.
        """
        if isinstance(config, dict) and config.get("_class_name") != cls.__name__:
            config = {**config, "clip_sample": False, "thresholding": False}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def _get_compatibles(cls):
        from . import scheduler  # noqa: F401 - a teacher's may be one of these, and its settings come along

        return super()._get_compatibles()

    @classmethod
    def carrying(cls, steps: FewStep, config: Mapping) -> "FewStepScheduler":
        """The scheduler of a student that was trained with ``steps``, for a teacher's scheduler ``config``."""
        times = [int(t) if t.is_integer() else t for t in steps.times]
        own = {"noise": steps.noise, "boundary": steps.boundary, "boundary_sigma_data": steps.sigma_data}
        return cls.from_config(dict(config), timesteps=times, **own)

    def plan(self, grid: Grid) -> Plan:
        """The plan of the whole list, whatever the grid."""
        return self.steps.plan(self.noise_schedule)

    def calls(self, steps: int) -> int:
        """Network calls of a run that was asked for this many steps, a guidance pair counted once."""
        return min(steps, len(self.steps.times))

    def steps_for(self, nfe: int) -> int:
        """See `PlanScheduler.steps_for`; no more than the list has."""
        return self.calls(super().steps_for(nfe))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device=None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        nfe: int | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            num_inference_steps, nfe: at most so many steps; None for the whole list.
            device: where `timesteps` goes.
            timesteps: none; a student has its own.
            sigmas: of pipelines for flows: their number counts and nothing else.
            mu: set aside.

        Raises:
            UsageError: explicit times, or a number of steps that is not a whole one above 0.
        """
        if timesteps is not None:
            raise UsageError(
                "A few-step student has its own times; for others make a scheduler: "
                "FewStepScheduler.from_config(pipe.scheduler.config, timesteps=[…])."
            )
        asked = [n for n in (num_inference_steps, nfe, None if sigmas is None else len(sigmas)) if n is not None]
        if wrong := [n for n in asked if not isinstance(n, numbers.Integral) or isinstance(n, bool) or n < 1]:
            raise UsageError(f"The number of steps must be a whole number of at least 1; got {wrong[0]!r}.")
        plan = self.steps.fewer(min([*asked, len(self.steps.times)])).plan(self.noise_schedule)
        last, (alpha, sigma) = plan.rows[-1], map(float, self.noise_schedule.end_from_rho(0.0))
        end = Grid(self.noise_schedule, (last.t, self.noise_schedule.t_end), (last.alpha, alpha), (last.sigma, sigma))
        self._prepare(end, plan, plan.nfe, device)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """See `PlanScheduler.step`."""
        if generator is None and self._generator is not None:
            generator = self._generator
            if isinstance(generator, list):  # DiT steps both branches of guidance
                generator = generator * (len(sample) // len(generator))
        return super().step(model_output, timestep, sample, generator, return_dict)

    @contextmanager
    def drawing_from(self, generator: torch.Generator | list[torch.Generator] | None) -> Iterator[None]:
        """Inside the block, take fresh noise from here in steps that are given no generator, as those of SD3 and DiT."""
        before, self._generator = self._generator, generator
        try:
            yield
        finally:
            self._generator = before

    def _rest(self, index: int) -> Sequence[Row]:
        return self._plan.rows[index:]


@functools.lru_cache(maxsize=64)
def _levels(schedule: NoiseSchedule, times: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(α, σ) of the times, float64 on the CPU, where reading one of them waits for no device."""
    return schedule.level(torch.tensor(times, dtype=torch.float64))


def _like(coefficients: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Coefficients of all samples () or of each (B,), to multiply samples with."""
    return coefficients.to(x.dtype).reshape(coefficients.shape + (1,) * (x.ndim - 1) * coefficients.ndim)
