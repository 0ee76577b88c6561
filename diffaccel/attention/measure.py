"""What every candidate does on one signature: excluded with a reason, or how long it takes and what it allocates."""

import functools
from dataclasses import dataclass

import torch

from ..core.memory import peak_bytes
from .backends import Backend
from .collect import Use
from .gate import Gate
from .inputs import make_inputs
from .timing import alternate, medians


@dataclass(frozen=True)
class Measurement:
    """One backend on one signature.

    Attributes:
        backend: its name.
        excluded: why it is not a candidate, or None.
        seconds: median of a call; None where excluded.
        bytes: allocated by a call at its peak, its output included; an estimate where the device does not measure it.
    """

    backend: str
    excluded: str | None = None
    seconds: float | None = None
    bytes: int | None = None


def measure(use: Use, backends: list[Backend], rounds: int = 20, seconds: float = 2.0) -> list[Measurement]:
    """Try backends on a signature: correctness first, then the correct ones against each other in one run.

    Args:
        use: the signature and how the model uses it.
        backends: candidates, "default" first; it is the yardstick and not judged.
        rounds, seconds: see `alternate`.
    """
    gate = Gate(use)
    excluded = {backend.name: None if index == 0 else gate.verdict(backend) for index, backend in enumerate(backends)}
    del gate
    inputs = make_inputs(use)
    passed = {backend.name: backend for backend in backends if excluded[backend.name] is None}
    runs = {name: functools.partial(_call, backend, use, inputs) for name, backend in passed.items()}
    taken = medians(alternate(runs, use.device, rounds, seconds))
    output = use.signature.batch * use.signature.heads * use.signature.queries * use.signature.value_dim
    found = []
    for name, reason in excluded.items():
        if reason is not None:
            found.append(Measurement(name, excluded=reason))
            continue
        if use.device.type == "cuda":
            peak = peak_bytes(runs[name], use.device)
        else:  # what operators store for themselves is not seen
            peak = output * use.signature.dtype.itemsize + passed[name].scratch(use.signature)
        found.append(Measurement(name, seconds=taken[name], bytes=peak))
    return found


def _call(backend: Backend, use: Use, inputs) -> torch.Tensor:
    """What a processor does: attend, then bring the heads of a token together, which copies or not as the kernel left them."""
    with torch.no_grad():
        return backend.kernel(*inputs, use.signature.causal, use.signature.scale).transpose(1, 2).flatten(2)
