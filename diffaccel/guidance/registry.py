"""The rules by the names that the command line uses. Importing this needs neither torch nor diffusers."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.errors import UsageError, unknown
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
    """

    name: str
    summary: str
    paper: str
    evaluations: str
    target: str
    wrapper: bool = False

    def load(self) -> type:
        """Import and return the class."""
        return load_object(self.target)

    def options(self) -> dict[str, inspect.Parameter]:
        """Options besides the scale and, of wrappers, the rule inside."""
        parameters = inspect.signature(self.load()).parameters
        return {name: value for name, value in parameters.items() if name not in ("scale", "rule")}


def _rule(name, summary, paper, evaluations, cls, module="rules", wrapper=False) -> RuleInfo:
    return RuleInfo(name, summary, paper, evaluations, f"diffaccel.guidance.{module}:{cls}", wrapper)


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
        ),
        _rule(
            "autoguidance",
            "away from a weaker version of the model",
            "Karras et al. 2024 (arXiv 2406.02507)",
            "1 + weak model",
            "AutoGuidance",
        ),
        _rule(
            "interval",
            "another rule inside a range of noise levels only",
            "Kynkäänniemi et al. 2024 (arXiv 2404.07724)",
            "1 outside",
            "Interval",
            wrapper=True,
        ),
        _rule(
            "rescale",
            "another rule, with the deviation of the conditional prediction",
            "Lin et al. 2024 (arXiv 2305.08891)",
            "as inside",
            "Rescale",
            wrapper=True,
        ),
    )
}


def build_rule(name: str, scale: float | None = None, options: Mapping[str, Mapping] | None = None):
    """A rule from names and numbers, as the command line has them.

    Args:
        name: of a rule that is no wrapper.
        scale: guidance scale; None for the rule's default.
        options: by rule, such as {"apg": {"eta": 0.5}, "interval": {"sigma_range": [0.3, 5]}}; naming a wrapper adds it.

    Raises:
        UsageError: an unknown rule, an option that it does not have, or a value that it refuses.
    """
    plain = [rule.name for rule in RULES.values() if not rule.wrapper]
    if name not in plain:
        raise unknown("guidance", str(name), plain)
    options = dict(options or {})
    for group, values in options.items():
        if group not in RULES:
            raise unknown("guidance", group, RULES)
        if group != name and not RULES[group].wrapper:
            raise UsageError(f"Options of {group} have no effect on {name}.")
        if not isinstance(values, Mapping):
            raise UsageError(f"{group} is a rule: set one of its options, {', '.join(RULES[group].options())}.")
        for option in values:
            if option not in RULES[group].options():
                raise unknown(f"option of {group}", option, RULES[group].options())
    given = dict(options.pop(name, {}))
    if isinstance(given.get("model"), str):
        from ..models.teachers import load_pipeline

        given["model"] = load_pipeline(given["model"]).unet
    if isinstance(given.get("negatives"), (int, list)):  # classes
        classes = given["negatives"] if isinstance(given["negatives"], list) else [given["negatives"]]
        given["negatives"] = [{"class_labels": item} if isinstance(item, int) else item for item in classes]
    rule = RULES[name].load()(**given, **({} if scale is None else {"scale": scale}))
    for wrapper in ("rescale", "interval"):  # an interval outermost, so that it spares what a rescaled rule needs
        if wrapper in options:
            rule = RULES[wrapper].load()(rule, **options[wrapper])
    return rule
