"""The conformance suite of schedulers: what a diffusers pipeline and its user may rely on."""

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable

import diffusers
import torch

STEP_COUNTS = (1, 2, 3, 5, 10, 50, 100, 999, 1000)
_SHAPE = (2, 3, 4, 4)
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def check_scheduler(cls: type, **kwargs) -> None:
    """Run every check below on a scheduler class.

    Args:
        cls: a SchedulerMixin class whose constructor takes the arguments of diffusers' configurations.
        **kwargs: constructor arguments to check it with.

    Raises:
        AssertionError: naming the first promise that is broken.
    """
    for check in CHECKS:
        check(lambda **more: cls(**{**kwargs, **more}))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A cheap, smooth stand-in for a network, elementwise in x."""
    return torch.sin(x + t.to(x.dtype) * 1e-3)


def run(scheduler, x: torch.Tensor, steps: int = 6, generator=None, start: int = 0) -> torch.Tensor:
    """A pipeline's loop with `network`, beginning at call ``start``."""
    scheduler.set_timesteps(steps)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if start:
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(model_input, t), t, x, return_dict=False, **extra)[0]
    return x


def check_public_attributes(make: Callable) -> None:
    """What is read before `set_timesteps`."""
    scheduler, x = make(), _noise()
    assert scheduler.init_noise_sigma > 0 and scheduler.order >= 1
    assert scheduler.scale_model_input(x, 0.0).shape == x.shape, "scale_model_input must work before set_timesteps"
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert len(scheduler.timesteps) > 1 and scheduler.step_index is None and scheduler.begin_index is None
    _raises(lambda: scheduler.step(x, 0, x), "set_timesteps", "step before set_timesteps")
    _raises(lambda: make(prediction_type="noise"), "epsilon", "an unknown prediction type")


def check_grids(make: Callable) -> None:
    """Finite, strictly monotone levels for every number of steps, in VP and flow, from pure noise to the end."""
    for options in ({}, {"timestep_spacing": "linspace"}, {"use_karras_sigmas": True}, _FLOW):
        for steps in STEP_COUNTS:
            scheduler = make(**options)
            scheduler.set_timesteps(steps)
            message = f"{steps} steps with {options}"
            starts = scheduler.timesteps[:: scheduler.order], scheduler.sigmas[: -1 : scheduler.order]
            assert bool((starts[0].double().diff() < 0).all()), f"timesteps of steps repeat at {message}"
            assert bool((starts[1].diff() < 0).all()), f"sigmas of steps repeat at {message}"
            assert bool((scheduler.sigmas[:-1] > scheduler.sigmas[-1]).all()), f"{message}: a call at the end level"
            calls = len(scheduler.timesteps)
            assert bool(torch.isfinite(scheduler.sigmas).all()) and len(scheduler.sigmas) == calls + 1
            # Multi-stage rules may take the last step, to σ = 0, in one call.
            assert steps * scheduler.order >= calls > (steps - 1) * scheduler.order, f"{message}: {calls} calls"


def check_step(make: Callable) -> None:
    """Shapes 2-D to 5-D, dtypes, tuple against dict, finite results."""
    for shape in ((2, 4), (2, 3, 4), _SHAPE, (2, 3, 2, 4, 4)):
        assert run(make(), _noise(shape)).shape == shape
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = run(make(), _noise().to(dtype), generator=_generator())
        assert result.dtype == dtype and bool(torch.isfinite(result).all()), f"{dtype} is not kept, or not finite"
    exact = run(make(), _noise().double(), generator=_generator())
    single, scale = run(make(), _noise(), generator=_generator()).double(), float(exact.abs().max())
    assert float((single - exact).abs().max()) < 1e-5 * max(scale, 10.0), "float32 is far from float64"
    tuples, dicts, x = make(), make(), _noise()
    tuples.set_timesteps(3)
    dicts.set_timesteps(3)
    t = tuples.timesteps[0]
    left = tuples.step(network(x, t), t, x, generator=_generator(), return_dict=False)[0]
    right = dicts.step(network(x, t), t, x, generator=_generator()).prev_sample
    assert torch.equal(left, right), "tuple and dict outputs differ"
    for options in ({"clip_sample": True}, {"thresholding": True}, _FLOW, {"prediction_type": "v_prediction"}):
        assert bool(torch.isfinite(run(make(**options), _noise(), 10)).all()), f"not finite with {options}"


