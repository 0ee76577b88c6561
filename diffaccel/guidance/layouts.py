"""How a pipeline runs its two branches, recognised from what it hands to its scheduler.

With guidance that is ±(u + s·(c − u)). From the network's outputs and this result, least squares finds s and how well it
fits. Exchanging u and c turns s into 1 − s and fits equally well, but pipelines run two branches only to go beyond c,
so the larger scale is the right one.
"""

from dataclasses import dataclass

import torch

from ..core.errors import GuidanceError

LAYOUTS = ("uncond-cond", "cond-uncond", "uncond, cond", "cond, uncond")
"""One call with both branches as a batch ("a-b"), or one call for each ("a, b")."""

# Of pipelines that tests check. Of others the layout is learned in the first evaluation, which computes both branches
# whether it needs them or not.
KNOWN = {
    "DiTPipeline": "cond-uncond",
    **dict.fromkeys(("FluxPipeline", "FluxImg2ImgPipeline", "WanPipeline"), "cond, uncond"),
    **dict.fromkeys(
        ("AnimateDiffPipeline", "ClassConditionalPipeline", "CogVideoXPipeline", "LTXPipeline", "PixArtSigmaPipeline",
         "StableDiffusion3Img2ImgPipeline", "StableDiffusion3Pipeline", "StableDiffusionImg2ImgPipeline",
         "StableDiffusionInpaintPipeline", "StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline",
         "StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline", "StableVideoDiffusionPipeline"),
        "uncond-cond",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Branches:
    """The branches of one evaluation, shaped as the scheduler takes them.

    Attributes:
        cond: (B, …).
        uncond: (B, …), or None where the pipeline has no such branch or it was not computed.
        layout: one of `LAYOUTS`; None where there is one branch, or both agree and so do not tell.
        copies: how often the pipeline repeats its result along the batch, 2 for DiT.
        sign: −1 where the pipeline negates the network's output.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None = None
    layout: str | None = None
    copies: int = 1
    sign: int = 1

    def restore(self, guided: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A guided prediction (B, …) in the place, shape and dtype of the pipeline's own result."""
        return repeated(self.sign * guided, self.copies).to(like.dtype)


def repeated(tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """The tensor, copied along the batch."""
    return tensor.repeat(copies, *[1] * (tensor.ndim - 1)) if copies > 1 else tensor


def cond_only(output: torch.Tensor, result: torch.Tensor) -> Branches:
    """The branches of an evaluation in which only c was computed, and handed to the pipeline in place of u too.

    Raises:
        GuidanceError: the pipeline made something else of it than c.
    """
    copies = len(result) // len(output)
    cond = shaped(output, result[: len(output)])
    for sign in (1, -1):
        if copies * len(output) == len(result) and _distance(repeated(sign * cond, copies), result) < _tolerance(
            output
        ):
            return Branches(cond, copies=copies, sign=sign)
    raise GuidanceError(f"This pipeline does not step with the conditional prediction where guidance is 0: {_CAUSES}")


def recognise(outputs: list[torch.Tensor], result: torch.Tensor, expected: str | None, trusted: bool) -> Branches:
    """Find the branches of an evaluation in which everything was computed.

    Args:
        outputs: of the network's calls for this step, in order.
        result: (B, …) what the pipeline hands to the scheduler.
        expected: the layout as known or learned before; None if unknown.
        trusted: the user vouches for ``expected``: take it whatever the pipeline makes of its branches.

    Raises:
        GuidanceError: no layout explains the result, or another one than expected.
    """
    copies, rows = 1, len(result)
    if len(outputs) == 2:
        separator, halves = ", ", outputs
    elif len(outputs[0]) == 2 * rows:
        separator, halves = "-", outputs[0].chunk(2)
    elif len(outputs[0]) == rows:
        cond = shaped(outputs[0], result)
        twice = rows % 2 == 0 and torch.equal(*result.chunk(2)) and not torch.equal(*cond.chunk(2))
        if not twice:
            return cond_only(outputs[0], result)
        copies, result, separator, halves = 2, result.chunk(2)[0], "-", outputs[0].chunk(2)
    else:
        raise GuidanceError(
            f"The network predicted {len(outputs[0])} samples for a step of {rows}; only one or two branches can be guided."
        )
    if expected is not None and (", " in expected) != (separator == ", "):
        ways = {"-": "in one call", ", ": "in a call each"}
        raise GuidanceError(f"This pipeline runs its branches {ways[separator]}; that is not the layout {expected!r}.")
    first, second = (shaped(half, result) for half in halves)
    scale, sign, residual, error = _fit(first, second, result)
    if trusted:
        layout = expected
    elif residual > _tolerance(outputs[0]):
        raise GuidanceError(
            f"What this pipeline makes of its two branches is not classifier-free guidance (it is {residual:.1%} off): {_CAUSES}"
        )
    elif scale is None or abs(scale - 0.5) <= 10 * error:
        layout = expected
        if layout is None and scale is not None:
            raise GuidanceError(
                f"The two branches are too alike to tell which is which: pass layout=, one of {_NAMES}."
            )
    else:
        layout = separator.join(("uncond", "cond") if scale > 0.5 else ("cond", "uncond"))
        if 0.01 < scale < 0.99:
            raise GuidanceError(
                f"This pipeline mixes its branches {1 - scale:.2g} : {scale:.2g}, which does not tell which is which: call it "
                f"with a guidance scale above 1, or pass layout=, one of {_NAMES}."
            )
    if expected is not None and layout != expected:
        raise GuidanceError(f"This pipeline has the layout {layout!r}, not {expected!r}.")
    cond, uncond = (first, second) if (layout or "").startswith("cond") else (second, first)
    return Branches(cond, uncond, layout, copies, sign)


def _fit(first: torch.Tensor, second: torch.Tensor, result: torch.Tensor):
    """(s, sign, relative residual, standard error of s) of sign·result ≈ first + s·(second − first).

    s is None where the branches are equal; it may differ between frames (axis 1 of videos), then this is its mean.
    """
    first, second, result = (tensor.double() for tensor in (first, second, result))
    difference, length = second - first, result.norm().clamp_min(1e-30)
    best = None
    frames = [None] if result.ndim < 5 else [None, 1]
    for axis in frames:
        axes = tuple(i for i in range(result.ndim) if i != axis)
        square = (difference * difference).sum(axes, keepdim=True)
        for sign in (1, -1):
            target = sign * result - first
            scale = (target * difference).sum(axes, keepdim=True) / square.clamp_min(1e-300)
            left = (target - scale * difference).norm()
            if best is None or left < 0.5 * best[0]:  # the simpler explanation unless another one is clearly better
                error = left / (square.sum() * difference.numel()).sqrt().clamp_min(1e-300)
                best = left, scale.mean(), sign, error, square.sum()
    left, scale, sign, error, square = (float(value) for value in best)
    return (scale if square > 0 else None), int(sign), left / float(length), error


def shaped(output: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """A network's output (rows, …) without its predicted variance, in the shape (rows, …) of the scheduler's argument.

    Raises:
        GuidanceError: shapes of different sizes.
    """
    if output.ndim == result.ndim and output.shape[1] == 2 * result.shape[1]:
        output = output[:, : result.shape[1]]
    if output.shape[1:] == result.shape[1:]:
        return output
    if output[0].numel() != result[0].numel():
        raise GuidanceError(
            f"The network predicts {tuple(output.shape)} where the step takes {tuple(result.shape)}; what this pipeline does "
            "in between is not known."
        )
    return output.reshape(len(output), *result.shape[1:])


def _distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    return float((value.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def _tolerance(output: torch.Tensor) -> float:
    return 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2


_NAMES = ", ".join(map(repr, LAYOUTS))
_CAUSES = (
    "guidance_rescale, a norm per token or another kind of guidance may be active. Switch it off, or pass layout= (one of "
    f"{_NAMES}) to replace what the pipeline computes."
)
