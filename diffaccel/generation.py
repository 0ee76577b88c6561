"""Images from any pixel model: a name, a folder or an opened pipeline.

The random numbers of sample i depend on the seed and on i only; other batch sizes change images by rounding at most.
"""

import shutil
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .core.errors import DataError, UsageError
from .core.images import to_uint8
from .core.rng import KeyedRandom
from .guidance.attach import guidance_of, guide
from .guidance.context import Context
from .guidance.levels import level_of
from .guidance.registry import build_rule
from .guidance.rules import CFG, COND, UNCOND, CFGPlusPlus, Rule
from .models.teachers import load_pipeline
from .models.pixel import num_classes, sample_shape
from .samplers.registry import get_sampler


@dataclass(eq=False)
class Drawing(Iterator):
    """Batches of images, drawn as they are asked for.

    Attributes:
        batches: what draws them.
        steps: sampler steps.
        nfe: network evaluations per image, a guidance pair counted as two.
        scale: of the guidance, 1 for none; None for a rule without.
    """

    batches: Generator
    steps: int
    nfe: int
    scale: float | None

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return next(self.batches)

    def close(self) -> None:
        """Draw no more."""
        self.batches.close()


def generate(
    model,
    num: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    sampler_options: Mapping | None = None,
    nfe: int | None = None,
    seed: int = 0,
    guidance: Rule | str | None = None,
    guidance_scale: float | None = None,
    guidance_options: Mapping[str, Mapping] | None = None,
    batch_size: int = 256,
    classes: list[int] | None = None,
    device: str | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool | tqdm = False,
) -> Drawing:
    """Generate images batch by batch.

    Args:
        model: teacher name, model folder, or an opened ClassConditionalPipeline (its scheduler is left as it was).
        num: number of images.
        steps: sampler steps; default: what the model's folder says (a distilled student says 1).
        sampler: name in `diffaccel list samplers`; default: the model's own scheduler.
        sampler_options: arguments of the sampler's scheduler class, such as {"solver_order": 2}.
        nfe: in place of steps: as many steps as this many network evaluations allow, a guidance pair counted as two; of
            rules that act in an interval, what a run costs is counted evaluation by evaluation.
        seed: image i depends on the seed and on i only.
        guidance: a rule such as APG(scale=10), or the name of one in `diffaccel list guidance`; None for classifier-free
            guidance, if ``guidance_scale`` asks for it.
        guidance_scale: of classifier-free guidance, 1 or None for none (other values double the network evaluations); of
            a rule given by name, None for the rule's default.
        guidance_options: of a rule given by name, by rule: {"apg": {"eta": 0.5}, "interval": {"sigma_range": (0.3, 5)}}.
        batch_size: images per network call.
        classes: classes to draw in turn; default all.
        device: torch device; default CUDA where there is one, and for an opened pipeline where it is.
        shard: (rank, world): yield only the batches of one process of several, every world-th from the rank-th on.
        progress: show a bar on stderr; or the `progress_bar` to move on.

    Returns:
        An iterator over (images (B, C, H, W) uint8, labels (B,) int64 or None for unconditional models), on the CPU, that
        knows what it costs.

    Raises:
        UsageError: num, steps or batch_size below 1, a budget below one step, an unknown sampler, rule or option, classes
            the model does not have, a rule that it cannot be guided by, a pipeline that is guided already.
        DataError, MissingWeightsError: the model cannot be opened.
    """
    for name, value in (("num", num), ("steps", 1 if steps is None else steps), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")
    if steps is not None and nfe is not None:
        raise UsageError("Pass either steps or nfe, not both.")
    chosen = get_sampler(sampler) if sampler else None
    if sampler_options and chosen is None:
        raise UsageError("sampler_options belong to a sampler; name one of `diffaccel list samplers`.")
    rule = _rule(guidance, guidance_scale, guidance_options)
    pipeline = load_pipeline(model) if isinstance(model, (str, Path)) else model
    if not hasattr(pipeline, "num_classes"):
        raise DataError(f"{model} is a {type(pipeline).__name__}; sampling here works with pixel models (UNet2DModel).")
    if guidance_of(pipeline) is not None:
        raise UsageError("This pipeline is guided already: end that, with disable_guidance(pipe), and pass guidance=.")
    if classes is not None and pipeline.num_classes is None:
        raise UsageError(f"{model} has no classes.")
    wanted = torch.tensor(classes if classes is not None else range(pipeline.num_classes or 0), dtype=torch.long)
    if bool((wanted < 0).any()) or (pipeline.num_classes and bool((wanted >= pipeline.num_classes).any())):
        raise UsageError(f"classes must be in 0 … {pipeline.num_classes - 1}, got {classes}.")
    if device or isinstance(model, (str, Path)):
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if rule is None:
        scale = 1.0 if guidance_scale is None or pipeline.num_classes is None else guidance_scale
    else:
        _check_fit(rule, pipeline, by_name=isinstance(guidance, str))
        scale = 2.0 if UNCOND in rule.requires else 1.0  # any that runs the branches it needs: its own is what counts
    acting = rule or CFG(scale)
    scheduler = pipeline.scheduler
    if chosen:
        told = {"guidance_scale": _told_scale(acting)} if chosen.told_guidance else {}
        scheduler = chosen.build(scheduler.config, **{**told, **(sampler_options or {})})
    if nfe is not None:
        steps = _affordable_steps(scheduler, nfe, acting)
    steps = steps or pipeline.config.num_inference_steps
    cost = _cost(scheduler, acting, steps)
    starts = range(0, num, batch_size)[shard[0] :: shard[1]]
    batches = _batches(pipeline, scheduler, num, starts, steps, seed, rule, scale, batch_size, wanted, progress, cost)
    return Drawing(batches, steps, cost, getattr(_inner(acting), "scale", None))


def progress_bar(total: int, shown: bool) -> tqdm:
    """A bar over images on stderr, on a terminal; shares of an image move it too."""
    shape = "{l_bar}{bar}| {n:.0f}/{total} image [{elapsed}<{remaining}, {rate_fmt}]"
    columns, rows = shutil.get_terminal_size()  # where a terminal says 0 by 0, tqdm would show nothing
    size, off = {"ncols": columns, "nrows": rows}, None if shown else True
    return tqdm(total=total, unit=" image", bar_format=shape, **size, miniters=0, disable=off, leave=False)


def _rule(guidance, scale: float | None, options: Mapping | None) -> Rule | None:
    """The rule that was asked for, None for the pipeline's own guidance."""
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f'guidance_options go by rule, such as {{"apg": {{"eta": 0.5}}}}; got {options!r}.')
    if isinstance(guidance, str):
        return build_rule(guidance, scale, options)
    if options:
        names = ", ".join(map(str, options))
        raise UsageError(f"guidance_options of {names} need the name of a rule: pass guidance=, such as 'apg'.")
    if guidance is None:
        return None
    if not isinstance(guidance, Rule):
        raise UsageError(f"guidance is a rule, such as diffaccel.APG(scale=10), or the name of one; got {guidance!r}.")
    if scale is not None:
        raise UsageError(f"Give the scale to the rule, {guidance.title}(scale={scale:g}), not beside it.")
    return guidance


