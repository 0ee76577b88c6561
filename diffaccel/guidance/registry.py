"""The rules by the names that the command line uses. Importing this needs neither torch nor diffusers."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError, UsageError, unknown
from ..core.lazy import load_object


@dataclass(frozen=True)
class RuleInfo:
    """One rule.

    Attributes:
        name: what the user types.
        summary: one line.
        paper: where it comes from.
        evaluations: network evaluations per sampler call, in words where it depends.
        target: "module:class".
        wrapper: it changes another rule, and is added to it by setting one of its options.
        needs: example of the option without which it is nothing, if there is one.
    """

    name: str
    summary: str
    paper: str
    evaluations: str
    target: str
    wrapper: bool = False
    needs: str = ""

    def load(self) -> type:
        """Import and return the class."""
        return load_object(self.target)

    def options(self) -> dict[str, inspect.Parameter]:
        """Options besides the scale and, of wrappers, the rule inside."""
        parameters = inspect.signature(self.load()).parameters
        return {name: value for name, value in parameters.items() if name not in ("scale", "rule")}


def _rule(name, summary, paper, evaluations, cls, module="rules", wrapper=False, needs="") -> RuleInfo:
    return RuleInfo(name, summary, paper, evaluations, f"diffaccel.guidance.{module}:{cls}", wrapper, needs)


RULES = {
    rule.name: rule
    for rule in (
        _rule("cfg", "classifier-free guidance", "Ho & Salimans 2022 (arXiv 2207.12598)", "2", "CFG"),
        _rule(
            "apg",
            "adaptive projected guidance: high scales without oversaturation",
            "Sadat, Hilliges & Weber 2025 (arXiv 2410.02416)",
            "2",
            "APG",
        ),
        _rule(
            "cfg++",
            "guided x0, unconditional noise; scale in [0, 1]",
            "Chung et al. 2025 (arXiv 2406.08070)",
            "2",
            "CFGPlusPlus",
        ),
        _rule(
            "cfg-zero-star",
            "unconditional prediction scaled to fit, for flow models",
            "Fan et al. 2025 (arXiv 2503.18886)",
            "2",
            "CFGZeroStar",
        ),
        _rule(
            "perp-neg",
            "negatives without what they share with the prompt",
            "Armandpour et al. 2023 (arXiv 2304.04968)",
            "2 + negatives",
            "PerpNeg",
            needs="negatives=3",
        ),
        _rule(
            "autoguidance",
            "away from a weaker version of the model",
            "Karras et al. 2024 (arXiv 2406.02507)",
            "1 + weak model",
            "AutoGuidance",
            needs="model=FOLDER",
        ),
        _rule(
            "interval",
            "another rule inside a range of noise levels only",
            "Kynkäänniemi et al. 2024 (arXiv 2404.07724)",
            "1 outside",
            "Interval",
            wrapper=True,
            needs="sigma_range=[0.3,5]",
        ),
        _rule(
            "rescale",
            "another rule, with the deviation of the conditional prediction",
            "Lin et al. 2024 (arXiv 2305.08891)",
            "as inside",
            "Rescale",
            wrapper=True,
            needs="factor=0.7",
        ),
    )
}


def build_rule(name: str, scale: float | None = None, options: Mapping[str, Mapping] | None = None):
    """A rule from names and numbers, as the command line has them.

    Args:
        name: of a rule that is no wrapper.
        scale: guidance scale; None for the rule's default.
        options: by rule, such as {"apg": {"eta": 0.5}, "interval": {"sigma_range": [0.3, 5]}}; naming a wrapper adds it.
            The model of autoguidance may be a teacher name or folder.

    Raises:
        UsageError: an unknown rule, an option that it does not have, or a value that it refuses.
        DataError, MissingWeightsError: the weak model of autoguidance cannot be opened.
    """
    options = {} if options is None else dict(options)
    _check_names(name, options)
    given, needed = dict(options.pop(name, {})), RULES[name].needs
    if needed and needed.partition("=")[0] not in given:
        raise UsageError(f"{name} works with something besides the model: set {name}.{needed}.")
    if isinstance(given.get("model"), (str, Path)):
        given["model"] = _network(given["model"])
    rule = _made(name, **given, **({} if scale is None else {"scale": scale}))
    for wrapper in ("rescale", "interval"):  # an interval outermost, so that it spares what a rescaled rule needs
        if wrapper in options:
            rule = _made(wrapper, rule=rule, **options[wrapper])
    return rule


def _check_names(name: str, options: Mapping[str, Mapping]) -> None:
    """Refuse a name that is no rule of its own, and options that the rules do not have."""
    plain = [rule.name for rule in RULES.values() if not rule.wrapper]
    if name not in plain:
        if name in RULES:
            raise UsageError(
                f"{name} changes another rule: choose that one, such as cfg, and set {name}.{RULES[name].needs}."
            )
        raise unknown("guidance", str(name), plain)
    for group, values in options.items():
        if group not in RULES:
            raise unknown("guidance", group, RULES)
        if group != name and not RULES[group].wrapper:
            raise UsageError(f"Options of {group} do nothing in {name}: choose {group} as guidance, or leave them out.")
        known = RULES[group].options()
        if not isinstance(values, Mapping):
            raise UsageError(f"{group} is a rule: set one of its options, {', '.join(known)}.")
        if "scale" in values:
            raise UsageError(f"The scale of {group} is the guidance scale; set that one in place of {group}.scale.")
        for option in values.keys() - known.keys():
            raise unknown(f"option of {group}", option, known)


def _network(model: str | Path):
    from ..models.teachers import load_pipeline

    weak = load_pipeline(model)
    network = getattr(weak, "unet", None) or getattr(weak, "transformer", None)
    if network is None:
        raise DataError(
            f"{model} is a {type(weak).__name__} without a U-Net or transformer; pass its network, AutoGuidance(model=…)."
        )
    return network


def _made(name: str, **arguments):
    try:
        return RULES[name].load()(**arguments)
    except TypeError:  # words where numbers belong, or a number where a list does
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "rule")
        raise UsageError(f"{name} cannot be made with {given}; see `diffaccel list guidance`.") from None
