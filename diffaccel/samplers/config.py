"""The configuration that every scheduler shares, and the reading of other schedulers' configurations."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping

from diffusers.configuration_utils import register_to_config

from ..core.errors import UsageError, unknown
from ..core.grids import ENDS, SHIFT_TYPES
from ..core.prediction import PREDICTION_TYPES
from ..core.schedule import EDM, family, from_diffusers
from ..core.spacings import GRIDS, Options

TIMESTEP_SPACINGS = ("trailing", "leading", "linspace")
TIMESTEP_TYPES = ("discrete", "continuous")
SIGMA_SCHEDULES = ("karras", "exponential")
# diffusers' switches and the grids they mean. On VP, uniform λ is what diffusers computes for "lu".
SWITCHES = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log-snr",
}
# What describes the model: carried over even where it was only a default of the class that a configuration comes from.
_VP_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")
_EDM_KEYS = ("timestep_type", "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho")
SPACING_KEYS = (
    *(
        "timestep_spacing",
        "steps_offset",
        "grid",
        "grid_power",
        "grid_start",
        "final_sigmas_type",
        "use_dynamic_shifting",
    ),
    *SWITCHES,
)
MODEL_KEYS = ("num_train_timesteps", "prediction_type", *_VP_KEYS, *_EDM_KEYS)


def common(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: str = "linear",
    trained_betas: list[float] | None = None,
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    snr_shift_scale: float = 1.0,
    timestep_spacing: str = "trailing",
    steps_offset: int = 0,
    grid: str | None = None,
    grid_power: float | None = None,
    grid_start: float | None = None,
    use_karras_sigmas: bool = False,
    use_exponential_sigmas: bool = False,
    use_beta_sigmas: bool = False,
    use_lu_lambdas: bool = False,
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
    timestep_type: str = "discrete",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    sigma_data: float = 1.0,
    sigma_schedule: str = "karras",
    rho: float = 7.0,
) -> None:
    """Arguments of every scheduler here; names and meanings are those of diffusers' configurations.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the VP schedule.
        rescale_betas_zero_snr: bend the VP schedule to end in pure noise (Lin et al. 2023).
        snr_shift_scale: divide the signal-to-noise ratio of the VP schedule by this (CogVideoX).
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction"; the last means a flow schedule.
        timestep_spacing: "trailing", "leading" (with ``steps_offset``) or "linspace".
        grid: a name in `core.spacings.GRIDS`, in place of ``timestep_spacing`` and of the switches below; kept apart so
            that stock schedulers can read this configuration.
        grid_power: exponent of the grids "fast" (None: 1.75), "quadratic" (None: 2) and "karras" (None: ``rho``), above 0.
        grid_start: σ/α of the first call of the grid "fast", at most; None: max(20, 4 per call).
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas: diffusers' names for the grids
            "karras", "exponential", "beta" and "log-snr"; at most one.
        final_sigmas_type: "zero" ends at the clean image, "sigma_min" at the cleanest training level.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0 (Saharia et al. 2022).
        clip_sample, clip_sample_range: clamp x0; ε then follows the clamped x0. Not for latents.
        use_flow_sigmas: the model is a flow.
        flow_shift, shift: static shift of a flow, under either of diffusers' two names; ``shift`` wins unless it is 1.
        shift_terminal: σ of the last call after shifting.
        use_dynamic_shifting, time_shift_type: take the shift from the ``mu`` of each `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: read by pipelines that compute ``mu``.
        timestep_type: "continuous" means a preconditioned (EDM) network, called with 0.25·log σ; ``prediction_type`` then
            says with which sign its output counts: "epsilon" as in Karras et al. 2022, "v_prediction" the opposite.
        sigma_min, sigma_max: range of σ of an EDM network; None: the ends of the VP schedule.
        sigma_data: standard deviation of the data that an EDM network was built for.
        sigma_schedule: grid of an EDM network that nothing above chooses another for, "karras" or "exponential".
        rho: exponent of the grid "karras".
    """


COMMON = frozenset(inspect.signature(common).parameters)


def configured(init: Callable) -> Callable:
    """Decorate ``__init__(self, …, **shared)``: ``shared`` becomes the arguments of `common`, and all are registered.

    diffusers learns what a scheduler accepts from the signature of its ``__init__``.
    """

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        init(self, *args, **kwargs)

    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named = {p.name for p in own}  # an argument of its own replaces the shared one of that name
    shared = [p for p in inspect.signature(common).parameters.values() if p.name not in named]
    checked.__signature__ = inspect.Signature(own + [p.replace(kind=p.KEYWORD_ONLY) for p in shared])
    return register_to_config(checked)


def validate(config: Mapping, init: Callable = common) -> None:
    """Refuse values that would only fail later.

    Args:
        config: all arguments of a scheduler.
        init: its ``__init__``, whose annotations say what types they have.

    Raises:
        UsageError: naming the allowed types or values.
    """
    for parameter in inspect.signature(init).parameters.values():
        if parameter.name in config and not _fits(config[parameter.name], parameter.annotation):
            hint = getattr(parameter.annotation, "__name__", str(parameter.annotation))
            raise UsageError(f"{parameter.name} must be {hint}; got {config[parameter.name]!r}.")
    allowed = {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": TIMESTEP_SPACINGS,
        "final_sigmas_type": ENDS,
        "time_shift_type": SHIFT_TYPES,
        "timestep_type": TIMESTEP_TYPES,
        "sigma_schedule": SIGMA_SCHEDULES,
    }
    for key, names in allowed.items():
        if config[key] not in names:
            raise unknown(key, str(config[key]), names)
    if config["grid"] is not None and config["grid"] not in GRIDS:
        raise unknown("grid", str(config["grid"]), GRIDS)
    if sum(bool(config[switch]) for switch in SWITCHES) > 1:
        raise UsageError(f"Set only one of {', '.join(SWITCHES)}.")
    grid_options(config)


def without_unset(config: Mapping, init: Callable) -> dict:
    """The configuration without the Nones that another class meant by leaving a value open, and this one cannot."""
    hints = {name: parameter.annotation for name, parameter in inspect.signature(init).parameters.items()}
    return {key: value for key, value in config.items() if value is not None or _fits(None, hints.get(key, object))}


def _fits(value, hint) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item_hint,) = typing.get_args(hint)
        iterable = hasattr(value, "__iter__") and not isinstance(value, str)
        return iterable and all(_fits(item, item_hint) for item in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return hint is inspect.Parameter.empty or isinstance(value, hint)


def completed(arguments: Mapping) -> dict:
    """Arguments that someone named, and what they imply over an existing configuration.

    A spacing or a switch sets ``grid`` aside, unless that is named as well; either name of the shift means both.
    """
    arguments = dict(arguments)
    if any(arguments.get(key) for key in ("timestep_spacing", *SWITCHES)):
        arguments.setdefault("grid", None)
    for name, other in (("shift", "flow_shift"), ("flow_shift", "shift")):
        if name in arguments:
            arguments.setdefault(other, arguments[name])
    return arguments


def grid_name(config: Mapping) -> str:
    """The name in `core.spacings.GRIDS` that a configuration asks for."""
    named = None if config["grid"] == "fast" and family(config) == "flow" else config["grid"]  # flows are well spaced
    chosen = [named, *(grid for switch, grid in SWITCHES.items() if config[switch])]
    fallback = config["sigma_schedule"] if family(config) == "edm" else config["timestep_spacing"]
    return next(filter(None, chosen), fallback)


def grid_options(config: Mapping) -> Options:
    """The parameters of the grid that a configuration asks for.

    Raises:
        UsageError: an exponent or a start that is not above 0.
    """
    power = config["grid_power"]
    if power is None and grid_name(config) == "karras":
        power = config["rho"]
    return Options(config["steps_offset"], power, config["grid_start"])


def translated(config: Mapping) -> dict:
    """The configuration of any diffusers scheduler with what its class left unsaid written out.

    Flow-matching Euler and Heun do not record that they are flows; only their ``shift`` without betas tells. EDM
    schedulers do not record that their networks are preconditioned; here that is ``timestep_type`` "continuous", as
    EulerDiscrete has it for Stable Video Diffusion. All keys that they read stay as they are, for the way back.

    Raises:
        UsageError: a schedule or a setting that does not exist here.
    """
    config = dict(config)
    kind = family(config)
    defaults = [key for key in config.get("_use_default_values", []) if key not in MODEL_KEYS]
    if "_use_default_values" in config:
        config["_use_default_values"] = defaults
    if kind == "edm":
        schedule: EDM = from_diffusers(config)
        config.update(timestep_type="continuous", sigma_data=schedule.sigma_data)
        if "beta_start" not in config:  # else None means the ends of the VP schedule, to EulerDiscrete as well
            config.update(sigma_min=schedule.sigma_min, sigma_max=schedule.sigma_max)
    elif kind == "vp":
        if "timestep_type" in config:  # EulerDiscrete ignores "continuous" unless it predicts v
            config["timestep_type"] = "discrete"
        limits = (config.get("sigma_min"), config.get("sigma_max"))
        if limits != (None, None) and any(config.get(switch) for switch in SWITCHES):
            raise UsageError(
                f"sigma_min and sigma_max of a VP model are not available; got {limits}: set them to None or pass sigmas."
            )
    elif "beta_start" not in config:
        for key in ("invert_sigmas", "stochastic_sampling"):
            if config.pop(key, False):  # taken out, because diffusers would tell users that it is ignored
                raise UsageError(f"{key} is not available here; use the pipeline's own scheduler.")
        if (config.get("sigma_max") or 0.0) > 1.0:
            raise UsageError(f"A flow with sigma_max = {config['sigma_max']} is not available; use its own scheduler.")
        config.pop("_class_name", None)
        # Not use_flow_sigmas: FLUX-type pipelines then ignore their own sigmas.
        flow = {"prediction_type": "flow_prediction", "flow_shift": config.get("shift", 1.0)}
        config.update(flow, _use_default_values=[key for key in defaults if key not in flow])
    return config
