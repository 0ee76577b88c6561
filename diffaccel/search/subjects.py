"""What is searched for: a denoiser, or any diffusers pipeline as it is."""

import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from ..core.errors import UsageError
from ..core.grids import make_grid
from ..core.prediction import convert
from ..core.rng import KeyedRandom
from ..core.schedule import EDM, Flow, NoiseSchedule, VPDiscrete, from_diffusers
from ..models.denoiser import Denoiser, Guided
from ..models.networks import network_of
from ..samplers.deis import deis_plan
from ..samplers.plan import Plan, Row, Run
from ..samplers.searched import PlanFile, SearchedScheduler, model_config
from .layers import bypass, skip_layers, skippable

_OWN = (  # arguments of pipelines that are the search's to set
    "num_inference_steps", "timesteps", "sigmas", "generator", "latents", "noise", "batch_size", "return_dict",
    "num_images_per_prompt", "num_videos_per_prompt",
)  # fmt: skip
Watch = Callable[[Row, torch.Tensor, torch.Tensor], None]  # (row, network input, output in the row's quantity)


class Subject(ABC):
    """Draws samples with any plan; sample i depends on the seed and on i only.

    Attributes:
        schedule: noise schedule of the model.
        config: what a plan file keeps of the configuration of the model's scheduler.
        evaluations: network evaluations per call and sample, 2 with a guidance pair.
    """

    schedule: NoiseSchedule
    config: Mapping
    evaluations: int = 1

    @abstractmethod
    def draw(self, file: PlanFile, seed: int, count: int, watch: Watch | None = None) -> torch.Tensor:
        """(count, …) float32 final states on the CPU.

        Args:
            file: the plan.
            seed: of the initial noise: equal seeds give equal noise to all plans.
            count: number of samples.
            watch: told every batch of network inputs and outputs.
        """

    def images(self, file: PlanFile, seed: int, count: int) -> torch.Tensor:
        """(count, C, H, W) in [−1, 1]: what the final states look like; the states themselves where they are pixels.

        Of videos all frames, one after the other.
        """
        return self.draw(file, seed, count)

    @abstractmethod
    def network(self) -> torch.nn.Module:
        """The network that is evaluated.

        Raises:
            UsageError: there is none, or several.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the weights."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Layers of the network that may be left out, with their shares of its cost; see `layers.skippable`.

        Raises:
            UsageError: there are none that are known.
        """

    def file(self, plan: Plan, decisions=None, **more) -> PlanFile:
        """A plan file for this model."""
        return PlanFile(plan, decisions, self.config, **more)


def fine_plan(schedule: NoiseSchedule, steps: int) -> Plan:
    """A plan of so many steps, dense at the clean end, that another solver would end at the same place."""
    return deis_plan(make_grid(schedule, steps, "quadratic"), 2)


