"""Whether a backend is correct: against double precision, on the model's shapes and in the corners.

A candidate passes if on every probe its largest error, relative to the largest value, is within the budget of its class for
the precision, or within four times what PyTorch's own choice errs there. Approximate ones are judged by the cosine of what
they return, for logits as the model has them; for large ones, results must be finite.
"""

import math

import torch

from .backends import APPROXIMATE, Backend
from .collect import Use
from .inputs import Inputs, make_inputs, mask_rows
from .kernels import default

BUDGETS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error of exact backends, relative to the largest value, by precision."""
COSINE = 0.999
"""Least cosine between what an approximate backend returns and the reference."""
LARGE_LOGITS, ONE_KEY = "large logits", "one key"
_LARGE = 30.0  # standard deviation of large logits
_ROWS = 256  # queries that are compared with the reference; all of them are compared with PyTorch's choice


class Gate:
    """The probes of one signature, to judge any number of backends by.

    Args:
        use: the signature with the scale, layout and device of its inputs.
    """

    def __init__(self, use: Use):
        self.signature = use.signature
        ordinary = make_inputs(use)
        self.probes = {"ordinary inputs": ordinary, LARGE_LOGITS: make_inputs(use, logits=_LARGE)}
        if ordinary[3] is not None:
            self.probes["masked rows"] = (*ordinary[:3], mask_rows(ordinary[3]))
        elif not use.signature.causal:
            self.probes[ONE_KEY] = make_inputs(use, keys=1)
        self._judged = {name: self._reference(inputs) for name, inputs in self.probes.items()}

    def verdict(self, backend: Backend) -> str | None:
        """Why a backend is excluded for this signature, or None."""
        if reason := backend.refuses(self.signature):
            return reason
        for name, inputs in self.probes.items():
            try:
                out = self._run(backend.kernel, inputs)
                if problem := self._problem(out, name, backend):
                    return f"{problem} on {name}"
            except Exception as error:  # whatever a kernel raises excludes it
                if name != ONE_KEY:  # a shape that routes do not give it: refusing is no fault there, a wrong result is
                    return _sentence(error)
        return None

    def _run(self, kernel, inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():
            return kernel(*inputs, self.signature.causal, self.signature.scale)

    def _reference(self, inputs: Inputs):
        """Rows, their values in double precision, PyTorch's whole output, and the largest error that is allowed."""
        stock = self._run(default, inputs)
        count = inputs[0].shape[2]
        rows = torch.linspace(0, count - 1, min(count, _ROWS), device=stock.device).round().long().unique()
        exact = reference(*inputs, self.signature.causal, self.signature.scale, rows)
        error = _relative(stock[:, :, rows], exact)
        budget = BUDGETS.get(self.signature.dtype, 1e-2)
        return rows, exact, stock, max(budget, 4 * error) if math.isfinite(error) else budget

    def _problem(self, out, name: str, backend: Backend) -> str | None:
        rows, exact, stock, allowed = self._judged[name]
        if not isinstance(out, torch.Tensor) or out.shape != stock.shape or out.dtype != stock.dtype:
            got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
            return f"returns {got}, expected {tuple(stock.shape)} {stock.dtype},"
        if bool((~torch.isfinite(out) & torch.isfinite(stock)).any()):
            return "returns values that are not finite"
        if backend.kind == APPROXIMATE:
            if name == LARGE_LOGITS:
                return None
            cosine = float(torch.cosine_similarity(out[:, :, rows].double().flatten(), exact.flatten(), dim=0))
            return None if cosine >= COSINE else f"has cosine {cosine:.4f} < {COSINE} to the exact result"
        error = max(_relative(out[:, :, rows], exact), _relative(out, stock) / 2)
        return None if error <= allowed else f"errs by {error:.1g}, allowed {allowed:.1g},"


def reference(query, key, value, mask, causal: bool, scale: float | None, rows: torch.Tensor) -> torch.Tensor:
    """softmax(scale · Q Kᵀ + mask) V in double precision for some of the queries; 0 where a row sees nothing.

    Args:
        query, key, value: (batch, heads, tokens, dim).
        mask: boolean (true: seen) or added to the logits; broadcasts to (batch, heads, queries, keys).
        causal: whether row i sees keys up to i only.
        scale: of the logits; None for 1/√dim.
        rows: indices of the queries.

    Returns:
        (batch, heads, rows, dim) in float64.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for part in rows.split(32):  # bounds memory
        logits = scale * (query[:, :, part].double() @ key.double().transpose(-1, -2))
        if mask is not None:
            own = mask[..., part, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask
            logits = logits.masked_fill(~own, -math.inf) if own.dtype == torch.bool else logits + own.double()
        if causal:
            seen = part[:, None] >= torch.arange(key.shape[2], device=part.device)
            logits = logits.masked_fill(~seen, -math.inf)
        out.append(torch.softmax(logits, dim=-1).nan_to_num(0.0) @ value.double())
    return torch.cat(out, dim=2)


def _relative(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference relative to the largest value, where the right is finite."""
    right = right.double()
    finite = torch.isfinite(right)
    if not bool(finite.any()):
        return 0.0
    difference = (left.double() - right)[finite].abs().max()
    return float(difference / right[finite].abs().max().clamp(min=1e-12))


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"raises {type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")
