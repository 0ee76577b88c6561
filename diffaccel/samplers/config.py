"""The configuration that every scheduler shares, and the reading of other schedulers' configurations."""

import functools
import inspect
from collections.abc import Callable, Mapping

from diffusers.configuration_utils import register_to_config

from ..core.errors import UsageError, unknown
from ..core.grids import ENDS, GRIDS, SHIFT_TYPES
from ..core.prediction import PREDICTION_TYPES
from ..core.schedule import family

TIMESTEP_SPACINGS = ("trailing", "leading", "linspace")


def common(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    timestep_spacing: str = "trailing",
    steps_offset: int = 0,
    grid: str | None = None,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    final_sigmas_type: str = "zero",
    thresholding: bool = False,
    dynamic_thresholding_ratio: float = 0.995,
    sample_max_value: float = 1.0,
    clip_sample: bool = False,
    clip_sample_range: float = 1.0,
    use_flow_sigmas: bool = False,
    flow_shift: float = 1.0,
    shift: float = 1.0,
    shift_terminal: float | None = None,
    use_dynamic_shifting: bool = False,
    time_shift_type: str = "exponential",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> None:
    """Arguments of every scheduler here; names and meanings are those of diffusers' configurations.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the VP schedule.
        rescale_betas_zero_snr: bend the VP schedule to end in pure noise (Lin et al. 2023).
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction"; the last means a flow schedule.
        timestep_spacing: "trailing", "leading" (with ``steps_offset``) or "linspace".
        grid: a name in `core.grids.GRIDS`, in place of ``timestep_spacing``; kept apart so that stock schedulers can
            read this configuration.
        use_karras_sigmas, use_exponential_sigmas: diffusers' names for the grids "karras" and "log-snr".
        final_sigmas_type: "zero" ends at the clean image, "sigma_min" at the cleanest training level.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0 (Saharia et al. 2022).
        clip_sample, clip_sample_range: clamp x0; ε then follows the clamped x0. Not for latents.
        use_flow_sigmas: the model is a flow.
        flow_shift, shift: static shift of a flow, under either of diffusers' two names; ``shift`` wins unless it is 1.
        shift_terminal: σ of the last call after shifting.
        use_dynamic_shifting, time_shift_type: take the shift from the ``mu`` of each `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines that compute ``mu``.
    """


def configured(init: Callable) -> Callable:
    """Decorate ``__init__(self, …, **shared)``: ``shared`` becomes the arguments of `common`, and all are registered.

    diffusers learns what a scheduler accepts from the signature of its ``__init__``.
    """

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        init(self, *args, **kwargs)

    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    shared = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(common).parameters.values()]
    checked.__signature__ = inspect.Signature(own + shared)
    return register_to_config(checked)


def validate(config: Mapping) -> None:
    """Refuse values that would only fail later.

    Raises:
        UsageError: naming the allowed values.
    """
    allowed = {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
        "final_sigmas_type": ENDS,
        "time_shift_type": SHIFT_TYPES,
    }
    for key, names in allowed.items():
        if config[key] not in names:
            raise unknown(key, str(config[key]), names)
    if config["grid"] is not None and config["grid"] not in GRIDS:
        raise unknown("grid", str(config["grid"]), GRIDS)
    if config["use_karras_sigmas"] and config["use_exponential_sigmas"]:
        raise UsageError("Set only one of use_karras_sigmas and use_exponential_sigmas.")


def grid_name(config: Mapping) -> str:
    """The name in `core.grids.GRIDS` that a configuration asks for."""
    if config["use_karras_sigmas"]:
        return "karras"
    if config["use_exponential_sigmas"]:
        return "log-snr"
    return config["grid"] or config["timestep_spacing"]


def translated(config: Mapping) -> dict:
    """The configuration of any diffusers scheduler with what its class left unsaid written out.

    Flow-matching Euler and Heun do not record that they are flows; only their ``shift`` without betas tells.

    Raises:
        UsageError: a scheduler whose network input is preconditioned (EDM), or a grid that does not exist here.
    """
    config = dict(config)
    kind = family(config)
    if kind == "edm":
        raise UsageError("EDM schedulers precondition the network themselves and cannot be replaced: keep them.")
    if config.get("use_beta_sigmas"):
        raise UsageError(f"use_beta_sigmas is not available; set it to False and grid to one of {', '.join(GRIDS)}.")
    if kind == "flow" and "beta_start" not in config:
        if config.get("invert_sigmas"):
            raise UsageError("invert_sigmas (Mochi) is not available; use the pipeline's own scheduler.")
        config.pop("_class_name", None)
        defaults = config.get("_use_default_values", [])
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
        config.update(flow, _use_default_values=[key for key in defaults if key not in flow])
    return config
