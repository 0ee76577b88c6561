"""What attention is called with, as far as backends and their speed depend on it."""

import hashlib
from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """One kind of call of scaled dot-product attention.

    A tuple, so that routed attention finds its backend by one look-up, in compiled graphs too.

    Attributes:
        batch, heads, queries, keys, head_dim, value_dim: sizes; queries and keys are numbers of tokens.
        dtype: of queries, keys and values.
        device: type of device, such as "cuda".
        mask: dtype of the mask, bool or floating; None without one.
        mask_shape: (batch or 1, heads or 1, queries or 1, keys), or what else broadcasts to it; None without a mask.
        causal: whether a token sees no later ones.
        scale: of the logits; None for 1/√head_dim.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    mask: torch.dtype | None = None
    mask_shape: tuple[int, ...] | None = None
    causal: bool = False
    scale: float | None = None

    @property
    def text(self) -> str:
        """Name for tables and the cache, such as "2x8x4096x77 d40 float16 cuda"."""
        parts = [f"{self.batch}x{self.heads}x{self.queries}x{self.keys}", f"d{self.head_dim}"]
        parts += [f"v{self.value_dim}"] if self.value_dim != self.head_dim else []
        parts += [_name(self.dtype), self.device]
        if self.mask is not None:
            parts.append(f"mask:{_name(self.mask)}:{'x'.join(map(str, self.mask_shape))}")
        parts += ["causal"] if self.causal else []
        parts += [f"scale:{self.scale:g}"] if self.scale is not None else []
        return " ".join(parts)

    @property
    def seed(self) -> int:
        """A number that depends on nothing else, for inputs drawn for tests of backends."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:4], "big")


def signature_of(query, key, value, mask=None, causal=False, scale=None) -> Signature | None:
    """The signature of a call with tensors (batch, heads, tokens, head_dim).

    Returns:
        None for calls that are left to PyTorch: other numbers of dimensions, tensors that broadcast, mixed dtypes.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return None
    if key.shape[:2] != query.shape[:2] or value.shape[:3] != key.shape[:3]:
        return None
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return None
    batch, heads, queries, head_dim = query.shape
    return Signature(
        batch, heads, queries, key.shape[2], head_dim, value.shape[3], query.dtype, query.device.type,
        None if mask is None else mask.dtype, None if mask is None else tuple(mask.shape), causal, scale,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
