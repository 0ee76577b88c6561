"""What the modules of a network cost: multiply–accumulates and time, in calls that are made as usual."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core.errors import UsageError

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_PRODUCTS = (
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
)
_SUMMED = (torch.baddbmm, torch.addmm)  # their product comes second and third


@torch.no_grad()
def count_macs(network: nn.Module, run: Callable[[], object]) -> Counter:
    """Multiply–accumulates of convolutions, linear layers and matrix products, those of attention included.

    Args:
        network: as it is before `torch.compile`; any device and dtype.
        run: calls it once or more.

    Returns:
        For every module that was called, by its name, what was spent inside it, "" being the network.

    Raises:
        UsageError: ``run`` does not call the network.
    """
    counter = _Counter()
    with (
        _around(network, dict(network.named_modules()), counter.stack.append, lambda name: counter.stack.pop()),
        counter,
    ):
        run()
    if not counter.macs[""]:
        raise _not_called(network)
    return counter.macs


@torch.no_grad()
def measure_seconds(
    network: nn.Module, run: Callable[[], object], names: Iterable[str] = (), repeats: int = 10
) -> dict[str, float]:
    """Median time that a run spends in modules and, under "", in the whole network.

    Args:
        network: on the device that matters. On a CUDA device the time of its own clock.
        run: calls it once or more; is called once before it counts.
        names: of modules.
        repeats: runs that count.

    Raises:
        UsageError: ``run`` does not call the network, no repeats.
    """
    if repeats < 1:
        raise UsageError(f"Time is measured in at least one run; got repeats={repeats}.")
    modules = {"": network} | {name: network.get_submodule(name) for name in names}
    stamp, between = _clock(next(network.parameters()).device)
    rounds = []
    for _ in range(repeats + 1):
        begun, ended = [], []  # inner modules end before outer ones
        with _around(
            network,
            modules,
            lambda name, begun=begun: begun.append((name, stamp())),
            lambda name, begun=begun, ended=ended: ended.append((*_last(begun, name), stamp())),
        ):
            run()
        seconds: Counter = Counter()
        for name, begin, end in ended:
            seconds[name] += between(begin, end)
        rounds.append(seconds)
    if not rounds[-1][""]:
        raise _not_called(network)
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in modules}


class _Counter(TorchFunctionMode):
    """Adds up products for every module on the stack."""

    def __init__(self):
        super().__init__()
        self.stack: list[str] = []
        self.macs: Counter = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        macs = _macs(func, args, kwargs or {}, result) if self.stack else 0
        if macs:
            self.macs.update(dict.fromkeys(self.stack, macs))
        return result


def _macs(func: Callable, args: tuple, kwargs: dict, result) -> int:
    if func is F.linear:
        return result.numel() * _given(args, kwargs, 0, "input").shape[-1]
    if func in _CONVOLUTIONS:
        return result.numel() * _given(args, kwargs, 1, "weight")[0].numel()
    if func in _TRANSPOSED:
        return _given(args, kwargs, 0, "input").numel() * _given(args, kwargs, 1, "weight")[0].numel()
    if func is F.scaled_dot_product_attention:
        query, key, value = (_given(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
        return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if func in _PRODUCTS:
        return result.numel() * args[0].shape[-1]
    if func in _SUMMED:
        return result.numel() * args[1].shape[-1]
    return 0


def _given(args: tuple, kwargs: dict, position: int, name: str) -> torch.Tensor:
    return args[position] if len(args) > position else kwargs[name]


@contextmanager
def _around(
    network: nn.Module, modules: dict, before: Callable[[str], object], after: Callable[[str], object]
) -> Iterator:
    """Call functions with a module's name before and after its calls, also those that end in an error."""
    hooks = []
    try:
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: (before(name), None)[1]))
            hooks.append(module.register_forward_hook(lambda *_, name=name: (after(name), None)[1]))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last(begun: list, name: str) -> tuple:
    """Take the last beginning of a module out of the list."""
    index = max(i for i, (other, _) in enumerate(begun) if other == name)
    return begun.pop(index)


def _clock(device: torch.device) -> tuple[Callable, Callable]:
    """How to take a stamp, and the seconds between two."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin

    def stamp():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(begin, end):
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return stamp, between


def _not_called(network: nn.Module) -> UsageError:
    return UsageError(f"run must call this {type(network).__name__} itself, not a compiled form or a copy; it did not.")
