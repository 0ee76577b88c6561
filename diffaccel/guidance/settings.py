"""Settings of adaptive projected guidance that others published, by model. Importing this needs neither torch nor diffusers."""

from dataclasses import dataclass

from ..core.errors import UsageError, unknown


@dataclass(frozen=True)
class Setting:
    """Arguments of `APG` for a kind of model, in x0 space.

    Attributes:
        name: what the user types.
        models: which models are meant.
        scale: guidance scale, None where none was published.
        eta: as for `APG`.
        norm_threshold: as for `APG`, None where it has to be measured, see `calibrate`.
        momentum: as for `APG`.
        source: where the numbers come from.
        confidence: how sure it is that these are its numbers; none of them was measured here.
    """

    name: str
    models: str
    scale: float | None
    eta: float
    norm_threshold: float | None
    momentum: float
    source: str
    confidence: str


_PAPER = "Sadat et al. 2025, appendix"
_MEMORY = "from memory of the paper's appendix, unverified"

_PORTS = f"{_MEMORY}; cap and momentum are defaults of ports"


def _setting(name, models, scale, norm_threshold, momentum, source, confidence) -> Setting:
    return Setting(name, models, scale, 0.0, norm_threshold, momentum, source, confidence)


SETTINGS = {
    setting.name: setting
    for setting in (
        _setting(
            "sdxl",
            "Stable Diffusion XL",
            10.0,
            15.0,
            -0.5,
            f"{_PAPER}, table 10, at scale 15; 5 to 10 is ordinary use",
            "good: quoted by diffusers and three ports",
        ),
        _setting("sd21", "Stable Diffusion 2.1", 10.0, 7.5, -0.75, _PAPER, _MEMORY),
        _setting("edm2-s", "EDM2-S, ImageNet 512", 4.0, 2.5, -0.75, _PAPER, _PORTS),
        _setting("edm2-xxl", "EDM2-XXL, ImageNet 512", 2.0, 2.5, -0.75, _PAPER, _PORTS),
        _setting("dit", "DiT-XL/2, ImageNet 256", 4.0, 5.0, -0.5, _PAPER, _MEMORY),
        _setting(
            "flow",
            "flow models such as SD3",
            None,
            None,
            -0.5,
            "nothing published; momentum between -0.5 and -0.75 as elsewhere",
            "low: measure the cap",
        ),
        _setting(
            "video",
            "video models such as Wan",
            None,
            27.0,
            -0.75,
            "public scripts, which cap between 27 and 55",
            "low: what users do",
        ),
    )
}


def recommended_guidance(model: str, scale: float | None = None):
    """The `APG` that others recommend for a kind of model, in x0 space.

    Args:
        model: a name in `diffaccel list guidance-settings`, which tells the source of the numbers and how sure they are.
        scale: guidance scale, 1 for none; None for the one in that list.

    Raises:
        UsageError: an unknown name, or no scale where none was published.
    """
    if not isinstance(model, str) or model not in SETTINGS:
        raise unknown("guidance setting", model, SETTINGS)
    setting = SETTINGS[model]
    scale = setting.scale if scale is None else scale
    if scale is None:
        raise UsageError(
            f"No guidance scale was published for {setting.models}: pass the one that you use with "
            f"classifier-free guidance, such as recommended_guidance({model!r}, scale=7)."
        )
    from .rules import APG

    return APG(scale, setting.eta, setting.norm_threshold, setting.momentum)
