"""How a pipeline runs its two branches, recognised from what it hands to its scheduler.

With guidance that is ±(u + s·(c − u)). From the network's outputs and this result, least squares finds s and how well it
fits. Exchanging u and c turns s into 1 − s and fits equally well, but pipelines run two branches only to go beyond c,
so the larger scale is the right one; where neither exceeds 1, nothing tells.
"""

from dataclasses import dataclass

import torch

from ..core.errors import GuidanceError

LAYOUTS = ("uncond-cond", "cond-uncond", "uncond, cond", "cond, uncond")
"""One call with both branches as a batch ("a-b"), or one call for each ("a, b")."""
NAMES = ", ".join(map(repr, LAYOUTS))

# Of pipelines that tests check. Of others the layout is learned in the first evaluation, which computes both branches
# whether it needs them or not.
KNOWN = {
    "DiTPipeline": "cond-uncond",
    **dict.fromkeys(
        ("ChromaPipeline", "CogView4Pipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxPipeline",
         "HunyuanVideoPipeline", "WanImageToVideoPipeline", "WanPipeline"),
        "cond, uncond",
    ),
    **dict.fromkeys(
        ("AnimateDiffPipeline", "AuraFlowPipeline", "ClassConditionalPipeline", "CogVideoXPipeline", "LTXPipeline",
         "PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "StableDiffusion3Img2ImgPipeline",
         "StableDiffusion3Pipeline", "StableDiffusionControlNetPipeline", "StableDiffusionImg2ImgPipeline",
         "StableDiffusionInpaintPipeline", "StableDiffusionPipeline", "StableDiffusionXLControlNetPipeline",
         "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline",
         "StableVideoDiffusionPipeline"),
        "uncond-cond",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Branches:
    """The branches of one evaluation, in the shape and with the sign in which the scheduler takes predictions.

    Attributes:
        cond: (B, …).
        uncond: (B, …), or None where the pipeline has no such branch or it was not computed.
        layout: one of `LAYOUTS`; None where there is one branch, or both agree and so do not tell.
        copies: how often the pipeline repeats its result along the batch, 2 for DiT.
        sign: −1 where that is the negated output of the network.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None = None
    layout: str | None = None
    copies: int = 1
    sign: int = 1

    def restore(self, guided: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A guided prediction (B, …) in the place, shape and dtype of the pipeline's own result."""
        return repeated(guided, self.copies).to(like.dtype)


def repeated(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """The tensor, copied along the batch."""
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1)) if copies > 1 else tensor


def cond_only(output: torch.Tensor, result: torch.Tensor, trusted: bool = False) -> Branches:
    """The branches of an evaluation in which only c was computed, and handed to the pipeline in place of u too.

    Args:
        output: (B, …) of the network.
        result: (B, …), or (2B, …) from a pipeline that repeats it, that the pipeline hands to the scheduler.
        trusted: take c whatever the pipeline made of it.

    Raises:
        GuidanceError: the pipeline made something else of it than c.
    """
    copies = len(result) // len(output)
    if copies * len(output) != len(result):
        raise GuidanceError(f"The network predicted {len(output)} samples for a step of {len(result)}.")
    cond = shaped(output, result)
    error = {sign: _distance(repeated(sign * cond, copies), result) for sign in (1, -1)}
    sign = min(error, key=error.get)
    if error[sign] > _tolerance(output) and not trusted:
        raise GuidanceError(
            f"This pipeline does not step with the conditional prediction where guidance is 0: {_CAUSES}"
        )
    return Branches(sign * cond, copies=copies, sign=sign)


def recognise(
    outputs: list[torch.Tensor],
    result: torch.Tensor,
    expected: str | None = None,
    trusted: bool = False,
    per_frame: bool = False,
) -> Branches:
    """Find the branches of an evaluation in which everything was computed.

    Args:
        outputs: of the network's calls for this step, in order.
        result: (B, …) what the pipeline hands to the scheduler.
        expected: the layout as known or learned before; None if unknown.
        trusted: the user vouches for ``expected``: take it whatever the pipeline makes of its branches.
        per_frame: whether the pipeline may use a scale for every frame, axis 1.

    Raises:
        GuidanceError: no layout explains the result, or another one than expected.
    """
    copies, rows, counts = 1, len(result), [len(output) for output in outputs]
    if counts == [rows, rows]:
        separator, halves = ", ", outputs
    elif counts == [2 * rows]:
        separator, halves = "-", outputs[0].chunk(2)
    elif counts == [rows]:
        halves = outputs[0].chunk(2)
        twice = rows % 2 == 0 and torch.equal(*result.chunk(2)) and not torch.equal(*halves)
        if not twice:
            return cond_only(outputs[0], result, trusted)
        copies, result, separator = 2, result.chunk(2)[0], "-"
    else:
        raise GuidanceError(
            f"The network predicted {' and '.join(map(str, counts))} samples for a step of {rows}; only one or two branches "
            "can be guided."
        )
    if expected is not None and (", " in expected) != (separator == ", "):
        ways = {"-": "in one call", ", ": "in a call each"}
        raise GuidanceError(f"This pipeline runs its branches {ways[separator]}; that is not the layout {expected!r}.")
    first, second = (shaped(half, result) for half in halves)
    fit = _fit(first, second, result, per_frame)
    if fit.residual > _tolerance(outputs[0]):
        layout = expected
        if not trusted:
            raise GuidanceError(
                f"What this pipeline makes of its two branches is not classifier-free guidance (it is {fit.residual:.1%} off): "
                f"{_CAUSES}"
            )
    else:
        layout = _named(fit, separator, expected)
    cond, uncond = (first, second) if (layout or "").startswith("cond") else (second, first)
    return Branches(fit.sign * cond, fit.sign * uncond, layout, copies, fit.sign)


@dataclass(frozen=True)
class _Fit:
    """sign·result ≈ first + scale·(second − first): relative residual and standard error of the scale.

    The scale is None where the branches are equal.
    """

    scale: float | None
    sign: int
    residual: float
    error: float


def _named(fit: _Fit, separator: str, expected: str | None) -> str | None:
    """The layout that a good fit tells, or the expected one where it does not tell; None where none is needed."""
    if fit.scale is None:  # the branches agree: any rule gives the same with them exchanged
        return expected
    margin = 10 * fit.error
    # From 0 to 1 the result lies between the branches, and could be either way round.
    if -margin - 0.01 < fit.scale < 1.01 + margin:
        if expected is None:
            raise GuidanceError(
                f"This pipeline mixes its branches {1 - fit.scale:.2g} : {fit.scale:.2g} (± {fit.error:.1g}), which does not tell "
                f"which is which: call it with a guidance scale well above 1, or pass layout=, one of {NAMES}."
            )
        return expected
    layout = separator.join(("uncond", "cond") if fit.scale > 0.5 else ("cond", "uncond"))
    if expected is not None and layout != expected:
        raise GuidanceError(f"This pipeline has the layout {layout!r}, not {expected!r}.")
    return layout


def _fit(first: torch.Tensor, second: torch.Tensor, result: torch.Tensor, per_frame: bool) -> _Fit:
    """Least squares over everything, or also with a scale per frame (axis 1), the scale being its mean then."""
    wide = torch.float32 if result.device.type in ("mps", "npu") else torch.float64
    first, second, result = (tensor.to(wide) for tensor in (first, second, result))
    difference, length = second - first, result.norm().clamp_min(1e-30)
    best = None
    for axis in [None, 1] if per_frame else [None]:
        axes = tuple(i for i in range(result.ndim) if i != axis)
        square = (difference * difference).sum(axes, keepdim=True)
        for sign in (1, -1):
            target = sign * result - first
            scale = (target * difference).sum(axes, keepdim=True) / square.clamp_min(1e-30)
            left = (target - scale * difference).norm()
            if best is None or left < 0.5 * best[0]:  # the simpler explanation unless another one is clearly better
                error = left / (square.sum() * difference.numel()).sqrt().clamp_min(1e-30)
                best = left, scale.mean(), torch.full_like(left, sign), error, square.sum()
    left, scale, sign, error, square, length = torch.stack([*best, length]).tolist()  # one wait for the device
    return _Fit(scale if square > 0 else None, int(sign), left / length, error)


def agree(output: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether two predictions (B, …) are equal but for the order of sums."""
    return output.shape == reference.shape and _distance(output, reference) <= _tolerance(reference)


def shaped(output: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """A network's output (rows, …) without what follows on axis 1, in the shape (rows, …) of the scheduler's argument.

    Predicted variances and tokens of reference images follow there.

    Raises:
        GuidanceError: shapes that differ in more than that and axes of length 1.
    """
    if output.ndim == result.ndim and output.shape[1] > result.shape[1]:
        output = output[:, : result.shape[1]]
    if [n for n in output.shape[1:] if n > 1] != [n for n in result.shape[1:] if n > 1]:
        raise GuidanceError(
            f"The network predicts {tuple(output.shape)} where the step takes {tuple(result.shape)}; what this pipeline does "
            "in between is not known."
        )
    return output.reshape(len(output), *result.shape[1:])


def _distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.float(), reference.float()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def _tolerance(output: torch.Tensor) -> float:
    return 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2


_CAUSES = (
    "guidance_rescale, a norm per token or another kind of guidance may be active. Switch it off, or pass layout= (one of "
    f"{NAMES}) to replace what the pipeline computes."
)