class DenoiserSubject(Subject):
    """A `Denoiser`, analytic or not, sampled without diffusers.

    Args:
        denoiser: on its device.
        config: of a scheduler for its noise schedule; None or {} for what `scheduler_config` makes of that.
        conditions: what sample i is conditioned on, given (start, count); None for no condition.
        batch_size: samples per network call.

    Raises:
        UsageError: a noise schedule that no pipeline has, see `scheduler_config`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: Mapping | None = None,
        conditions: Callable[[int, int], Mapping | None] = lambda start, count: None,
        batch_size: int = 256,
    ):
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.config = model_config(config or scheduler_config(self.schedule))
        self.conditions, self.batch_size = conditions, batch_size
        guided = isinstance(denoiser, Guided) and denoiser.scale != 1.0 and denoiser.denoiser.null_condition(1)
        self.evaluations = 2 if guided and conditions(0, 1) is not None else 1
        self._device = next(iter([*denoiser.parameters(), *denoiser.buffers(), torch.empty(0)])).device

    @torch.no_grad()
    def draw(self, file, seed, count, watch=None):
        parts = []
        for start in range(0, count, self.batch_size):
            number = min(self.batch_size, count - start)
            x = KeyedRandom(seed).normal("search", 0, start, number, self.denoiser.sample_shape)
            x = x.to(self._device) * (self.schedule.initial_scale * file.plan.initial)
            condition, run = self.conditions(start, number), Run(file.plan)
            for row in file.plan.rows:
                t = torch.full((number,), row.t, dtype=torch.float64, device=self._device)
                with self._without(file.layers, run):
                    x0 = self.denoiser(x, t, condition)
                output = convert(x0.float(), x, "sample", row.quantity, row.alpha, row.sigma)
                if watch:
                    watch(row, x, output)
                x = run.advance(x, output)
            parts.append(x.cpu())
        return torch.cat(parts)

    def _without(self, layers: Mapping, run: Run):
        return bypass(self.network(), layers, lambda: run.index) if layers else nullcontext()

    def network(self):
        denoiser = self.denoiser.denoiser if isinstance(self.denoiser, Guided) else self.denoiser
        if not hasattr(denoiser, "net"):
            raise UsageError(f"{type(denoiser).__name__} has no network of which layers could be left out.")
        return denoiser.net

    def fingerprint(self) -> str:
        return fingerprint(self.denoiser)

    def shares(self) -> dict[str, float]:
        return skippable(self.network())


class PipelineSubject(Subject):
    """A diffusers pipeline, called as its users call it, only with another scheduler; what it returns is not looked at.

    Args:
        pipe: any pipeline for VP, EDM or flow models; its scheduler is as it was after every call.
        conditions: arguments that differ from sample to sample, such as [{"prompt": "a cat"}, {"prompt": "a dog"}]; sample
            i gets the (i mod number)-th; tensors are those of one sample. All have the same names.
        settings: arguments that do not differ, such as {"guidance_scale": 5.0, "height": 512}; texts are for every sample.
        batch_size: samples per call.

    Raises:
        UsageError: conditions with different names, arguments that are not the pipeline's.
    """

    def __init__(
        self,
        pipe,
        conditions: Sequence[Mapping] = ({},),
        settings: Mapping | None = None,
        batch_size: int = 64,
    ):
        if isinstance(conditions, (str, Mapping)) or not all(isinstance(one, Mapping) for one in conditions):
            raise UsageError(f'Conditions are a list such as [{{"prompt": "a cat"}}, …]; got {conditions!r:.80}.')
        self.pipe, self.conditions, self.settings = pipe, [dict(one) for one in conditions], dict(settings or {})
        self.batch_size = batch_size
        self.schedule, self.config = from_diffusers(pipe.scheduler), model_config(pipe.scheduler.config)
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        if not self.conditions or any(set(one) != set(self.conditions[0]) for one in self.conditions):
            raise UsageError(
                "The conditions of a search must be given for all samples, and with the same names for all."
            )
        for name in (*self.conditions[0], *self.settings):
            if name not in self._accepted or name in _OWN:
                raise UsageError(f"A search cannot pass {name!r} to {type(pipe).__name__}.")

    @functools.cached_property
    def evaluations(self) -> int:
        """Network evaluations per call and sample, counted in a run of one sample."""
        rows = []

        def count(network, args, kwargs):
            given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            rows.append(len(given))

        handle = network_of(self.pipe).register_forward_pre_hook(count, with_kwargs=True)
        try:
            self._drawn(self.file(fine_plan(self.schedule, 2)), 0, 1, None, None)
        finally:
            handle.remove()
        return round(sum(rows) / 2)

    def check_conditions(self) -> None:
        """Refuse a pipeline that needs prompts and was given none.

        Raises:
            UsageError: saying how.
        """
        given = {*self.conditions[0], *self.settings}
        if "prompt" in self._accepted and not given & {"prompt", "prompt_embeds"}:
            raise UsageError(
                f'{type(self.pipe).__name__} needs prompts: pass conditions=[{{"prompt": "a cat"}}, …], or --prompts FILE.'
            )

    def draw(self, file, seed, count, watch=None):
        return self._drawn(file, seed, count, watch, None)[0]

    def images(self, file, seed, count):
        images = self._drawn(file, seed, count, None, "pt")[1]
        images = images.flatten(0, -4)
        return images if type(self.pipe).__name__ == "ClassConditionalPipeline" else images * 2 - 1

    def _drawn(self, file, seed, count, watch, output_type):
        scheduler = _Recording.from_config(self.pipe.scheduler.config, plan=file.to_dict())
        own, states, outputs = self.pipe.scheduler, [], []
        bar = vars(self.pipe).get("_progress_bar_config")
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = scheduler
        try:
            with skip_layers(self.pipe, file.layers) if file.layers else nullcontext():
                for start in range(0, count, self.batch_size):
                    number = min(self.batch_size, count - start)
                    scheduler.watch, scheduler.count = watch, number
                    result = self.pipe(**self._arguments(file, seed, start, number, output_type))
                    states.append(scheduler.last.cpu())
                    if output_type:  # video pipelines return frames where others return a tuple of results
                        found = result if isinstance(result, torch.Tensor) else result[0]
                        outputs.append(torch.as_tensor(found).float().cpu())
        finally:
            self.pipe.scheduler = own
            if bar is None:
                del self.pipe._progress_bar_config
            else:
                self.pipe._progress_bar_config = bar
        return torch.cat(states), torch.cat(outputs) if outputs else None

    def _arguments(self, file, seed, start, number, output_type) -> dict:
        seeds = KeyedRandom(seed).integers("search", 0, start, number, 2**53).tolist()
        indices = [(start + i) % len(self.conditions) for i in range(number)]
        arguments = {name: _batch([self.conditions[i][name] for i in indices]) for name in self.conditions[0]}
        for name, value in self.settings.items():
            if ("prompt" in name and isinstance(value, str)) or (name == "class_labels" and isinstance(value, int)):
                arguments[name] = [value] * number
        if "batch_size" in self._accepted and not arguments:
            arguments["batch_size"] = number
        wanted = output_type or ("pt" if type(self.pipe).__name__ == "ClassConditionalPipeline" else "latent")
        if "output_type" in self._accepted:
            arguments.setdefault("output_type", wanted)
        return {
            **self.settings,
            **arguments,
            "num_inference_steps": file.plan.nfe,
            "generator": [torch.Generator().manual_seed(value) for value in seeds],
            "return_dict": False,
        }

    def network(self):
        return network_of(self.pipe)

    def fingerprint(self) -> str:
        return fingerprint(self.network())

    def shares(self) -> dict[str, float]:
        once = self.file(fine_plan(self.schedule, 2))
        return skippable(network_of(self.pipe), lambda: self._drawn(once, 0, 1, None, None))


class _Recording(SearchedScheduler):
    """Tells what it is given, and keeps the last state; of ``count`` samples: with guidance, DiT's states are doubled."""

    watch: Watch | None = None
    count: int | None = None
    last: torch.Tensor | None = None

    def step(self, model_output, timestep, sample, *args, **kwargs):
        first = 0 if self._over else self.step_index
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        self.last = (result[0] if isinstance(result, tuple) else result.prev_sample)[: self.count].float()
        if self.watch:
            row = self.file.plan.rows[first]
            self.watch(row, *(one[: self.count].float() for one in (sample, self._run._outputs[0])))
        return result


def scheduler_config(schedule: NoiseSchedule) -> dict:
    """The configuration of a diffusers scheduler with this noise schedule.

    Raises:
        UsageError: a schedule in continuous time other than those of flows and EDM.
    """
    if isinstance(schedule, Flow):
        kind = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return {"num_train_timesteps": schedule.num_train_timesteps, **kind}
    if isinstance(schedule, EDM):
        ends = {key: getattr(schedule, key) for key in ("sigma_min", "sigma_max", "sigma_data")}
        return {"timestep_type": "continuous", **ends}
    if not isinstance(schedule, VPDiscrete):
        raise UsageError(
            f"Schedules are searched for models with the noise of a diffusers pipeline: a table of steps, a flow or EDM; "
            f"got {type(schedule).__name__}."
        )
    table = schedule.alphas_cumprod
    if torch.equal(table, from_diffusers({}).alphas_cumprod):
        return {"num_train_timesteps": len(table)}
    betas = 1.0 - table / torch.cat([table.new_ones(1), table[:-1]])
    return {"num_train_timesteps": len(table), "trained_betas": betas.tolist()}


def _batch(values: list):
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of names, shapes, types and bytes of all weights and buffers, the first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else str(tensor).encode()
        )
    return digest.hexdigest()[:16]
