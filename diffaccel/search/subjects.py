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
from ..core.schedule import NoiseSchedule, from_diffusers
from ..models.denoiser import Denoiser, Guided
from ..samplers.deis import deis_plan
from ..samplers.plan import Plan, Row, Run
from ..samplers.searched import PlanFile, SearchedScheduler, model_config
from .layers import bypass, network_of, skip_layers, skippable

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
        """(count, C, H, W) in [−1, 1]: what the final states look like; the states themselves where they are pixels."""
        return self.draw(file, seed, count)

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the weights."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Layers of the network that may be left out, with their shares of its cost; see `layers.skippable`."""

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
        config: of a scheduler for its noise schedule.
        conditions: what sample i is conditioned on, given (start, count); None for no condition.
        batch_size: samples per network call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: Mapping,
        conditions: Callable[[int, int], Mapping | None] = lambda start, count: None,
        batch_size: int = 256,
    ):
        self.denoiser, self.schedule, self.config = denoiser, denoiser.schedule, model_config(config)
        self.conditions, self.batch_size = conditions, batch_size
        self.evaluations = 2 if isinstance(denoiser, Guided) and denoiser.scale != 1.0 else 1

    @torch.no_grad()
    def draw(self, file, seed, count, watch=None):
        parts = []
        for start in range(0, count, self.batch_size):
            number = min(self.batch_size, count - start)
            x = KeyedRandom(seed).normal("search", 0, start, number, self.denoiser.sample_shape)
            x = x * (self.schedule.initial_scale * file.plan.initial)
            condition, run = self.conditions(start, number), Run(file.plan)
            for row in file.plan.rows:
                with self._without(file.layers, run):
                    x0 = self.denoiser(x, torch.full((number,), row.t, dtype=torch.float64), condition)
                output = convert(x0.float(), x, "sample", row.quantity, row.alpha, row.sigma)
                if watch:
                    watch(row, x, output)
                x = run.advance(x, output)
            parts.append(x)
        return torch.cat(parts)

    def _without(self, layers: Mapping, run: Run):
        return bypass(self.denoiser.net, layers, lambda: run.index) if layers else nullcontext()

    def fingerprint(self) -> str:
        return fingerprint(self.denoiser)

    def shares(self) -> dict[str, float]:
        return skippable(self.denoiser.net)


class PipelineSubject(Subject):
    """A diffusers pipeline, called as its users call it, only with another scheduler; what it returns is not looked at.

    Args:
        pipe: any pipeline for VP, EDM or flow models; its scheduler is as it was after every call.
        conditions: arguments that differ from sample to sample, such as [{"prompt": "a cat"}, {"prompt": "a dog"}]; sample
            i gets the (i mod number)-th. All have the same names.
        settings: arguments that do not differ, such as {"guidance_scale": 5.0, "height": 512}.
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
        self.pipe, self.conditions, self.settings = pipe, [dict(one) for one in conditions], dict(settings or {})
        self.batch_size = batch_size
        self.schedule, self.config = from_diffusers(pipe.scheduler), model_config(pipe.scheduler.config)
        self._accepted = inspect.signature(type(pipe).__call__).parameters
        if not self.conditions or any(set(one) != set(self.conditions[0]) for one in self.conditions):
            raise UsageError(
                "The conditions of a search must be given for all samples, and with the same names for all."
            )
        for name in (*self.conditions[0], *self.settings):
            if name not in self._accepted or name in ("num_inference_steps", "generator", "latents", "noise"):
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
        return images if type(self.pipe).__name__ == "ClassConditionalPipeline" else images * 2 - 1

    def _drawn(self, file, seed, count, watch, output_type):
        scheduler = _Recording.from_config(self.pipe.scheduler.config, plan=file.to_dict())
        own, states, outputs = self.pipe.scheduler, [], []
        bar = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = scheduler
        try:
            with skip_layers(self.pipe, file.layers) if file.layers else nullcontext():
                for start in range(0, count, self.batch_size):
                    number = min(self.batch_size, count - start)
                    scheduler.watch, scheduler.last = watch, None
                    result = self.pipe(**self._arguments(file, seed, start, number, output_type))
                    states.append(scheduler.last.float().cpu())
                    if output_type:
                        outputs.append(torch.as_tensor(result[0]).float().cpu())
        finally:
            self.pipe.scheduler = own
            if bar is not None:
                self.pipe._progress_bar_config = bar
        return torch.cat(states), torch.cat(outputs) if outputs else None

    def _arguments(self, file, seed, start, number, output_type) -> dict:
        seeds = KeyedRandom(seed).integers("search", 0, start, number, 2**53).tolist()
        indices = [(start + i) % len(self.conditions) for i in range(number)]
        arguments = {name: [self.conditions[i][name] for i in indices] for name in self.conditions[0]}
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

    def fingerprint(self) -> str:
        return fingerprint(network_of(self.pipe))

    def shares(self) -> dict[str, float]:
        once = self.file(fine_plan(self.schedule, 2))
        return skippable(network_of(self.pipe), lambda: self._drawn(once, 0, 1, None, None))


class _Recording(SearchedScheduler):
    """Tells what it is given, and keeps the last state."""

    watch: Watch | None = None
    last: torch.Tensor | None = None

    def step(self, model_output, timestep, sample, *args, **kwargs):
        first = 0 if self._over else self.step_index
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        self.last = result[0] if isinstance(result, tuple) else result.prev_sample
        if self.watch:
            row = self.file.plan.rows[first]
            self.watch(row, sample.float(), self._run._outputs[0].float())
        return result


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
