"""Attention kernels under one form: ``kernel(query, key, value, mask, causal, scale)`` on (batch, heads, tokens, dim).

PyTorch's kernels are called as operators, not through `torch.nn.attention.sdpa_kernel`: that flips flags of the whole
process, which two threads can leave flipped. What PyTorch prepares before it calls them is prepared here: heads padded
to a multiple of 8, masks as biases.
"""

import functools
import math

import torch
import torch.nn.functional as F

_aten = torch.ops.aten
_SCORES = 2**24  # of one chunk: 64 MiB in single precision


def default(query, key, value, mask, causal, scale):
    """What PyTorch chooses."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def plain(query, key, value, mask, causal, scale):
    """Matrix products and a softmax, by PyTorch's own composition."""
    bias = additive(mask, query.dtype)
    return _aten._scaled_dot_product_attention_math(query, key, value, bias, 0.0, causal, scale=scale)[0]


def flash(query, key, value, mask, causal, scale):
    """PyTorch's FlashAttention: on CUDA without masks, on the CPU its blocked kernel."""
    if query.device.type == "cpu":
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, causal, attn_mask=additive(mask, query.dtype), scale=scale)[0]
    width, scale, (query, key, value) = padded(query, key, value, scale)
    kernel = _aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, 0.0, causal, False, scale=scale)[0][..., :width]


def efficient(query, key, value, mask, causal, scale):
    """PyTorch's memory-efficient kernel (CUTLASS)."""
    width, scale, (query, key, value) = padded(query, key, value, scale)
    bias = aligned_bias(mask, query, key)
    kernel = _aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, False, 0.0, causal, scale=scale)[0][..., :width]


def cudnn(query, key, value, mask, causal, scale):
    """cuDNN's fused attention."""
    width, scale, (query, key, value) = padded(query, key, value, scale)
    bias = aligned_bias(mask, query, key)
    kernel = _aten._scaled_dot_product_cudnn_attention
    return kernel(query, key, value, bias, False, 0.0, causal, False, scale=scale)[0][..., :width]


def chunked(query, key, value, mask, causal, scale):
    """Blocks of queries one after the other, each by PyTorch's choice: bounds what kernels that store scores allocate."""
    batch, heads, queries, _ = query.shape
    rows = rows_of_chunk(batch * heads * key.shape[2])
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    for start in range(0, queries, rows):
        part = slice(start, min(start + rows, queries))
        own = mask[..., part, :] if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1 else mask
        out[:, :, part] = default(query[:, :, part], key, value, own, causal, scale)
    return out


def rows_of_chunk(scores_per_row: int) -> int:
    """How many queries `chunked` takes at once."""
    return max(64, _SCORES // max(1, scores_per_row))


def flex(query, key, value, mask, causal, scale):
    """FlexAttention, compiled; uncompiled it would store all scores."""
    modify = None
    if mask is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        bias = additive(mask, query.dtype).expand(shape)

        def modify(score, batch, head, row, column):
            return score + bias[batch, head, row, column]

    elif causal:

        def modify(score, batch, head, row, column):
            return torch.where(row >= column, score, -float("inf"))

    return _compiled_flex()(query, key, value, score_mod=modify, scale=scale)


def xformers(query, key, value, mask, causal, scale):
    """xformers' memory_efficient_attention."""
    import xformers.ops as ops

    bias = ops.LowerTriangularMask() if causal else aligned_bias(mask, query, key)
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return ops.memory_efficient_attention(*tensors, attn_bias=bias, p=0.0, scale=scale).transpose(1, 2)


def flash_attn(query, key, value, mask, causal, scale):
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(*tensors, softmax_scale=scale, causal=causal).transpose(1, 2)


def flash_attn_3(query, key, value, mask, causal, scale):
    """FlashAttention 3 for Hopper, package flash_attn_interface."""
    from flash_attn_interface import flash_attn_func

    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = flash_attn_func(*tensors, softmax_scale=scale, causal=causal)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # earlier releases add the log-sum-exp


def sage(query, key, value, mask, causal, scale):
    """SageAttention: keys and queries in 8 bits."""
    from sageattention import sageattn

    return sageattn(query, key, value, tensor_layout="HND", is_causal=causal, sm_scale=scale)


def additive(mask, dtype: torch.dtype):
    """A mask as what is added to the logits: 0 where a boolean mask is true, −∞ elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -math.inf)


def aligned_bias(mask, query, key):
    """The mask as a bias (batch, heads, queries, keys) whose rows start at multiples of 16 bytes, as kernels want."""
    if mask is None:
        return None
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    bias = F.pad(additive(mask, query.dtype), (0, -shape[3] % 16))
    return bias[..., : shape[3]].expand(shape)


def padded(query, key, value, scale):
    """Heads filled up with zeros to a multiple of 8, which changes no result.

    Returns:
        The width of the values before, the scale that belongs to the width of the heads before, and the three tensors.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = value.shape[-1]
    if query.shape[-1] % 8 or width % 8:
        fill = -max(query.shape[-1], width) % 8 + max(query.shape[-1], width)
        query, key, value = (F.pad(tensor, (0, fill - tensor.shape[-1])) for tensor in (query, key, value))
    return width, scale, (query, key, value)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