def _check_fit(rule: Rule, pipeline, by_name: bool) -> None:
    """Refuse what the rule needs and the model does not have; networks of a rule given by name go to its device."""
    classes = pipeline.num_classes
    if getattr(_inner(rule), "particles", 1) > 1:
        raise UsageError(
            f"{rule.title} draws groups of images that depend on each other, and here an image depends on seed and index "
            "only; call the pipeline itself inside diffaccel.guide(pipeline, rule)."
        )
    if UNCOND in rule.requires and classes is None:
        raise UsageError("This model has no classes, so there is nothing to guide it by; leave guidance out.")
    for extra in map(rule.extra, sorted(rule.requires - {COND, UNCOND})):
        if extra.network is not None:
            weak, own = map(_kind, (extra.network, pipeline.network))
            if weak not in (own, None):
                raise UsageError(
                    "autoguidance needs two models of one kind; the weak one has the shape {} and {} classes, this one {} "
                    "and {}.".format(*weak, *own)
                )
            if by_name:
                extra.network.to(pipeline.device)
        if extra.arguments is not None:
            negatives = torch.as_tensor(extra.arguments.get("class_labels", -1))
            if bool((negatives < 0).any()) or bool((negatives >= classes).any()):
                raise UsageError(
                    f"Negatives of this model are classes in 0 … {classes - 1}, such as perp-neg.negatives=3; got "
                    f"{dict(extra.arguments)}."
                )


