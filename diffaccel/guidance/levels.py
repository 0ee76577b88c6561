"""The noise level of an evaluation, read off any scheduler without changing it."""

from ..core.errors import GuidanceError, UsageError
from ..core.schedule import family, from_diffusers, network_output
from .context import Level

# Their second evaluation of a step is at a level that they keep to themselves, or they run the other way.
_OPAQUE = ("Inverse", "DPMSolverSDE")


def level_of(scheduler, timestep) -> Level:
    """The level at which the network was, or is to be, called before the scheduler's next step.

    Exact for diffusers' DDPM, DDIM, PNDM, LCM, TCD, Euler, Heun, LMS, KDPM2, DPM-Solver, UniPC, DEIS, SA-Solver, EDM and
    flow-matching schedulers and for those of this package.

    Args:
        scheduler: with its timesteps set.
        timestep: the entry of ``scheduler.timesteps`` of this evaluation.

    Raises:
        GuidanceError: a scheduler of another kind.
    """
    if hasattr(scheduler, "level_at"):  # ours
        alpha, sigma = scheduler.level_at(timestep)
        return Level(alpha, sigma, network_output(scheduler.config))
    name = type(scheduler).__name__
    try:
        kind = family(scheduler.config, name)
    except UsageError:
        kind = None
    by_sigma, by_time = hasattr(scheduler, "sigmas"), hasattr(scheduler, "alphas_cumprod")
    if kind is None or any(part in name for part in _OPAQUE) or not (by_sigma or by_time):
        raise GuidanceError(
            f'The noise level inside a {name} is not known; use a rule in raw space, such as APG(space="raw"), or '
            "another scheduler."
        )
    output = network_output({**scheduler.config, "_class_name": name})
    if not by_sigma:
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        return Level(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5, output)
    sigma = float(_sigmas(scheduler)[_index(scheduler, timestep)])
    if kind == "flow":
        return Level(1.0 - sigma, sigma, output)
    native = from_diffusers(scheduler) if kind == "edm" else None
    if native is None:  # VP: σ in the table is σ/α
        alpha = (1.0 + sigma * sigma) ** -0.5
        return Level(alpha, sigma * alpha, output, 1.0 if hasattr(scheduler, "_sigma_to_alpha_sigma_t") else alpha)
    alpha, noise = (float(value) for value in native.level_from_rho(sigma))
    return Level(alpha, noise, output, alpha)


def _index(scheduler, timestep) -> int:
    for known in (scheduler.step_index, scheduler.begin_index):
        if known is not None:
            return known
    return scheduler.index_for_timestep(timestep)


def _sigmas(scheduler):
    second = getattr(scheduler, "state_in_first_order", True) is False
    return scheduler.sigmas_interpol if second and hasattr(scheduler, "sigmas_interpol") else scheduler.sigmas


# Their step ends, to first order, in α'·x0 + σ'·ε at the next level, with nothing added.
_DETERMINISTIC = (
    "DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip


def target_of(scheduler, timestep) -> tuple[float, float]:
    """(alpha, sigma) of the state after the scheduler's next step, in the scale in which it carries states.

    For schedulers with one network call per step and no noise of their own.

    Args:
        scheduler: before that step.
        timestep: of the step.

    Raises:
        GuidanceError: a scheduler of another kind.
    """
    if hasattr(scheduler, "level_after"):  # ours
        return scheduler.level_after(timestep)
    config, name = scheduler.config, type(scheduler).__name__
    noisy = "sde" in str(config.get("algorithm_type")) or config.get("stochastic_sampling")
    if name not in _DETERMINISTIC or noisy:
        raise GuidanceError(
            f"The state after a step of this {name} is not fixed by the prediction alone; use one of {', '.join(_DETERMINISTIC)} "
            "without noise, or a deterministic single-step scheduler of this package."
        )
    if not hasattr(scheduler, "sigmas"):
        before = int(timestep) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alpha_bar = float(scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod)
        return alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    sigma = float(scheduler.sigmas[_index(scheduler, timestep) + 1])
    if family(config, name) == "flow":
        return 1.0 - sigma, sigma
    alpha = (1.0 + sigma * sigma) ** -0.5 if hasattr(scheduler, "_sigma_to_alpha_sigma_t") else 1.0
    return alpha, sigma * alpha
