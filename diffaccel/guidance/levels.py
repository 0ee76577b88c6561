"""The noise level of an evaluation, and of the state after its step, read off a scheduler without changing it."""

from ..core.errors import GuidanceError
from ..core.schedule import family, from_diffusers, network_output
from .context import Level, Target

# By what they index their table of levels with. A test drives each of them with a network whose x0 is known; whatever is
# not listed may keep levels to itself or run the other way, and is refused.
_BY_TIME = (
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "LCMScheduler", "PNDMScheduler", "TCDScheduler", "UnCLIPScheduler",
)  # fmt: skip
_BY_SIGMA = (
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
# Their step ends, to first order, in α'·x0 + σ'·ε at the next level …
_DETERMINISTIC = (
    "CogVideoXDDIMScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip
# … or keep of that σ' what DDIM does at eta = 1, and replace the rest by fresh noise.
_ANCESTRAL = ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler")


def level_of(scheduler, timestep) -> Level:
    """The level at which the network was, or is to be, called before the scheduler's next step.

    Exact for diffusers' DDPM, DDIM, PNDM, LCM, TCD, UnCLIP, Euler, Heun, LMS, KDPM2, DPM-Solver, UniPC, DEIS, SA-Solver,
    EDM and flow-matching schedulers, for subclasses of them, and for the schedulers of this package.

    Args:
        scheduler: with its timesteps set.
        timestep: the entry of ``scheduler.timesteps`` of this evaluation.

    Raises:
        GuidanceError: a scheduler of another kind.
    """
    if hasattr(scheduler, "level_at"):  # ours
        alpha, sigma = scheduler.level_at(timestep)
        return Level(alpha, sigma, network_output(scheduler.config))
    config = scheduler.config
    name = _known(scheduler, (*_BY_TIME, *_BY_SIGMA))
    if name is None or config.get("invert_sigmas"):  # those run from 0 to 1 and predict −flow
        raise GuidanceError(
            f"The noise level inside this {type(scheduler).__name__} is not known; use a rule in raw space, such as "
            'APG(space="raw"), or another scheduler.'
        )
    output = network_output({**config, "_class_name": name})
    if name in _BY_TIME:
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        return Level(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, output)
    kind, sigma = family(config, name), _sigma(scheduler, timestep)
    if kind == "flow":
        return Level(1.0 - sigma, sigma, output)
    if kind == "edm":
        alpha, noise = (float(value) for value in from_diffusers(scheduler).level_from_rho(sigma))
        return Level(alpha, noise, output, alpha)
    alpha = (1.0 + sigma * sigma) ** -0.5  # VP: the table holds σ/α
    return Level(alpha, sigma * alpha, output, 1.0 if _in_native_scale(scheduler) else alpha)


def target_of(scheduler, timestep, eta: float = 0.0) -> Target:
    """The level of the state after the scheduler's next step.

    For schedulers with one network call per step that add no noise, and for single-step ones that add DDIM's.

    Args:
        scheduler: before that step.
        timestep: of the step.
        eta: as given to the step of a DDIM scheduler.

    Raises:
        GuidanceError: a scheduler of another kind.
    """
    if hasattr(scheduler, "level_after"):  # ours
        return Target(*scheduler.level_after(timestep))
    config, name = scheduler.config, _known(scheduler, (*_DETERMINISTIC, *_ANCESTRAL))
    noisy = "sde" in str(config.get("algorithm_type")) or config.get("stochastic_sampling")
    if name is None or noisy or config.get("invert_sigmas"):
        raise GuidanceError(
            f"The state after a step of this {type(scheduler).__name__} is not fixed by the prediction and one draw of "
            f"noise; use one of {', '.join((*_DETERMINISTIC, *_ANCESTRAL))}, or a single-step scheduler of this package."
        )
    alpha, sigma = _after(scheduler, timestep, name)
    if name in _ANCESTRAL:
        eta = 1.0
    elif not eta or not name.startswith("DDIM"):  # others take one and ignore it
        return Target(alpha, sigma, sigma)
    rho = level_of(scheduler, timestep).rho
    return Target(alpha, sigma, sigma * (1.0 - eta**2 * (1.0 - (sigma / (alpha * rho)) ** 2)) ** 0.5)


def _after(scheduler, timestep, name: str) -> tuple[float, float]:
    if name in _BY_TIME:
        before = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if hasattr(scheduler, "previous_timestep"):  # DDPM takes timesteps that are not evenly spaced
            before = int(scheduler.previous_timestep(timestep))
        final = getattr(scheduler, "final_alpha_cumprod", 1.0)
        alpha_bar = float(scheduler.alphas_cumprod[before] if before >= 0 else final)
        return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    sigma = float(scheduler.sigmas[_index(scheduler, timestep) + 1])
    kind = family(scheduler.config, name)
    if kind == "flow":
        return 1.0 - sigma, sigma
    alpha = (1.0 + sigma * sigma) ** -0.5 if kind == "vp" and _in_native_scale(scheduler) else 1.0
    return alpha, sigma * alpha


def _known(scheduler, names: tuple[str, ...]) -> str | None:
    """The first of the scheduler's classes that is among the names."""
    return next((cls.__name__ for cls in type(scheduler).__mro__ if cls.__name__ in names), None)


def _in_native_scale(scheduler) -> bool:
    """Whether a VP scheduler carries α·x0 + σ·ε, rather than x0 + (σ/α)·ε."""
    return hasattr(scheduler, "_sigma_to_alpha_sigma_t")


def _index(scheduler, timestep) -> int:
    for known in (scheduler.step_index, scheduler.begin_index):
        if known is not None:
            return known
    return scheduler.index_for_timestep(timestep)


def _sigma(scheduler, timestep) -> float:
    index = _index(scheduler, timestep)
    if getattr(scheduler, "state_in_first_order", True) or not hasattr(scheduler, "sigmas_interpol"):
        return float(scheduler.sigmas[index])
    # The second evaluation of KDPM2 lies between two levels, under another index in the ancestral kind.
    return float(scheduler.sigmas_interpol[index - ("sigmas_up" in vars(scheduler))])