def _kind(network) -> tuple | None:
    """What two networks must share; None for one that is no diffusers model and keeps that to itself."""
    try:
        return sample_shape(network), num_classes(network)
    except AttributeError:
        return None


def _inner(rule: Rule) -> Rule:
    """The rule inside its wrappers."""
    return _inner(rule.rule) if hasattr(rule, "rule") else rule


def _told_scale(rule: Rule) -> float | None:
    """The scale of a rule where it means what that of classifier-free guidance does."""
    rule = _inner(rule)
    return None if isinstance(rule, CFGPlusPlus) else getattr(rule, "scale", None)


def _affordable_steps(scheduler, nfe: int, rule: Rule) -> int:
    """The number of steps whose evaluations stay within a budget, while those of one step more do not."""
    if not hasattr(scheduler, "steps_for"):
        raise UsageError(f"nfe needs one of our samplers, not {type(scheduler).__name__}: name a sampler.")

    cost = partial(_cost, scheduler, rule)
    if nfe < cost(1):
        raise UsageError(
            f"nfe must be at least {cost(1)} with this sampler and guidance, the cost of one step; got {nfe}."
        )
    return bisect_right(range(1, scheduler.steps_for(nfe) + 1), nfe, key=cost)


def _cost(scheduler, rule: Rule, steps: int) -> int:
    """Network evaluations per image of a run, a guidance pair counted as two."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    levels = [partial(level_of, scheduler, time) for time in times]
    return sum(len(rule.branches(Context(step, len(times), level))) for step, level in enumerate(levels))


def _batches(pipeline, scheduler, num, starts, steps, seed, rule, scale, batch_size, wanted, progress, cost):
    random, own = KeyedRandom(seed), pipeline.scheduler
    networks = {pipeline.network} if rule is None else {pipeline.network, *_networks(rule)}
    total = sum(min(batch_size, num - start) for start in starts)
    pipeline.scheduler = scheduler
    try:
        with nullcontext(progress) if isinstance(progress, tqdm) else progress_bar(total, progress) as bar:
            for start in starts:
                count = min(batch_size, num - start)
                noise = random.normal("sample", 0, start, count, pipeline.sample_shape)
                seeds = random.integers("sampler", 0, start, count, 2**53).tolist()
                labels = wanted[torch.arange(start, start + count) % len(wanted)] if len(wanted) else None
                guided = nullcontext() if rule is None else guide(pipeline, rule)
                with _counted(networks, lambda rows: bar.update(rows / cost)), guided:
                    images = pipeline(
                        class_labels=None if labels is None else labels.tolist(),  # a list: negatives are one for each
                        num_inference_steps=steps,
                        guidance_scale=scale,
                        generator=[torch.Generator().manual_seed(value) for value in seeds],
                        noise=noise,
                        output_type="pt",
                        return_dict=False,
                    )[0]
                yield to_uint8(images.float().cpu()), labels
    finally:
        pipeline.scheduler = own


def _networks(rule: Rule) -> list:
    """Networks besides the pipeline's own that a rule evaluates."""
    extras = map(rule.extra, rule.requires - {COND, UNCOND})
    return [extra.network for extra in extras if extra.network is not None]


@contextmanager
def _counted(networks, tell):
    """Tell how many samples every call of the networks evaluates, so that a bar moves within a batch."""

    def hook(network, args, output):
        tell(len(args[0]))  # returns nothing: what a hook returns takes the place of the output

    with ExitStack() as hooks:
        for network in networks:
            hooks.callback(network.register_forward_hook(hook).remove)
        yield
