"""`PlanScheduler`: executes plans inside the contract of diffusers' schedulers."""

import math
import numbers
from collections.abc import Sequence

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..core.errors import UsageError
from ..core.grids import Grid, make_grid, shift_from_mu
from ..core.prediction import coefficients
from ..core.schedule import EDM, Flow, VPDiscrete, from_diffusers, network_output
from .config import completed, grid_name, grid_options, translated, validate, without_unset
from .ddim import ddim_row
from .plan import Plan, Row, Run


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler whose step is one weighted sum given by a `Plan`.

    Subclasses define `plan` and an ``__init__`` under `config.configured` that calls ``super().__init__()``. States
    are in native scale: ``init_noise_sigma`` is 1 and `scale_model_input` changes nothing.

    Attributes:
        timesteps: (calls,) on the target device; int64 where all are whole numbers of a discrete table, else float32.
        sigmas: (calls + 1,) float32 on the CPU; σ for flow, σ/α for VP and EDM, the end level included.
        stages: network calls per step; a last step that goes to σ = 0 always takes one.
        order: the same for pipelines, which multiply step numbers with it; 1 after explicit timesteps or sigmas, whose
            calls pipelines take for steps.

    Raises:
        UsageError: a configuration value that does not exist.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012 (name and type set by diffusers)
    stages = order = 1
    init_noise_sigma = 1.0

    def __init__(self):
        validate(self.config, type(self).__init__)
        self.noise_schedule = from_diffusers({"num_train_timesteps": 1000, **self.config})
        if isinstance(self.noise_schedule, VPDiscrete):
            self.alphas_cumprod = self.noise_schedule.alphas_cumprod.float()
        self._network_output = network_output(self.config)
        self.num_inference_steps: int | None = None
        self._grid: Grid | None = None
        self._plan: Plan | None = None
        fractions = torch.linspace(1.0, 0.0, self.config.num_train_timesteps, dtype=torch.float64)
        self._publish(self.noise_schedule.time(fractions).tolist(), device=None)
        self.sigmas = self._published_levels(*self.noise_schedule.level(self.timesteps))
        self._reset()

    def plan(self, grid: Grid) -> Plan:
        """The coefficients for a grid; the one thing a sampler has to define."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """Build from the configuration of any diffusers scheduler for VP, EDM or flow models.

        A spacing or a switch for one among ``kwargs`` counts for more than the ``grid`` of the configuration or class, and
        ``shift`` and ``flow_shift`` mean the same there.

        Raises:
            UsageError: a model of another kind, and settings that cannot be honoured.
        """
        if isinstance(config, dict):
            named_here = config.get("_class_name") == cls.__name__ or config.get("grid") is not None
            config = without_unset(translated(config), cls.__init__)
            if not named_here:
                config.pop("grid", None)  # another class's "none" is not a wish against the grid of this one
        return super().from_config(config, return_unused_kwargs, **completed(kwargs))

    @classmethod
    def _get_compatibles(cls):
        # With its siblings here, so that their settings pass silently from one to the other.
        return [cls, *PlanScheduler.__subclasses__(), *(getattr(diffusers, name) for name in cls._compatibles)]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index of the next call in `timesteps`; None before a run."""
        return self._step_index

    @property
    def current_plan(self) -> Plan | None:
        """The coefficients of the run that `set_timesteps` prepared; None before."""
        return self._plan

    @property
    def begin_index(self) -> int | None:
        """Index that the run starts from, where a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of `timesteps` (image to image), with no earlier outputs assumed."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        nfe: int | None = None,
    ) -> None:
        """Choose the noise levels of a run and forget the last one.

        Args:
            num_inference_steps: number of steps N ≥ 1; optional with explicit timesteps or sigmas.
            device: where `timesteps` goes.
            timesteps: explicit native times, strictly decreasing.
            sigmas: explicit levels, σ/α for VP and σ (before shifting) for flow; a last 0 is the end.
            mu: resolution-dependent shift; used with ``use_dynamic_shifting`` and ignored otherwise.
            nfe: in place of num_inference_steps: as many steps as this many network calls allow, see `steps_for`.

        Raises:
            UsageError: unusable levels, or no mu where it is needed.
        """
        config = self.config
        if nfe is not None:
            if any(given is not None for given in (num_inference_steps, timesteps, sigmas)):
                raise UsageError("Pass nfe alone, not with num_inference_steps, timesteps or sigmas.")
            num_inference_steps = self.steps_for(nfe)
        shift = config.shift if config.shift != 1.0 else config.flow_shift
        if config.use_dynamic_shifting and isinstance(self.noise_schedule, Flow):
            if mu is None:
                raise UsageError("use_dynamic_shifting is on: pass mu to set_timesteps, or set it to False.")
            shift = shift_from_mu(mu, config.time_shift_type)
        grid = make_grid(
            self.noise_schedule,
            num_inference_steps,
            grid_name(config),
            end=self._end,
            options=grid_options(config),
            shift=shift,
            shift_terminal=config.shift_terminal,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        plan = self.plan(grid)  # before anything changes, since both may refuse
        self.order = self.stages if timesteps is None and sigmas is None else 1
        self._prepare(grid, plan, grid.steps, device)

    def _prepare(self, grid: Grid, plan: Plan, steps: int, device) -> None:
        """Publish the levels of a run and forget the last one; of the grid only its end is needed for that."""
        self._grid, self._plan, self.num_inference_steps = grid, plan, steps
        self._publish([row.t for row in self._plan.rows], device)
        levels = [(row.alpha, row.sigma) for row in self._plan.rows] + [(self._grid.alpha[-1], self._grid.sigma[-1])]
        self.sigmas = self._published_levels(*torch.tensor(levels, dtype=torch.float64).T)
        self._reset()

    def calls(self, steps: int) -> int:
        """Network calls of a run of this many steps, a guidance pair counted once."""
        return self.stages * steps if self._end == "sigma_min" else self.stages * (steps - 1) + 1

    def steps_for(self, nfe: int) -> int:
        """The largest number of steps whose network calls stay within a budget.

        Args:
            nfe: network calls, a guidance pair counted once; halve a budget in which it counts as two.

        Raises:
            UsageError: a budget below the cost of one step.
        """
        if not isinstance(nfe, numbers.Integral) or isinstance(nfe, bool) or nfe < self.calls(1):
            raise UsageError(
                f"nfe must be a whole number of at least {self.calls(1)}, the cost of one step; got {nfe!r}."
            )
        return (nfe - self.calls(1)) // self.stages + 1

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Return the sample: states are in the network's own scale."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Take the step that follows one network call.

        Args:
            model_output: (B, …) output of the network, any float dtype.
            timestep: the entry of `timesteps` the network was called with; it only matters on the first call of a run,
                after that calls are counted. After the last call the next one starts a new run.
            sample: (B, …) the network's input.
            generator: random numbers of plans that add noise, one or one per sample.
            return_dict: return a SchedulerOutput, else a tuple.

        Returns:
            The next network input or the final sample, in the dtype of ``sample``; float16 and bfloat16 are computed
            in float32.

        Raises:
            UsageError: no timesteps yet, shapes that differ, an integer timestep for a flow.
        """
        if self._grid is None:
            raise UsageError("Call set_timesteps(num_inference_steps) before step.")
        if model_output.shape != sample.shape:
            raise UsageError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must have one shape; "
                "networks that also predict a variance need their output split first."
            )
        if self._over:
            self._begin(self._next_index(timestep))
        dtype = torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
        row, x = self._run.row, sample.to(dtype)
        output = self._converted(row, x, model_output.to(dtype))
        if output is model_output and self._plan.output_depth > 1:
            output = output.clone()  # it is remembered, and the caller may write the next output over it
        noise = None
        if row.noise:  # drawn in float32, so that a seed means the same noise in every precision
            noise = randn_tensor(sample.shape, generator, sample.device, torch.float32).to(dtype)
        result = self._run.advance(x, output, noise).to(sample.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def level_at(self, timestep: float | torch.Tensor) -> tuple[float, float]:
        """(α, σ) at which the next `step` expects the network to have been called.

        Args:
            timestep: of that call; it only matters on the first one of a run, as in `step`.
        """
        row = self._plan.rows[self._next_index(timestep)] if self._over else self._run.row
        return row.alpha, row.sigma

    def level_after(self, timestep: float | torch.Tensor) -> tuple[float, float, float]:
        """(α, σ) of the state that the next `step` returns, and what share of σ is not fresh noise.

        Args:
            timestep: as in `level_at`.

        Raises:
            UsageError: a plan that takes several calls per step, or adds noise and looks back.
        """
        if self.stages > 1 or (self._plan.output_depth > 1 and any(row.noise for row in self._plan.rows)):
            raise UsageError(
                f"{type(self).__name__} takes several calls per step, or adds noise and looks back; use ddim, ddpm or a "
                "deterministic multistep sampler."
            )
        index = self._next_index(timestep)
        levels = [(row.alpha, row.sigma) for row in self._plan.rows[index + 1 : index + 2]]
        alpha, sigma = (levels or [(self._grid.alpha[-1], self._grid.sigma[-1])])[0]
        return alpha, sigma, math.sqrt(sigma**2 - self._plan.rows[index].noise ** 2)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """α(t)·original + σ(t)·noise for times (B,) or (1,), any times of the schedule, not only those of the run."""
        alpha, sigma = self.noise_schedule.level(torch.as_tensor(timesteps, device="cpu").double().reshape(-1))
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (value.reshape(shape).to(original_samples) for value in (alpha, sigma))
        return alpha * original_samples + sigma * noise.to(original_samples)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """`add_noise` with the argument order of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    @property
    def _end(self) -> str:
        return self.config.final_sigmas_type

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None

    def _begin(self, index: int) -> None:
        if not 0 <= index < len(self.timesteps):
            raise UsageError(f"A run cannot begin at call {index} of {len(self.timesteps)}.")
        self._step_index = index
        plan = self._plan if index == 0 else Plan(tuple(self._rest(index)), name=self._plan.name)
        self._run = Run(plan)

    def _rest(self, index: int) -> Sequence[Row]:
        """The rows of a run that begins at a later call; a multistep rule warms up there: nothing earlier was evaluated.

        Inside a step of several calls (a split by time, as SDXL's base and refiner have it) the rest of that step goes
        from level to level in the first order.
        """
        step = -(-index // self.stages)
        levels = [(row.t, row.alpha, row.sigma) for row in self._plan.rows[index : step * self.stages + 1]]
        if step == self._grid.steps:  # inside the last step: its end is no call
            levels.append((self._grid.times[-1], self._grid.alpha[-1], self._grid.sigma[-1]))
        rows = [*map(ddim_row, levels, levels[1:])]
        if step < self._grid.steps:
            rows += self.plan(self._grid.tail(step)).rows
        return rows

    @property
    def _over(self) -> bool:
        """Whether the next step is the first of a run."""
        return self._step_index is None or self._step_index >= len(self.timesteps)

    def _next_index(self, timestep) -> int:
        if not self._over:
            return self._step_index
        return self._begin_index if self._begin_index is not None else self._index_of(timestep)

    def _index_of(self, timestep: float | torch.Tensor) -> int:
        whole = not timestep.is_floating_point() if isinstance(timestep, torch.Tensor) else isinstance(timestep, int)
        if whole and isinstance(self.noise_schedule, (Flow, EDM)):
            raise UsageError(f"Timesteps here are floats: pass an entry of scheduler.timesteps, not {timestep}.")
        own = self.timesteps.untyped_storage().data_ptr()
        if isinstance(timestep, torch.Tensor) and timestep.untyped_storage().data_ptr() == own:
            return timestep.storage_offset()  # an entry of our own tensor: no need to read it back from the device
        wanted = float(timestep)  # the start of a step before a stage inside the one before it
        return min(range(len(self._times)), key=lambda index: (abs(self._times[index] - wanted), index % self.stages))

    def _converted(self, row: Row, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        source = self._network_output
        if self.config.clip_sample or self.config.thresholding:
            output, source = self._clipped(_convert(row, x, output, source, "sample")), "sample"
        return _convert(row, x, output, source, row.quantity)

    def _clipped(self, x0: torch.Tensor) -> torch.Tensor:
        if not self.config.thresholding:
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        bound = torch.quantile(x0.flatten(1).abs(), self.config.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(1.0, max(self.config.sample_max_value, 1.0)).reshape((-1,) + (1,) * (x0.ndim - 1))
        return x0.clamp(-bound, bound) / bound

    def _publish(self, times: list[float], device) -> None:
        self._times = times
        whole = isinstance(self.noise_schedule, VPDiscrete) and all(time == round(time) for time in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32).to(device)

    def _published_levels(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma if isinstance(self.noise_schedule, Flow) else sigma / alpha).float()


def _convert(row: Row, x: torch.Tensor, output: torch.Tensor, source: str, target: str) -> torch.Tensor:
    if source == target:
        return output
    try:
        of_x, of_output = coefficients(source, target, row.alpha, row.sigma)
    except ZeroDivisionError:
        raise UsageError(
            f"A network that predicts {source!r} says nothing about x0 at t = {row.t:g}, where alpha is 0; "
            "its prediction_type must be 'sample', 'v_prediction' or 'flow_prediction'."
        ) from None
    return (output * of_output).add_(x, alpha=of_x)
