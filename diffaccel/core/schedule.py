"""Noise schedules: x_t = α(t)·x0 + σ(t)·ε, for VP, VE, EDM and rectified flow.

The time ``t`` is the number that diffusers calls a timestep: 0 … T−1 for discrete VP checkpoints (floats in between
are meaningful), 1000·s for flow models, σ itself for VE, log(σ/α)/4 for EDM. All methods take and return float64 tensors
of any shape.

Notation: rho = σ/α (noise-to-signal ratio), lambda_ = log(α/σ) (half log-SNR).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from .errors import UsageError, unknown


def _as64(value) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


class NoiseSchedule(ABC):
    """Maps time to noise level and back.

    Attributes:
        t_min, t_max: the cleanest and the noisiest time at which networks of this schedule are called.
        t_clean: time of the clean image, from which rules in t count; t_min where the clean image lies at −∞ (EDM).
        t_end: the number that marks the clean end of a grid, below every time at which a network is called.
    """

    t_min: float
    t_max: float
    t_clean: float = 0.0
    t_end: float = 0.0

    def __deepcopy__(self, memo) -> "NoiseSchedule":
        return self  # never changed, and shared by all copies of a network

    @abstractmethod
    def rho(self, t) -> torch.Tensor:
        """Noise-to-signal ratio σ/α at time t; infinite where α = 0."""

    @abstractmethod
    def t_from_rho(self, rho) -> torch.Tensor:
        """Exact inverse of `rho`, clipped to [t_min, t_max] where times outside mean nothing (VP, VE)."""

    @abstractmethod
    def level_from_rho(self, rho) -> tuple[torch.Tensor, torch.Tensor]:
        """(α, σ) of the level with noise-to-signal ratio rho; rho may be 0 or infinite."""

    def end_from_rho(self, rho) -> tuple[torch.Tensor, torch.Tensor]:
        """(α, σ) of the level rho in the scale in which a run hands over its result: native, except for EDM."""
        return self.level_from_rho(rho)

    def level(self, t) -> tuple[torch.Tensor, torch.Tensor]:
        """(α, σ) at time t."""
        return self.level_from_rho(self.rho(t))

    def alpha(self, t) -> torch.Tensor:
        """Signal scale α(t)."""
        return self.level(t)[0]

    def sigma(self, t) -> torch.Tensor:
        """Noise scale σ(t)."""
        return self.level(t)[1]

    def lambda_(self, t) -> torch.Tensor:
        """Half log-SNR log(α/σ)."""
        return -torch.log(self.rho(t))

    def t_from_lambda(self, lambda_) -> torch.Tensor:
        """Time at which the half log-SNR is lambda_."""
        return self.t_from_rho(torch.exp(-_as64(lambda_)))

    def time(self, u) -> torch.Tensor:
        """Time at the fraction u ∈ [0, 1] of the schedule's own index (0 clean, 1 noisiest).

        Training methods draw u; what is uniform in u is what the model family was trained on.
        """
        return self.t_min + (self.t_max - self.t_min) * _as64(u)

    @property
    def initial_scale(self) -> float:
        """Standard deviation of the noise that sampling starts from, in native scale."""
        return 1.0


class _VariancePreserving(NoiseSchedule):
    def level_from_rho(self, rho):
        rho = _as64(rho)
        norm = torch.sqrt(1.0 + rho**2)
        return 1.0 / norm, torch.where(torch.isinf(rho), torch.ones_like(rho), rho / norm)


class VPDiscrete(_VariancePreserving):
    """A DDPM-type table of ᾱ over integer timesteps; log rho is interpolated linearly in between.

    Args:
        alphas_cumprod: (T,) decreasing ᾱ in (0, 1).
    """

    t_end = -1.0  # time 0 of a table is still noisy

    def __init__(self, alphas_cumprod):
        table = _as64(alphas_cumprod).flatten()
        if table.numel() < 2 or bool((table <= 0).any()) or bool((table >= 1).any()) or bool((table.diff() >= 0).any()):
            raise UsageError("alphas_cumprod must be a strictly decreasing table of at least 2 values inside (0, 1).")
        self.alphas_cumprod = table
        self._tables = {table.device: 0.5 * (torch.log1p(-table) - torch.log(table))}  # log rho, a copy per device
        self.t_min, self.t_max = 0.0, float(table.numel() - 1)

    def rho(self, t):
        t = _as64(t).clamp(self.t_min, self.t_max)
        table = self._log_rho(t.device)
        below = t.floor().long().clamp(max=table.numel() - 2)
        return torch.exp(torch.lerp(table[below], table[below + 1], t - below))

    def t_from_rho(self, rho):
        log_rho = torch.log(_as64(rho))
        table = self._log_rho(log_rho.device)
        log_rho = log_rho.clamp(table[0], table[-1])
        above = torch.searchsorted(table, log_rho).clamp(1, table.numel() - 1)
        return above - (table[above] - log_rho) / (table[above] - table[above - 1])

    def _log_rho(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:  # kept, so that training on a GPU never waits for the CPU here
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


class VPLinear(_VariancePreserving):
    """Continuous VP with linear β(t) = beta_min + t·(beta_max − beta_min), t ∈ [t_min, 1] (Song et al. 2021)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0):
        self.beta_min, self.beta_max = beta_min, beta_max
        self.t_min, self.t_max = t_min, t_max

    def rho(self, t):
        t = _as64(t)
        return torch.sqrt(torch.expm1(0.5 * t**2 * (self.beta_max - self.beta_min) + t * self.beta_min))

    def t_from_rho(self, rho):
        log_term = torch.log1p(_as64(rho) ** 2)
        root = torch.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * log_term)
        return (2.0 * log_term / (self.beta_min + root)).clamp(self.t_min, self.t_max)


