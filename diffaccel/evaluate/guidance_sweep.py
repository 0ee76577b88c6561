"""What guidance rules do as their scale grows: one model, the same noise and classes everywhere, one reference."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..core.errors import UsageError, unknown
from ..generation import generate, progress_bar
from ..guidance.base import Rule, Wrapper
from ..guidance.registry import RULES, build_rule
from ..guidance.rules import CFG
from ..models.data import load_digits
from ..models.teachers import load_pipeline, resolve_teacher
from .classes import class_accuracy
from .features.appearance import AppearanceFeatures
from .groups import within_classes
from .run import evaluate_images
from .sources import resolve

UNGUIDED, SHOWN = "unguided", 20
MEASURES = ("fd", "precision", "recall", "overshoot", *AppearanceFeatures.KINDS, "accuracy")


@dataclass
class Row:
    """A rule at one scale.

    Attributes:
        rule: as it was typed, or `UNGUIDED`.
        scale: guidance scale; 1 for the unguided model.
        nfe: network evaluations per image, a guidance pair counted as two.
        runs: by seed, the values of `MEASURES`, accuracy None without a classifier, and "report", the
            `report.Report` that most of them come from. Overshoot is the mean over values of max(|x| − 1, 0), of samples
            before they are clipped to [−1, 1]; 0 where the scheduler clips its predictions.
        samples: the first images of the first seed, uint8 (≤ SHOWN, C, H, W).
    """

    rule: str
    scale: float
    nfe: int = 0
    runs: dict[int, dict] = field(default_factory=dict)
    samples: torch.Tensor | None = field(default=None, repr=False)

    def mean(self, measure: str) -> float | None:
        """Over seeds; None where there is no value."""
        values = [run[measure] for run in self.runs.values()]
        return None if None in values else statistics.fmean(values)

    def deviation(self, measure: str) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        values = [run[measure] for run in self.runs.values()]
        return None if None in values or len(values) < 2 else statistics.stdev(values)

    def to_dict(self) -> dict:
        """JSON-able content, without the samples."""
        means, deviations = ({measure: of(measure) for measure in MEASURES} for of in (self.mean, self.deviation))
        runs = [
            {"seed": seed, **run, "report": [result.to_dict() for result in run["report"].results]}
            for seed, run in self.runs.items()
        ]
        return {"rule": self.rule, "scale": self.scale, "nfe": self.nfe, "mean": means, "sd": deviations, "runs": runs}


@dataclass
class Sweep:
    """What `sweep_guidance` found.

    Attributes:
        settings: all that it was told.
        rows: the unguided model, then every rule at every scale, all from the same noise and classes.
        real: saturation, contrast and clipped values of the reference.
        real_samples: some of its images, uint8 (C, H, W).
    """

    settings: dict
    rows: list[Row]
    real: dict[str, float] = field(default_factory=dict)
    real_samples: Sequence[torch.Tensor] = field(default=(), repr=False)

    @property
    def report(self):
        """The `report.Report` of the unguided model."""
        return next(iter(self.rows[0].runs.values()))["report"]

    def to_dict(self) -> dict:
        """JSON-able content."""
        facts = {"settings": self.settings, "features": self.report.features, "environment": self.report.environment}
        return {**facts, "warnings": self.report.warnings, "real": self.real, "rows": [r.to_dict() for r in self.rows]}


def named_rule(text: str, scale: float, options: Mapping[str, Mapping] | None = None) -> Rule:
    """A rule from its name, or from names of wrappers and a rule: "cfg", "interval:cfg", "interval:rescale:apg".

    Args:
        text: names in `guidance.registry.RULES`; a rescaling is always inside an interval.
        scale: guidance scale.
        options: by rule; those of rules that are not in ``text`` are ignored.

    Raises:
        UsageError: an unknown rule or option, or a value that the rule refuses.
    """
    *wrappers, name = text.split(":")
    for wrapper in wrappers:
        if wrapper not in RULES or not RULES[wrapper].wrapper:
            raise unknown("wrapper of a rule", wrapper, [rule.name for rule in RULES.values() if rule.wrapper])
    if name in RULES and RULES[name].wrapper:
        raise UsageError(f"{name} changes another rule; write which, such as {name}:cfg.")
    return build_rule(name, scale, {part: (options or {}).get(part, {}) for part in (name, *wrappers)})


def sweep_guidance(
    model: str,
    rules: Sequence[str] = ("cfg", "apg"),
    scales: Sequence[float] = (2.0, 5.0, 10.0, 15.0),
    *,
    seeds: Sequence[int] = (0,),
    num: int = 1000,
    steps: int | None = None,
    sampler: str | None = None,
    options: Mapping[str, Mapping] | None = None,
    reference: str | None = None,
    features: str = "auto",
    batch_size: int = 256,
    device: str | None = None,
    progress: bool = False,
) -> Sweep:
    """Measure a class-conditional pixel model under several guidance rules at several scales.

    Sample i starts from the same noise and shows the same class under every rule; classes are drawn in turn.

    Args:
        model: teacher name or model folder.
        rules: see `named_rule`.
        scales: guidance scales, for every rule.
        seeds: of the samples, ``num`` for each.
        num: images per rule, scale and seed; plug-in distances compare at equal ``num`` only.
        steps, sampler: default: the model's own.
        options: of the rules, such as {"apg": {"eta": 0.5}}.
        reference: real images, see `sources.resolve`; default: those that belong to a named teacher.
        features: of FD, precision and recall, see `settings.Settings`.
        batch_size: images per network call.
        device: torch device; default CUDA where there is one.
        progress: draw a bar on stderr, on a terminal.

    Raises:
        UsageError: no rules, scales or seeds, unknown rules or options, a model without classes, no reference.
        DataError, MissingWeightsError, NumericalError: see `generation.generate` and `run.evaluate_images`.
    """
    for name, values in (("rules", rules), ("scales", scales), ("seeds", seeds)):
        if not values:
            raise UsageError(f"Comparing guidance needs at least one of {name}; got none.")
    rules, scales, seeds = (list(dict.fromkeys(values)) for values in (rules, scales, seeds))
    _check_used(options or {}, rules)
    pairs = [(rule, scale) for rule in rules for scale in scales]
    jobs = [(Row(UNGUIDED, 1.0), CFG(1.0)), *((Row(*pair), named_rule(*pair, options)) for pair in pairs)]
    pipeline, reference = _opened(model), reference or _own_data(model)
    digits = resolve(reference).kind == "dataset"  # asked here, so that it is refused before anything is drawn
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with progress_bar(len(jobs) * len(seeds) * num, progress) as bar:
        for row, rule in jobs:
            watched = _Watched(rule)
            for seed in seeds:
                bar.set_description(f"{row.rule} at {row.scale:g}, seed {seed}")
                batches = generate(
                    pipeline, num, steps=steps, sampler=sampler, seed=seed, guidance=watched, batch_size=batch_size, progress=bar
                )  # fmt: skip
                drawn = [(images, labels, watched.overshoot()) for images, labels in batches]
                images, labels, overshoot = map(torch.cat, zip(*drawn, strict=True))
                row.runs[seed] = _measured(images, labels, reference, features, digits)
                row.runs[seed]["overshoot"] = float(overshoot.mean())
                row.samples = images[:SHOWN] if row.samples is None else row.samples
                row.nfe = batches.nfe
    report = row.runs[seed]["report"]
    written = json.loads(json.dumps(options or {}), parse_constant=str)  # JSON has no infinity
    settings = {"model": str(model), "rules": rules, "scales": scales, "seeds": seeds, "num": num, "steps": steps,
                "sampler": sampler, "options": written, "reference": reference, "features": features}  # fmt: skip
    real = {kind: report[f"{kind} of real images"].value for kind in AppearanceFeatures.KINDS}
    samples = [image[: images.shape[1]] for image in report.samples["real"][:SHOWN]]
    samples = _in_turn(*load_digits(reference.partition(":")[2] or "train")) if digits else samples
    return Sweep(settings, [row for row, _ in jobs], real, samples)


class _Watched(Wrapper):
    """Another rule, with a look at where its run ends."""

    def __init__(self, rule: Rule):
        self.rule, self.state = rule, None

    @property
    def corrects(self):
        return True  # that is, wants to see the state after every step

    def correct(self, state, context):
        self.state = super().correct(state, context)
        return self.state

    def overshoot(self) -> torch.Tensor:
        """Mean of max(|x| − 1, 0) of every sample of the last run, (B,)."""
        return (self.state.float().abs() - 1.0).clamp_min(0.0).flatten(1).mean(1).cpu()


def _check_used(options: Mapping, rules: list[str]) -> None:
    for name in options.keys() - {part for rule in rules for part in rule.split(":")}:
        if name not in RULES:
            raise unknown("guidance", name, RULES)
        wrapped = f", such as {name}:{rules[0]}" if RULES[name].wrapper else ""
        raise UsageError(f"Options of {name} have no effect on {', '.join(rules)}: name it among the rules{wrapped}.")


def _opened(model: str):
    pipeline = load_pipeline(model)
    if getattr(pipeline, "num_classes", None) is None:
        raise UsageError(f"{model} has no classes to be guided by; give a pixel model with classes, such as digits.")
    return pipeline


def _own_data(model: str) -> str:
    _, info = resolve_teacher(model)
    if info is None or not info.data:
        raise UsageError(f"What real images of {model} look like is not known: give a reference, such as their folder.")
    return info.data


def _measured(images: torch.Tensor, labels: torch.Tensor, reference: str, features: str, digits: bool) -> dict:
    """Values of one run, all but overshoot."""
    report = evaluate_images((images, labels), reference, ("fid", "prdc", "appearance"), features)
    accuracy = class_accuracy(images, labels) if digits else None
    values = {name: report[name].value for name in ("precision", "recall", *AppearanceFeatures.KINDS)}
    return {"fd": report["FD"].value, **values, "accuracy": accuracy, "report": report}


def _in_turn(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images of all classes in turn, as generated ones are drawn; (≤ SHOWN, C, H, W)."""
    classes, index, _ = within_classes(labels, len(labels))
    return images[torch.argsort(index * (int(labels.max()) + 1) + classes)[:SHOWN]]
