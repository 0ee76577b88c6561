"""Inputs for trying backends: tensors of a signature, scaled and laid out as a model has them."""

import torch

from .collect import Use
from .signature import Signature

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def make_inputs(use: Use, logits: float | None = None, keys: int | None = None) -> Inputs:
    """Random queries, keys, values and a mask that lets through about three of four keys, and of every row the first.

    Args:
        use: the signature, the scales, the layout and the device; the numbers do not depend on the device.
        logits: scale queries such that logits have this standard deviation; None for the model's own scale.
        keys: another number of keys.
    """
    signature = use.signature
    keys = signature.keys if keys is None else keys
    generator = torch.Generator().manual_seed(signature.seed)
    widths = (signature.head_dim, signature.head_dim, signature.value_dim)
    scales = [max(rms, 1e-3) for rms in use.rms]
    if logits is not None:
        scale = signature.head_dim**-0.5 if signature.scale is None else signature.scale
        scales[0] = logits / (abs(scale) * scales[1] * signature.head_dim**0.5 or 1.0)
    tensors = []
    for tokens, width, factor in zip((signature.queries, keys, keys), widths, scales, strict=True):
        shape = (signature.batch, signature.heads, tokens, width)
        if use.tokens_first:
            tensor = torch.randn(shape[0], tokens, shape[1], width, generator=generator).transpose(1, 2)
        else:
            tensor = torch.randn(shape, generator=generator)
        tensors.append((tensor * factor).to(use.device, signature.dtype))
    return (*tensors, _mask(signature, keys, generator, use.device))


def mask_rows(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask with nothing let through in the first entry of its batch; None without a mask."""
    if mask is None:
        return None
    mask = mask.clone()
    first = mask[:1] if mask.dim() > 2 else mask
    first.fill_(False if mask.dtype == torch.bool else -10000.0)
    return mask


def _mask(signature: Signature, keys: int, generator: torch.Generator, device: torch.device):
    if signature.mask is None:
        return None
    shape = (*signature.mask_shape[:-1], 1 if signature.mask_shape[-1] == 1 else keys)
    open_ = torch.rand(shape, generator=generator) < 0.75
    open_[..., 0] = True
    if signature.mask == torch.bool:
        return open_.to(device)
    return torch.zeros(shape).masked_fill(~open_, -10000.0).to(device, signature.mask)  # what diffusers adds