class VPCosine(_VariancePreserving):
    """Continuous VP with ᾱ(t) = cos²((t+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2) (Nichol & Dhariwal 2021)."""

    def __init__(self, s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946):
        self.s, self.t_min, self.t_max = s, t_min, t_max
        self._cos0 = math.cos(s / (1.0 + s) * math.pi / 2.0)

    def rho(self, t):
        alpha = torch.cos((_as64(t) + self.s) / (1.0 + self.s) * math.pi / 2.0) / self._cos0
        return torch.sqrt((1.0 - alpha**2).clamp_min(0.0)) / alpha

    def t_from_rho(self, rho):
        alpha = 1.0 / torch.sqrt(1.0 + _as64(rho) ** 2)
        t = torch.arccos((alpha * self._cos0).clamp(-1.0, 1.0)) * 2.0 / math.pi * (1.0 + self.s) - self.s
        return t.clamp(self.t_min, self.t_max)


def _karras_level(u, low: float, high: float) -> torch.Tensor:
    return (low ** (1 / 7) + _as64(u) * (high ** (1 / 7) - low ** (1 / 7))) ** 7


class VE(NoiseSchedule):
    """Variance exploding: α = 1, t = σ ∈ [sigma_min, sigma_max]; index fractions follow Karras et al. (ρ = 7)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        self.t_min, self.t_max = sigma_min, sigma_max

    def rho(self, t):
        return _as64(t)

    def t_from_rho(self, rho):
        return _as64(rho).clamp(self.t_min, self.t_max)

    def level_from_rho(self, rho):
        rho = _as64(rho)
        return torch.ones_like(rho), rho

    def time(self, u):
        return _karras_level(u, self.t_min, self.t_max)

    @property
    def initial_scale(self) -> float:
        return self.t_max


class EDM(NoiseSchedule):
    """Variance exploding through the eyes of a preconditioned network (Karras et al. 2022, table 1 and eq. 7).

    Such a network is called with c_in·(x0 + ρ·ε), c_in = 1/√(ρ² + σ_data²), and c_noise = log(ρ)/4. The former is the
    native state here, the latter the time:

        α = 1/√(ρ² + σ_data²),     σ = ρ/√(ρ² + σ_data²),     t = log(ρ)/4.

    So σ² + (σ_data·α)² = 1, noisy states have variance 1, and with σ_data = 1 the levels are those of a VP schedule. The
    clean image lies at t = −∞: grids mark it by t_min − 1. Results of a run have α = 1, as diffusers' EDM schedulers
    return them. Index fractions follow Karras et al. (ρ = 7).

    Args:
        sigma_min, sigma_max: range of ρ in which the network is called.
        sigma_data: standard deviation of the data that the network was built for.

    Raises:
        UsageError: values that are not 0 < sigma_min < sigma_max and 0 < sigma_data.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5):
        if not (0.0 < sigma_min < sigma_max < math.inf and 0.0 < sigma_data < math.inf):
            raise UsageError(
                f"EDM needs 0 < sigma_min < sigma_max and 0 < sigma_data; got {sigma_min}, {sigma_max}, {sigma_data}."
            )
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.t_min, self.t_max = 0.25 * math.log(sigma_min), 0.25 * math.log(sigma_max)
        self.t_clean, self.t_end = self.t_min, self.t_min - 1.0

    def rho(self, t):
        return torch.exp(4.0 * _as64(t))

    def t_from_rho(self, rho):
        return (0.25 * torch.log(_as64(rho))).clamp(self.t_min, self.t_max)

    def level_from_rho(self, rho):
        rho = _as64(rho)
        norm = torch.sqrt(rho**2 + self.sigma_data**2)
        return 1.0 / norm, torch.where(torch.isinf(rho), torch.ones_like(rho), rho / norm)

    def end_from_rho(self, rho):
        rho = _as64(rho)
        return torch.ones_like(rho), rho

    def time(self, u):
        return self.t_from_rho(_karras_level(u, self.sigma_min, self.sigma_max))


class Flow(NoiseSchedule):
    """Rectified flow: α = 1 − s, σ = s, t = T·s with T training timesteps."""

    def __init__(self, num_train_timesteps: int = 1000):
        self.num_train_timesteps = num_train_timesteps
        self.t_min, self.t_max = 1.0, float(num_train_timesteps)

    def rho(self, t):
        s = _as64(t) / self.num_train_timesteps
        return s / (1.0 - s)

    def t_from_rho(self, rho):
        return self.level_from_rho(rho)[1] * self.num_train_timesteps

    def level_from_rho(self, rho):
        rho = _as64(rho)
        alpha = 1.0 / (1.0 + rho)
        return alpha, 1.0 - alpha


