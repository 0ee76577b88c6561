"""Accelerations that leave the computation what it is, by name: how each is switched on and off."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..attention.backends import compiler_missing
from ..attention.optimize import optimize_attention
from ..attention.text import reuse_text
from ..core.errors import UsageError
from ..models.networks import eager, networks_of
from .rows import sequential_cfg

BIT_EQUAL, ROUNDING = "bit-equal", "rounding"
_FEWEST = 4  # convolutions of a network for which their layout matters; transformers have one or two


class Switch:
    """Something that can be on or off; off when made.

    Args:
        on, off: what turns it on and off.
        detail: what there is to tell about it, as plain JSON.
        idle: why it had no effect on any run so far, or None.
    """

    def __init__(self, on: Callable[[], object], off: Callable[[], object], detail: dict | None = None, idle=None):
        self._turn, self._is_on, self.detail = {True: on, False: off}, False, detail
        self.idle: Callable[[], str | None] = idle or (lambda: None)

    def on(self) -> None:
        """Turn it on, if it is off."""
        self._to(True)

    def off(self) -> None:
        """Turn it off, if it is on."""
        self._to(False)

    def _to(self, state: bool) -> None:
        if self._is_on != state:
            self._is_on = state  # also where turning fails half-way, so that off can mend it
            self._turn[state]()


@dataclass(frozen=True)
class Acceleration:
    """One way to run the same computation.

    Attributes:
        name: as the user types it.
        summary: one line.
        exact: "bit-equal", or "rounding" where results agree up to the order of sums.
        compiles: whether it makes graphs, whose memory cannot be seen but on CUDA.
        make: ``make(pipe, options)`` returns a `Switch`; raises UsageError where there is nothing to gain, with the reason.
            ``options`` are keyword arguments of `optimize_attention`.
    """

    name: str
    summary: str
    exact: str
    make: Callable[[object, dict], Switch]
    compiles: bool = False


def _attention(pipe, options: dict) -> Switch:
    report = optimize_attention(pipe, **options)
    report.undo()
    kept = [network.installation for network in report.networks if network.installed]
    if not kept:
        raise UsageError("; ".join(network.outcome for network in report.networks))
    return Switch(lambda: [one.install() for one in kept], lambda: [one.remove() for one in kept], report.to_dict())


def _text(pipe, options: dict) -> Switch:
    reuse = reuse_text(pipe)
    return _undoable(reuse, lambda: None if reuse.hits else "The text is another one at every step.")


def _sequential(pipe, options: dict) -> Switch:
    parted = sequential_cfg(pipe)
    return _undoable(parted, lambda: None if parted.parted else "The network is called for one row at a time.")


def _channels_last(pipe, options: dict) -> Switch:
    parts = [*map(eager, networks_of(pipe).values()), getattr(pipe, "vae", None)]
    found = [_convolutions(part) for part in parts if isinstance(part, nn.Module)]
    layers = [layer for some in found if len(some) >= _FEWEST for layer in some]
    if not layers:
        raise UsageError("There are hardly any convolutions.")
    layers = [layer for layer in layers if not layer.weight.is_contiguous(memory_format=torch.channels_last)]
    if not layers:
        raise UsageError("Its weights lie channels-last already.")
    strides = {layer: layer.weight.stride() for layer in layers}

    def on():
        for layer in layers:
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)

    def off():
        for layer, stride in strides.items():
            weight = layer.weight.data
            layer.weight.data = weight.new_empty_strided(weight.shape, stride).copy_(weight)

    return Switch(on, off)


def _compile(pipe, options: dict) -> Switch:
    networks = list(networks_of(pipe).values())
    if any(network is not eager(network) or network._compiled_call_impl is not None for network in networks):
        raise UsageError("It is compiled already.")
    if (missing := compiler_missing(next(networks[0].parameters()).device)) is not None:
        raise UsageError(missing)
    made: dict[nn.Module, Callable] = {}

    def on():
        for network in networks:
            if network not in made:
                network.compile()
                made[network] = network._compiled_call_impl
            network._compiled_call_impl = made[network]

    def off():
        for network in networks:
            network._compiled_call_impl = None

    return Switch(on, off)


def _undoable(made, idle: Callable[[], str | None]) -> Switch:
    made.undo()
    return Switch(made.redo, made.undo, idle=idle)


def _convolutions(part: nn.Module) -> list[nn.Conv2d]:
    """Those with a layout to choose: kernels of one pixel lie the same way in both."""
    return [one for one in part.modules() if isinstance(one, nn.Conv2d) and one.weight.shape[2:].numel() > 1]


# Parts of a batch come first, since measurements of attention depend on its size.
ACCELERATIONS = {
    one.name: one
    for one in (
        Acceleration("sequential-cfg", "branches of guidance one after the other, which takes less memory", ROUNDING, _sequential),
        Acceleration("attention", "the fastest correct attention backend for every shape", ROUNDING, _attention),
        Acceleration("text", "keys and values of the text computed once per run", BIT_EQUAL, _text),
        Acceleration("channels-last", "convolution weights with channels innermost", ROUNDING, _channels_last),
        Acceleration("compile", "torch.compile of the network", ROUNDING, _compile, compiles=True),
    )
}  # fmt: skip
"""All accelerations, in the order in which they are tried."""
