"""Images from any pixel model or text-to-image pipeline: a name, a folder or an opened pipeline.

The random numbers of sample i depend on the seed and on i only; other batch sizes change images by rounding at most.
"""

import shutil
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .core.errors import UsageError
from .core.images import to_uint8
from .core.rng import KeyedRandom
from .guidance.attach import guidance_of, guide
from .guidance.context import Context
from .guidance.levels import level_of
from .guidance.registry import build_rule
from .guidance.rules import CFG, COND, UNCOND, CFGPlusPlus, Rule
from .models.conditioning import Conditioning, conditioning_of, kind_of
from .models.teachers import load_pipeline
from .samplers.registry import get_sampler

DEFAULT_STEPS = 20  # of models that do not say how many they want


@dataclass(eq=False)
class Drawing(Iterator):
    """Batches of images, drawn as they are asked for.

    Attributes:
        batches: what draws them.
        steps: sampler steps.
        nfe: network evaluations per image, a guidance pair counted as two.
        scale: of the guidance, 1 for none; None for a rule without.
        shape: (C, H, W) of an image.
        prompts: what images 0 … num − 1 show, one each; None for other models than text to image.
    """

    batches: Generator
    steps: int
    nfe: int
    scale: float | None
    shape: tuple[int, int, int]
    prompts: list[str] | None = None

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
    prompts: Sequence[str] | str | None = None,
    negative_prompt: str | None = None,
    device: str | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool | tqdm = False,
) -> Drawing:
    """Generate images batch by batch.

    Args:
        model: teacher name, model folder, or an opened pipeline (its scheduler is left as it was): a
            ClassConditionalPipeline, or one in the layout of StableDiffusionPipeline.
        num: number of images.
        steps: sampler steps; default: what the model's folder says (a distilled student says 1), else 20.
        sampler: name in `diffaccel list samplers`; default: the model's own scheduler.
        sampler_options: arguments of the sampler's scheduler class, such as {"solver_order": 2}.
        nfe: in place of steps: as many steps as this many network evaluations allow, a guidance pair counted as two; of
            rules that act in an interval, what a run costs is counted evaluation by evaluation.
        seed: image i depends on the seed and on i only.
        guidance: a rule such as APG(scale=10), or the name of one in `diffaccel list guidance`; None for classifier-free
            guidance, if ``guidance_scale`` asks for it.
        guidance_scale: of classifier-free guidance, 1 for none (other values double the network evaluations), None for
            what the pipeline's call does by itself: 1 for pixel models, 7.5 for Stable Diffusion; of a rule given by name,
            None for the rule's default.
        guidance_options: of a rule given by name, by rule: {"apg": {"eta": 0.5}, "interval": {"sigma_range": (0.3, 5)}}.
        batch_size: images per network call.
        classes: classes to draw in turn; default all.
        prompts: texts to draw in turn, image i shows prompts[i % len(prompts)]; default: those that an embedded
            text-to-image teacher brings.
        negative_prompt: text that guidance leads away from, for every image.
        device: torch device; default CUDA where there is one, and for an opened pipeline where it is.
        shard: (rank, world): yield only the batches of one process of several, every world-th from the rank-th on.
        progress: show a bar on stderr; or the `progress_bar` to move on.

    Returns:
        An iterator over (images (B, C, H, W) uint8, labels (B,) int64 or None for models without classes), on the CPU,
        that knows what it costs and, of text-to-image models, the prompts of all images.

    Raises:
        UsageError: num, steps or batch_size below 1, a budget below one step, an unknown sampler, rule or option, classes
            or prompts that the model does not take, a text-to-image model without prompts, a rule that it cannot be
            guided by, a pipeline that is guided already.
        DataError, MissingWeightsError: the model cannot be opened, or is of another kind.
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
    if guidance_of(pipeline) is not None:
        raise UsageError("This pipeline is guided already: end that, with disable_guidance(pipe), and pass guidance=.")
    conditioning = conditioning_of(pipeline, classes, prompts, negative_prompt)
    if device or isinstance(model, (str, Path)):
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if rule is None:
        scale = conditioning.scale(guidance_scale)
    else:
        _check_fit(rule, conditioning, by_name=isinstance(guidance, str))
        scale = 2.0 if UNCOND in rule.requires else 1.0  # any that runs the branches it needs: its own is what counts
    acting = rule or CFG(scale)
    if negative_prompt and UNCOND not in acting.requires:
        raise UsageError("negative_prompt has no effect without guidance: give a guidance_scale above 1.")
    scheduler = pipeline.scheduler
    if chosen:
        told = {"guidance_scale": _told_scale(acting)} if chosen.told_guidance else {}
        scheduler = chosen.build(scheduler.config, **{**told, **(sampler_options or {})})
    if nfe is not None:
        steps = _affordable_steps(scheduler, nfe, acting)
    steps = steps or pipeline.config.get("num_inference_steps") or DEFAULT_STEPS
    cost = _cost(scheduler, acting, steps)
    starts = range(0, num, batch_size)[shard[0] :: shard[1]]
    batches = _batches(conditioning, scheduler, num, starts, steps, seed, rule, scale, batch_size, progress, cost)
    shown = conditioning.prompts and list(islice(cycle(conditioning.prompts), num))
    return Drawing(batches, steps, cost, getattr(_inner(acting), "scale", None), conditioning.image_shape, shown)


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


def _check_fit(rule: Rule, conditioning: Conditioning, by_name: bool) -> None:
    """Refuse what the rule needs and the model does not have; networks of a rule given by name go to its device."""
    if getattr(_inner(rule), "particles", 1) > 1:
        raise UsageError(
            f"{rule.title} draws groups of images that depend on each other, and here an image depends on seed and index "
            "only; call the pipeline itself inside diffaccel.guide(pipeline, rule)."
        )
    if UNCOND in rule.requires and not conditioning.guidable:
        raise UsageError("This model has no classes, so there is nothing to guide it by; leave guidance out.")
    for extra in map(rule.extra, sorted(rule.requires - {COND, UNCOND})):
        if extra.network is not None:
            weak, own = map(kind_of, (extra.network, conditioning.network))
            if weak not in (own, None):
                raise UsageError(f"autoguidance needs two models of one kind; the weak one has {weak}, this one {own}.")
            if by_name:
                extra.network.to(conditioning.pipeline.device)
        if extra.arguments is not None:
            conditioning.check_negatives(extra.arguments)


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


def _batches(conditioning, scheduler, num, starts, steps, seed, rule, scale, batch_size, progress, cost):
    pipeline, random = conditioning.pipeline, KeyedRandom(seed)
    own, networks = (
        pipeline.scheduler,
        {conditioning.network} if rule is None else {conditioning.network, *_networks(rule)},
    )
    total = sum(min(batch_size, num - start) for start in starts)
    pipeline.scheduler = scheduler
    try:
        with nullcontext(progress) if isinstance(progress, tqdm) else progress_bar(total, progress) as bar:
            moved = done = 0.0

            def move(share: float) -> None:
                nonlocal moved
                moved += share
                bar.update(share)

            for start in starts:
                count = min(batch_size, num - start)
                noise = random.normal("sample", 0, start, count, conditioning.sample_shape)
                seeds = random.integers("sampler", 0, start, count, 2**53).tolist()
                guided = nullcontext() if rule is None else guide(pipeline, rule)
                with _counted(networks, lambda rows: move(rows / cost)), guided:
                    images = pipeline(
                        **conditioning.arguments(start, noise),
                        num_inference_steps=steps,
                        guidance_scale=scale,
                        generator=[torch.Generator().manual_seed(value) for value in seeds],
                        output_type="pt",
                        return_dict=False,
                    )[0]
                done += count
                move(done - moved)  # where networks evaluate parts of a batch elsewhere
                yield to_uint8(conditioning.signed(images.float().cpu())), conditioning.labels(start, count)
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
