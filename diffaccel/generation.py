"""Images from any pixel model: a name, a folder or an opened pipeline.

The random numbers of sample i depend on the seed and on i only; other batch sizes change images by rounding at most.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .core.errors import DataError, UsageError
from .core.images import to_uint8
from .core.rng import KeyedRandom
from .models.teachers import load_pipeline
from .samplers.registry import get_sampler


def generate(
    model,
    num: int,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    sampler_options: Mapping | None = None,
    nfe: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
    batch_size: int = 256,
    classes: list[int] | None = None,
    device: str | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Generate images batch by batch.

    Args:
        model: teacher name, model folder, or an opened ClassConditionalPipeline (its scheduler is left as it was).
        num: number of images.
        steps: sampler steps; default: what the model's folder says (a distilled student says 1).
        sampler: name in `diffaccel list samplers`; default: the model's own scheduler.
        sampler_options: arguments of the sampler's scheduler class, such as {"solver_order": 2}.
        nfe: in place of steps: as many steps as this many network evaluations allow, a guidance pair counted as two.
        seed: image i depends on the seed and on i only.
        guidance_scale: classifier-free guidance, 1 for none (other values double the network evaluations).
        batch_size: images per network call.
        classes: classes to draw in turn; default all.
        device: torch device; default CUDA where there is one, and for an opened pipeline where it is.
        shard: (rank, world): yield only the batches of one process of several, every world-th from the rank-th on.
        progress: show a bar on stderr.

    Yields:
        (images (B, C, H, W) uint8, labels (B,) int64 or None for unconditional models), on the CPU.

    Raises:
        UsageError: num, steps or batch_size below 1, a budget below one step, an unknown sampler or option, classes the
            model does not have.
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
    pipeline = load_pipeline(model) if isinstance(model, (str, Path)) else model
    if not hasattr(pipeline, "num_classes"):
        raise DataError(f"{model} is a {type(pipeline).__name__}; sampling here works with pixel models (UNet2DModel).")
    if classes is not None and pipeline.num_classes is None:
        raise UsageError(f"{model} has no classes.")
    wanted = torch.tensor(classes if classes is not None else range(pipeline.num_classes or 0), dtype=torch.long)
    if bool((wanted < 0).any()) or (pipeline.num_classes and bool((wanted >= pipeline.num_classes).any())):
        raise UsageError(f"classes must be in 0 … {pipeline.num_classes - 1}, got {classes}.")
    if device or isinstance(model, (str, Path)):
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    guided = guidance_scale != 1.0 and pipeline.num_classes is not None
    scheduler = pipeline.scheduler
    if chosen:
        told = {"guidance_scale": guidance_scale} if chosen.told_guidance and guided else {}
        scheduler = chosen.build(scheduler.config, **{**told, **(sampler_options or {})})
    if nfe is not None:
        steps = _affordable_steps(scheduler, nfe, 2 if guided else 1)
    starts = range(0, num, batch_size)[shard[0] :: shard[1]]
    return _batches(pipeline, scheduler, num, starts, steps, seed, guidance_scale, batch_size, wanted, progress)


def _affordable_steps(scheduler, nfe: int, rows_per_call: int) -> int:
    if not hasattr(scheduler, "steps_for"):
        raise UsageError(f"nfe needs one of our samplers, not {type(scheduler).__name__}: name a sampler.")
    least = rows_per_call * scheduler.calls(1)
    if nfe < least:
        raise UsageError(
            f"nfe must be at least {least} with this sampler and guidance, the cost of one step; got {nfe}."
        )
    return scheduler.steps_for(nfe // rows_per_call)


def _batches(pipeline, scheduler, num, starts, steps, seed, guidance_scale, batch_size, wanted, progress):
    random, own = KeyedRandom(seed), pipeline.scheduler
    bar = tqdm(total=num, unit="image", disable=None if progress else True, leave=False)
    pipeline.scheduler = scheduler
    try:
        with bar:
            for start in starts:
                count = min(batch_size, num - start)
                noise = random.normal("sample", 0, start, count, pipeline.sample_shape)
                seeds = random.integers("sampler", 0, start, count, 2**53).tolist()
                labels = wanted[torch.arange(start, start + count) % len(wanted)] if len(wanted) else None
                images = pipeline(
                    class_labels=labels,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(value) for value in seeds],
                    noise=noise,
                    output_type="pt",
                    return_dict=False,
                )[0]
                bar.update(count)
                yield to_uint8(images.float().cpu()), labels
    finally:
        pipeline.scheduler = own
