"""The backends by name: what they need, what they refuse, and whether they are exact."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.errors import UsageError, unknown
from . import kernels
from .signature import Signature

EXACT = "exact"
APPROXIMATE = "approximate"
_HALF = (torch.float16, torch.bfloat16)


def _usable(device: torch.device) -> str | None:
    return None


def _takes_all(signature: Signature) -> str | None:
    return None


def _no_scores(signature: Signature) -> int:
    """Bytes beside the output of kernels that keep blocks of scores only, roughly."""
    return 0


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: what the user types.
        summary: one line.
        kernel: ``kernel(query, key, value, mask, causal, scale)``, tensors (batch, heads, tokens, dim).
        kind: "exact", or "approximate" for arithmetic that loses precision on purpose; those are used only when allowed.
        unusable: why it cannot be used on a device, or None.
        refuses: why it cannot take a signature, or None; everything else is found by trying.
        scratch: estimated bytes of a call beside its output, where the device does not measure them.
        on_request: whether it is tried only when named, because trying takes long.
    """

    name: str
    summary: str
    kernel: Callable
    kind: str = EXACT
    unusable: Callable[[torch.device], str | None] = _usable
    refuses: Callable[[Signature], str | None] = _takes_all
    scratch: Callable[[Signature], int] = _no_scores
    on_request: Callable[[torch.device], bool] = lambda device: False


def candidates(names, approximate: bool, device: torch.device) -> tuple[list[Backend], list[tuple[str, str]]]:
    """The backends to try on a device, "default" first, and those not tried with the reason.

    Args:
        names: names or `Backend` records, beside the default; None for every one that is usable.
        approximate: whether approximate ones are allowed.

    Raises:
        UsageError: an unknown name, or one named that is not usable.
    """
    asked = None if names is None else _asked(names)
    chosen, left = [], []
    for backend in BACKENDS.values() if asked is None else asked:
        reason = backend.unusable(device)
        if not reason and backend.kind == APPROXIMATE and not approximate:
            reason = "It is approximate: pass approximate=True to allow it."
        if reason and asked is not None:
            raise UsageError(f"The attention backend {backend.name!r} cannot be used here: {reason}")
        if asked is None and not reason and backend.on_request(device):
            reason = f"It takes long to try here: name it, backends=[{backend.name!r}, …]."
        if reason:
            left.append((backend.name, reason))
        elif backend.name != "default":
            chosen.append(backend)
    return [BACKENDS["default"], *chosen], left


def _asked(names) -> list[Backend]:
    if not isinstance(names, (list, tuple)) or not names:
        raise UsageError(f"backends is a list, such as ['flash', 'math']; got {names!r:.60}.")
    asked = []
    for item in names:
        if not isinstance(item, Backend) and item not in [*BACKENDS]:
            raise unknown("attention backend", item, BACKENDS)
        asked.append(item if isinstance(item, Backend) else BACKENDS[item])
    for name in {backend.name for backend in asked}:
        records = {backend for backend in asked if backend.name == name}
        if len(records) > 1 or (name == "default" and records != {BACKENDS[name]}):
            raise UsageError(f"Two attention backends are called {name!r}; give yours another name.")
    return [*dict.fromkeys(asked)]


def _cuda_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"It needs a CUDA device; this is {device.type}."


def _package(name: str, install: str) -> Callable[[torch.device], str | None]:
    def unusable(device: torch.device) -> str | None:
        if reason := _cuda_only(device):
            return reason
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: {install}."
        try:
            importlib.import_module(name)
        except Exception as error:  # built for another PyTorch, a missing library: whatever its import raises
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
        return None

    return unusable


def _cudnn(device: torch.device) -> str | None:
    if reason := _cuda_only(device):
        return reason
    if not torch.backends.cudnn.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return "It needs cuDNN and compute capability 8.0."
    return None


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work for a device, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Compiling for CUDA needs triton."
    if device.type != "cpu":
        return f"Compiling for {device.type} is not supported here."
    return None if shutil.which("g++") or shutil.which("clang++") else "Compiling for the CPU needs a C++ compiler."


def _flash_device(device: torch.device) -> str | None:
    return None if device.type in ("cpu", "cuda") else f"PyTorch has no flash kernel for {device.type}."


def _flash_refuses(signature: Signature) -> str | None:
    if signature.value_dim != signature.head_dim:
        return "values and keys differ in width"
    if signature.device == "cpu":
        return None
    return _half_without_mask(signature)


def _half_without_mask(signature: Signature) -> str | None:
    if signature.mask is not None:
        return "takes no mask"
    return _half_only(signature)


def _half_only(signature: Signature) -> str | None:
    if signature.dtype not in _HALF:
        return "takes half precision only"
    return "takes heads up to 256" if signature.head_dim > 256 else None


def _square_causal(signature: Signature) -> str | None:
    if signature.causal and signature.queries != signature.keys:
        return "aligns causal masks of unequal lengths in another way"
    return None


def _both(*refusals):
    return lambda signature: next((reason for refuse in refusals if (reason := refuse(signature))), None)


def _chunk_refuses(signature: Signature) -> str | None:
    if signature.causal:
        return "takes no causal mask"
    rows = kernels.rows_of_chunk(signature.batch * signature.heads * signature.keys)
    return "the queries are one chunk" if rows >= signature.queries else None


def _scores(signature: Signature) -> int:
    """Scores and their softmax."""
    size = max(4, signature.dtype.itemsize)
    return 2 * signature.batch * signature.heads * signature.queries * signature.keys * size


_ALL = (
    Backend("default", "PyTorch's choice: what diffusers runs", kernels.default),
    Backend("flash", "PyTorch's FlashAttention", kernels.flash, unusable=_flash_device,
            refuses=_both(_flash_refuses, _square_causal)),
    Backend("efficient", "PyTorch's memory-efficient kernel", kernels.efficient, unusable=_cuda_only,
            refuses=_square_causal),
    Backend("cudnn", "cuDNN's fused attention", kernels.cudnn, unusable=_cudnn, refuses=_both(_half_only, _square_causal)),
    Backend("math", "matrix products and softmax, all scores stored", kernels.plain, scratch=_scores),
    Backend("chunked", "queries in blocks, each by PyTorch's choice: bounds memory", kernels.chunked,
            refuses=_chunk_refuses),
    Backend("flex", "compiled FlexAttention", kernels.flex, unusable=compiler_missing, on_request=lambda device: device.type == "cpu"),
    Backend("xformers", "xformers' memory_efficient_attention", kernels.xformers,
            unusable=_package("xformers", "pip install 'diffaccel[xformers]'"), refuses=_square_causal),
    Backend("flash_attn", "the flash-attn package", kernels.flash_attn,
            unusable=_package("flash_attn", "pip install flash-attn"), refuses=_both(_half_without_mask, _square_causal)),
    Backend("flash_attn_3", "FlashAttention 3 for Hopper", kernels.flash_attn_3,
            unusable=_package("flash_attn_interface", "build it from the hopper folder of flash-attention"),
            refuses=_both(_half_without_mask, _square_causal)),
    Backend("sage", "SageAttention: queries and keys in 8 bits", kernels.sage, kind=APPROXIMATE,
            unusable=_package("sageattention", "pip install sageattention"), refuses=_both(_half_without_mask, _square_causal)),
)  # fmt: skip

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}
"""Every registered backend by name; "default" is what stays where nothing is better."""
