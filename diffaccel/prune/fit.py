"""Linear maps in place of removed operators, fitted to what these did (LD-Pruner's replacement where shapes differ)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..core.errors import NumericalError, UsageError
from .operators import check_names, operators
from .replacements import inputs_of, is_joint

_SMALLEST = 1e-10  # directions of inputs with less than this share of the largest variance are not used


@torch.no_grad()
def fit_maps(
    network: nn.Module, names: Iterable[str], run: Callable[[], object]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Least squares y ≈ W·x + b over channels, all positions and samples alike, for each of some operators.

    Args:
        network: in which the operators still are.
        names: of operators that have one output in the size of their input.
        run: calls the network on calibration data.

    Returns:
        By name, W (outputs, inputs) and b (outputs,), float32 on the CPU, as `surgery.remove` takes them.

    Raises:
        UsageError: unknown names, operators with several outputs or another resolution, a run without calls.
        NumericalError: inputs or outputs that are not finite.
    """
    names, table = list(names), operators(network, single=True)
    check_names(network, names, table)
    sums: dict[str, list[torch.Tensor]] = {}
    hooks = []
    try:
        for name in names:
            module = network.get_submodule(name)
            if is_joint(module):
                raise UsageError(f"{name} returns image and text; no linear map can take its place.")
            hook = _gather(sums, name)
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        run()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in sums]
    if missing:
        raise UsageError(f"run must call this {type(network).__name__} itself; {missing[0]} was not called.")
    return {name: _solved(name, *sums[name]) for name in names}


def _gather(sums: dict, name: str) -> Callable:
    """A hook that adds up Σ x·xᵀ and Σ x·yᵀ, with x followed by a one."""

    def hook(module, args, kwargs, output):
        x, y = inputs_of(module, args, kwargs), output if isinstance(output, torch.Tensor) else output[0]
        if x.ndim != y.ndim or _positions(x).shape[0] != _positions(y).shape[0]:
            raise UsageError(f"{name} changes the resolution; no linear map can take its place.")
        x, y = (_positions(value).double().cpu() for value in (x, y))
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        found = [x.T @ x, x.T @ y]
        sums[name] = [old + new for old, new in zip(sums[name], found, strict=True)] if name in sums else found

    return hook


def _positions(value: torch.Tensor) -> torch.Tensor:
    """(rows, C) of (B, tokens, C) or (B, C, …)."""
    return value.flatten(0, 1) if value.ndim == 3 else value.movedim(1, -1).flatten(0, -2)


def _solved(name: str, gram: torch.Tensor, cross: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise NumericalError(f"What goes through {name} is not finite; a map cannot be fitted to it.")
    solution = torch.linalg.pinv(gram, hermitian=True, rtol=_SMALLEST) @ cross
    return solution[:-1].T.float().contiguous(), solution[-1].float()