def _betas(config: Mapping) -> torch.Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return _as64(list(trained))
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    match kind:
        case "linear":
            return torch.linspace(start, end, steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":
            edge = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        case "sigmoid":
            return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (end - start) + start
    raise unknown("beta_schedule", str(kind), ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))


def _zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Shift and scale √ᾱ to vanish at the last timestep (Lin et al. 2023, algorithm 1), then lift it to 2⁻²⁴.

    Less where the table before it is already that small (linear betas), so that the table stays decreasing.
    """
    root = alphas_cumprod.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = root**2
    rescaled[-1] = min(2.0**-24, 0.25 * float(rescaled[-2]))
    return rescaled


_OTHER = ("ScoreSde", "KarrasVe", "VQ", "RePaint", "CosineDPM", "CMStochastic", "SCM")


def family(config: Mapping, name: str = "") -> str:
    """What kind of model a diffusers scheduler's configuration belongs to: "vp", "flow" or "edm".

    Args:
        config: the configuration; flow-matching schedulers do not record that they are flows, only ``shift`` without
            betas tells. EDM is told by ``timestep_type`` "continuous", by ``sigma_data`` or by the name.
        name: class name, where the configuration lacks ``_class_name``.

    Raises:
        UsageError: a scheduler of another kind (score-based VE SDE, consistency models, IPNDM's own cosine, …).
    """
    name = name or str(config.get("_class_name", ""))
    without_betas = "beta_start" not in config
    if (
        "FlowMatch" in name
        or "AncestralRF" in name
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return "flow"
    if without_betas and ("shift" in config or {"eta", "s_noise"} <= set(config)):  # the latter: ancestral Euler of LTX
        return "flow"
    # EulerDiscrete ignores "continuous" unless it predicts v; sigma_data is what EDM schedulers and ours have besides.
    continuous = config.get("timestep_type") == "continuous"
    if name.startswith("EDM") or (
        continuous and (config.get("prediction_type") == "v_prediction" or "sigma_data" in config)
    ):
        return "edm"
    public = {key for key in config if not key.startswith("_")}
    other = name.startswith(_OTHER) or {"snr", "sigma_max"} <= public
    other |= name.startswith("IPNDM") and without_betas  # ours of that name has betas
    if "sigma_data" in config and without_betas:
        # CosineDPMSolverMultistep (network time arctan σ) has all keys of EDM's DPM-Solver but algorithm_type.
        other |= "sigma_schedule" not in config or ("solver_order" in config and "algorithm_type" not in config)
        if not other:
            return "edm"
    # A scheduler's own configuration, of a class without betas: what it is called does not matter, it is not VP.
    recorded = bool(name) or "_use_default_values" in config
    other |= recorded and not any("beta" in key for key in public)
    if other or (public == {"num_train_timesteps", "trained_betas"} and config["trained_betas"] is None):
        raise UsageError(
            f"The noise schedule of {name or 'this scheduler'} is neither VP, EDM nor a flow; it cannot be used here."
        )
    return "vp"


def from_diffusers(scheduler) -> NoiseSchedule:
    """Read the noise schedule of a diffusers scheduler, or of its config.

    Args:
        scheduler: a SchedulerMixin object or its config mapping.

    Raises:
        UsageError: a kind or a beta schedule that is not known, an EDM range that is empty.
    """
    is_config = isinstance(scheduler, Mapping)
    config = scheduler if is_config else scheduler.config
    kind = family(config, "" if is_config else type(scheduler).__name__)
    if kind == "flow":
        return Flow(config.get("num_train_timesteps", 1000))
    return _edm(config) if kind == "edm" else _vp(config)


def network_output(config: Mapping) -> str:
    """What the network of a scheduler's configuration predicts, by its name in `core.prediction`.

    EDM schedulers use other networks' names; flow-matching schedulers leave it out.
    """
    kind = family(config)
    output = config.get("prediction_type", "flow_prediction" if kind == "flow" else "epsilon")
    return {"epsilon": "edm", "v_prediction": "edm_v"}.get(output, output) if kind == "edm" else output


def _vp(config: Mapping) -> VPDiscrete:
    alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
    shift = config.get("snr_shift_scale", 1.0)  # CogVideoX: SNR divided by it, as resolution shifts do
    alphas_cumprod = alphas_cumprod / (shift + (1.0 - shift) * alphas_cumprod)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return VPDiscrete(alphas_cumprod)


def _edm(config: Mapping) -> EDM:
    low, high, data = config.get("sigma_min"), config.get("sigma_max"), config.get("sigma_data")
    if "beta_start" not in config:
        return EDM(0.002 if low is None else low, 80.0 if high is None else high, 0.5 if data is None else data)
    if low is None or high is None:  # EulerDiscrete then takes the ends of its table
        table = _vp(config)
        low = float(table.rho(table.t_min)) if low is None else low
        high = float(table.rho(table.t_max)) if high is None else high
    return EDM(low, high, 1.0 if data is None else data)
