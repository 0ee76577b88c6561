"""What guidance rules do as their scale grows: one model, the same noise and conditioning everywhere, one reference."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.errors import DataError, UsageError, unknown
from ..generation import generate, progress_bar
from ..guidance.base import Rule, Wrapper
from ..guidance.registry import RULES, build_rule
from ..guidance.rules import CFG
from ..models.conditioning import conditioning_of
from ..models.data import load_labelled
from ..models.prompts import own_prompts
from ..models.teachers import load_pipeline, resolve_teacher
from .classes import caption_accuracy, class_accuracy
from .features.appearance import AppearanceFeatures
from .groups import within_classes
from .plan import entering_size
from .run import evaluate_images
from .sources import DATASETS, ImageSource, StatisticsSource, resolve

UNGUIDED, SHOWN = "unguided", 20


def _emoji_accuracy(images: torch.Tensor, prompts: list[str]) -> float:
    return caption_accuracy(images, prompts, own_prompts("tiny-sd"))


ACCURACY: dict[tuple[str, str], Callable[[torch.Tensor, torch.Tensor | list[str]], float]] = {
    ("digits", "classes"): class_accuracy,
    ("mnist", "classes"): class_accuracy,
    ("emoji", "prompts"): _emoji_accuracy,
}
"""By data set and kind of model: the share of images, uint8 (N, C, H, W), that show their classes (N,) or N prompts."""
MEASURES = ("fd", "precision", "recall", "overshoot", *AppearanceFeatures.KINDS, "accuracy")


@dataclass
class Row:
    """A rule at one scale.

    Attributes:
        rule: as it was typed, or `UNGUIDED`.
        scale: guidance scale; 1 for the unguided model.
        nfe: network evaluations per image, a guidance pair counted as two.
        runs: by seed, the values of `MEASURES`, and "report", the `report.Report` that most of them come from.
            Accuracy is None without a classifier, precision and recall where the reference holds no vectors. Overshoot
            is the mean over values of max(|x| − 1, 0), of samples before they are clipped to [−1, 1]; 0 where the
            scheduler clips its predictions, None where a decoder makes the values.
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
        rows: the unguided model, then every rule at every scale, all from the same noise, classes and prompts.
        real: saturation, contrast and clipped values of the reference; empty where that is statistics.
        real_samples: some of its images, uint8 (C, H, W); none where it is statistics.
        conditioning: what is the same everywhere besides the noise, "classes" or "prompts".
    """

    settings: dict
    rows: list[Row]
    real: dict[str, float] = field(default_factory=dict)
    real_samples: Sequence[torch.Tensor] = field(default=(), repr=False)
    conditioning: str = "classes"

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
    prompts: Sequence[str] | None = None,
    batch_size: int = 256,
    device: str | None = None,
    progress: bool = False,
) -> Sweep:
    """Measure a model with classes, or a text-to-image model, under several guidance rules at several scales.

    Sample i starts from the same noise and shows the same class or prompt under every rule; these are drawn in turn.

    Args:
        model: teacher name or model folder.
        rules: see `named_rule`.
        scales: guidance scales, for every rule.
        seeds: of the samples, ``num`` for each.
        num: images per rule, scale and seed; plug-in distances compare at equal ``num`` only.
        steps, sampler: default: the model's own.
        options: of the rules, such as {"apg": {"eta": 0.5}}.
        reference: real images or their statistics, see `sources.resolve`; default: those of a named teacher.
        features: of FD, precision and recall, see `settings.Settings`.
        prompts: of a text-to-image model; default: its own.
        batch_size: images per network call.
        device: torch device; default CUDA where there is one.
        progress: draw a bar on stderr, on a terminal.

    Raises:
        UsageError: no rules, scales or seeds, unknown rules or options, a model without classes or prompts, no
            reference.
        DataError, MissingWeightsError, NumericalError: see `generation.generate` and `run.evaluate_images`.
    """
    for name, values in (("rules", rules), ("scales", scales), ("seeds", seeds)):
        if not values:
            raise UsageError(f"Comparing guidance needs at least one of {name}; got none.")
    rules, scales, seeds = (list(dict.fromkeys(values)) for values in (rules, scales, seeds))
    _check_used(options or {}, rules)
    pairs = [(rule, scale) for rule in rules for scale in scales]
    jobs = [(Row(UNGUIDED, 1.0), CFG(1.0)), *((Row(*pair), named_rule(*pair, options)) for pair in pairs)]
    pipeline = load_pipeline(model)
    conditioning = conditioning_of(pipeline, prompts=prompts)
    if not conditioning.guidable:
        raise UsageError(
            f"{model} has no classes to be guided by; give a model with classes or prompts, such as digits."
        )
    reference = reference or _own_data(model)
    target = _Target(reference, resolve(reference), features)  # now, so that it is refused before anything is drawn
    target.check_size(model, conditioning.image_shape[1:])
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with progress_bar(len(jobs) * len(seeds) * num, progress) as bar:
        for row, rule in jobs:
            watched = _Watched(rule)
            for seed in seeds:
                bar.set_description(f"{row.rule} at {row.scale:g}, seed {seed}")
                batches = generate(
                    pipeline, num, steps=steps, sampler=sampler, seed=seed, guidance=watched, prompts=conditioning.prompts,
                    batch_size=batch_size, progress=bar,
                )  # fmt: skip
                drawn = [(images, labels, watched.overshoot()) for images, labels in batches]
                images, labels, overshoot = (
                    None if parts[0] is None else torch.cat(parts) for parts in zip(*drawn, strict=True)
                )
                row.runs[seed] = target.measure(images, labels, batches.prompts)
                row.runs[seed]["overshoot"] = None if conditioning.latent else float(overshoot.mean())
                row.samples = images[:SHOWN] if row.samples is None else row.samples
                row.nfe = batches.nfe
    report = row.runs[seed]["report"]
    written = json.loads(json.dumps(options or {}), parse_constant=str)  # JSON has no infinity
    settings = {"model": str(model), "rules": rules, "scales": scales, "seeds": seeds, "num": num, "steps": steps,
                "sampler": sampler, "options": written, "reference": reference, "features": features}  # fmt: skip
    settings |= {} if prompts is None else {"prompts": list(prompts)}
    names = {kind: f"{kind} of real images" for kind in AppearanceFeatures.KINDS}
    real = {kind: report[name].value for kind, name in names.items()} if target.has_images else {}
    shown = "classes" if conditioning.prompts is None else "prompts"
    return Sweep(settings, [row for row, _ in jobs], real, target.samples(report), shown)


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


def _own_data(model: str) -> str:
    _, info = resolve_teacher(model)
    if info is None or not info.data:
        raise UsageError(f"What real images of {model} look like is not known: give a reference, such as their folder.")
    return info.data


@dataclass
class _Target:
    """What the images of a sweep are compared with.

    Attributes:
        name: as it was typed.
        source: what it is.
        features: see `settings.Settings`.
    """

    name: str
    source: ImageSource | StatisticsSource
    features: str

    def check_size(self, model: str, size: tuple[int, int]) -> None:
        """Refuse images of another size than the model's, where that is known to matter.

        Raises:
            DataError: with both sizes.
        """
        other = entering_size(self.source)
        if self.features == "auto" and other not in (None, tuple(size)):
            ours, theirs = ("×".join(map(str, one)) for one in (size, other))
            raise DataError(f"{model} draws {ours} images (height×width) and {self.name} has {theirs}; give others.")

    @property
    def has_images(self) -> bool:
        return isinstance(self.source, ImageSource)

    @property
    def dataset(self) -> str | None:
        """Name of the data set, whether its images or its statistics are here; None for anything else."""
        name = self.name.partition(":")[0]
        return name if name in DATASETS and not Path(self.name).exists() else None

    def measure(self, images: torch.Tensor, labels: torch.Tensor | None, prompts: list[str] | None) -> dict:
        """Values of one run, uint8 images (N, C, H, W) with their classes (N,) or N prompts; all but overshoot."""
        wanted = ("fid", "prdc", "appearance") if self._has_vectors else ("fid", "appearance")
        report = evaluate_images((images, labels), self.name, wanted, self.features)
        found = {result.kind: result.value for result in report.results}
        values = {name: found.get(name) for name in ("precision", "recall", *AppearanceFeatures.KINDS)}
        conditioning, shown = ("classes", labels) if prompts is None else ("prompts", prompts)
        recognise = ACCURACY.get((self.dataset, conditioning))
        accuracy = recognise(images, shown) if recognise else None
        return {"fd": report["FD"].value, **values, "accuracy": accuracy, "report": report}

    @property
    def _has_vectors(self) -> bool:
        return self.has_images or self.source.statistics.vectors is not None

    def samples(self, report) -> Sequence[torch.Tensor]:
        """Some images (≤ SHOWN) uint8 (C, H, W), as far as there are any."""
        if not self.has_images:
            return ()
        if self.source.kind == "dataset" and self.source.labels is not None:
            return _in_turn(*load_labelled(self.dataset, self.name.partition(":")[2] or "train"))
        channels = self.source.shape[0]
        return [image[:channels] for image in report.samples["real"][:SHOWN]]


def _in_turn(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images of all classes in turn, as generated ones are drawn; (≤ SHOWN, C, H, W)."""
    classes, index, _ = within_classes(labels, len(labels))
    return images[torch.argsort(index * (int(labels.max()) + 1) + classes)[:SHOWN]]