def check_state(make: Callable) -> None:
    """A run depends on nothing before it, a deep copy on nothing beside it, a sample on no other in the batch."""
    scheduler, x = make(), _noise()
    first = run(scheduler, x, generator=_generator())
    before = dict(scheduler.config)
    run(scheduler, x, 4)
    assert torch.equal(run(scheduler, x, generator=_generator()), first), "a second run differs from the first"
    assert dict(scheduler.config) == before, "set_timesteps or step changed the configuration"
    scheduler.set_timesteps(6)
    t = scheduler.timesteps[0]
    scheduler.step(network(x, t), t, x)
    twin = copy.deepcopy(scheduler)
    t = scheduler.timesteps[1]
    twin.step(network(x, t), t, x)
    assert scheduler.step_index == 1 and twin.step_index == 2, "a deep copy shares its state"
    generators = [_generator(5), _generator(6)]
    together = run(make(), x, generator=generators)
    alone = torch.cat([run(make(), x[i : i + 1], generator=[_generator(5 + i)]) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-6), "samples of one batch influence each other"


def check_image_to_image(make: Callable) -> None:
    """A run may begin at any call, found by index or by timestep, and noise is added at any level."""
    for options in ({}, _FLOW):
        scheduler, x = make(**options), _noise()
        by_index = run(scheduler, x, 8, _generator(), start=3 * scheduler.order)
        scheduler.set_timesteps(8)
        result, generator = x, _generator()
        for t in scheduler.timesteps[3 * scheduler.order :]:
            value = float(t) if options else t.clone()
            result = scheduler.step(network(result, t), value, result, generator=generator).prev_sample
        assert torch.equal(by_index, result), "set_begin_index and the timestep itself start different runs"
        noisy = scheduler.add_noise(x, _noise(seed=1), scheduler.timesteps[5][None])
        assert noisy.shape == x.shape and noisy.dtype == x.dtype and noisy.device == x.device
        assert torch.equal(scheduler.scale_noise(x, scheduler.timesteps[5][None], _noise(seed=1)), noisy)


def check_configuration(make: Callable) -> None:
    """Saving and loading, trained betas, and the way to a stock scheduler and back."""
    scheduler, x = make(trained_betas=[0.1, 0.3]), _noise()
    for original in (scheduler, make(beta_schedule="scaled_linear", steps_offset=1), make(**_FLOW)):
        with tempfile.TemporaryDirectory() as folder:
            original.save_config(folder)
            loaded = type(original).from_pretrained(folder)
        assert _public(loaded) == _public(original), "the configuration changed on disk"
        left, right = (run(s, x, generator=_generator()) for s in (original, loaded))
        assert torch.equal(left, right), "a saved scheduler gives other samples"
    original = make()
    assert diffusers.DPMSolverMultistepScheduler in original.compatibles
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDPMScheduler", "UniPCMultistepScheduler"):
        stock = getattr(diffusers, name)(beta_schedule="scaled_linear", timestep_spacing="trailing")
        ours = type(original).from_config(stock.config)
        back = type(stock).from_config(ours.config)
        with warnings.catch_warnings():  # stock schedulers hand tensors to numpy in a way that numpy 2 frowns upon
            warnings.simplefilter("ignore", DeprecationWarning)
            left, right = (run(s, _noise() * s.init_noise_sigma, 5, _generator()) for s in (stock, back))
        assert torch.equal(left, right), f"{name} gives other samples after a visit here"
        again = type(original).from_config(back.config)
        assert _public(again).items() >= _public(ours).items(), f"the way through {name} changed the configuration"


CHECKS = (check_public_attributes, check_grids, check_step, check_state, check_image_to_image, check_configuration)


def _public(scheduler) -> dict:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def _generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(shape: tuple[int, ...] = _SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _raises(call: Callable, word: str, what: str) -> None:
    try:
        call()
    except ValueError as error:
        assert word in str(error), f"the error for {what} does not mention {word!r}: {error}"
    else:
        raise AssertionError(f"{what} was accepted")
